"""A worker: trains and evaluates whichever client it is asked to. Plain Python; `pool_ray.py` makes it an actor."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fedray.adapters import Layer
from fedray.config import Config, make_method, make_spec
from fedray.data.partition import FederatedData
from fedray.federation.messages import PUBLIC, Ask, Failure, Question, Report
from fedray.federation.wire import Header, Packet, decode, pack, unpack
from fedray.methods import View
from fedray.training import subspace
from fedray.training.local import LocalTrainer

OWN, OPTIMIZER = "own/", "optimizer/"


class Worker:
    """Holds the model for its whole life and the increments it has seen; nothing about any client."""

    def __init__(self, config: Config, device: str, threads: int, data: FederatedData | None = None):
        self.threads = threads
        self.trainer = LocalTrainer(config, device, threads, data)
        self.method = make_method(config)
        self.spec = make_spec(config, self.trainer.layers, self.trainer.data.clients)
        self._increments: dict[tuple[int, str], dict[str, Tensor]] = {}  # by version and digest

    def describe(self) -> tuple[tuple[Layer, ...], dict[str, Tensor]]:
        """The adapted layers and the heads' initial values."""
        return self.trainer.describe()

    def train(
        self, client: str, round: int, header: Header, packet: Packet, fetch: Callable[[int], Packet], kept: Packet | None
    ) -> tuple[Packet | None, Packet | None, Report | Failure]:
        """(update, what the client keeps, report) of a client's round (from 0), or its failure. Never raises for the client's sake.

        `kept`: what it kept last time, its optimizer state and its own factors; they never reach the aggregation.
        """
        try:
            held = unpack(kept) if kept is not None else {}
            view, base_key = self._view(client, header, packet, fetch, held)
            state = {n.removeprefix(OPTIMIZER): t for n, t in held.items() if n.startswith(OPTIMIZER)}
            result = self.trainer.train(view, client, round, state or None, base_key)
            sent = self.method.upload(self.spec, client, result.tensors, round)
        except Exception as error:  # whatever a client's data or step raises is that client's failure, and is reported as such
            self.trainer.reset()
            return None, None, Failure(client, _cause(error), traceback.format_exc())
        keeps = {f"{OPTIMIZER}{n}": t for n, t in result.optimizer_state.items()}
        own = self.spec.names if self.method.asks else self.method.keeps(self.spec)
        keeps |= {f"{OWN}{n}": t for n, t in result.tensors.items() if n.rsplit(".", 1)[1] in own}
        return pack(sent), pack(keeps) if keeps else None, Report(client, result.examples, result.loss, result.base_lost, result.seconds)

    def ask(self, client: str, question: Question, kept: Packet | None) -> tuple[Packet | None, None, Report | Failure]:
        """(answer, nothing, report) to a question outside local training, or the client's failure."""
        try:
            answer = self._answer(client, question, kept)
        except Exception as error:  # as in `train`
            return None, None, Failure(client, _cause(error), traceback.format_exc())
        examples = len(self.trainer.examples("train", client)) if question.ask is not Ask.WEIGHTS and client != PUBLIC else 0
        packet = pack(answer)
        return packet, None, Report(client, examples, 0.0, 0.0, 0.0, packet.nbytes)

    def _answer(self, client: str, question: Question, kept: Packet | None) -> dict[str, Tensor]:
        given = unpack(question.packet) if question.packet is not None else {}
        if question.ask is Ask.ANSWER:
            trained = {n.removeprefix(OWN): t for n, t in unpack(kept).items() if n.startswith(OWN)}
            return self.method.answer(self.spec, given, trained)
        if question.ask is Ask.WEIGHTS:
            return self.trainer.start_from_weights(self.spec.adapter)
        examples = self.trainer.gradient_examples(client if client != PUBLIC else None, question.examples)
        if question.ask is Ask.DENSE:
            return subspace.dense(self.trainer, examples, question.layers)
        if question.packet is None:
            given = subspace.gaussian_tests(self.spec.layers, question.columns, self.spec.seed)
        return {Ask.RANGE: subspace.range_sketch, Ask.ROWS: subspace.row_sketch}[question.ask](self.trainer, examples, given)

    def evaluate(
        self, part: str, client: str | None, share: tuple[int, int], header: Header, packet: Packet, fetch: Callable[[int], Packet],
        kept: Packet | None = None,
    ) -> tuple[list[list[dict[str, Any]]], float]:
        """Statistics by batch, and what the base's dtype lost."""
        view, base_key = self._view(client, header, packet, fetch, unpack(kept) if kept is not None else {})
        statistics = self.trainer.evaluate(view, part, client or "", share, base_key)
        return statistics, self.trainer.base_lost

    def _view(
        self, client: str | None, header: Header, packet: Packet, fetch: Callable[[int], Packet], held: dict[str, Tensor]
    ) -> tuple[View, Any]:
        live = {(version, digest) for version, _, digest in header.increments}
        self._increments = {k: t for k, t in self._increments.items() if k in live}
        for version, digest in sorted(live - self._increments.keys()):
            self._increments[version, digest] = unpack(fetch(version))
        increments = {version: t for (version, _), t in self._increments.items()}
        view = self.method.view(self.spec, decode(header, packet, increments), client)
        keeps = self.method.keeps(self.spec)
        own = {n.removeprefix(OWN): t for n, t in held.items() if n.startswith(OWN) and n.rsplit(".", 1)[1] in keeps}
        view = View(view.tensors | own, view.base, view.trained)
        return view, None if self.method.personal else header.base_key


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (FloatingPointError, ValueError)) and text else f"{type(error).__name__}: {text}"

