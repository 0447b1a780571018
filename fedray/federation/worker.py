"""A worker: trains and evaluates whichever client it is asked to. Plain Python; `worker_ray.py` makes it an actor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fedray.adapters import Layer
from fedray.config.build import make_method, make_spec
from fedray.config.sections import Config
from fedray.data.partition import FederatedData
from fedray.federation.channels.base import ClientSide
from fedray.federation.channels.registry import make_side
from fedray.federation.kept import factors_kept, kept_tensors, optimizer_kept
from fedray.federation.messages import Answered, Failure, Orders, Trained
from fedray.federation.questions import Question
from fedray.federation.wire import Header, Packet, as_announced, decode, inputs_digest, pack, unpack
from fedray.methods import Method, Spec, View
from fedray.methods.state import factor_of
from fedray.training.local import LocalResult, LocalTrainer

Fetch = Callable[[int], Packet]


class Worker:
    """Holds the model for its whole life and the increments it has seen; nothing about any client.

    What a client keeps to itself is up to `side`, the client's half of the run's guarantee.
    """

    def __init__(
        self,
        config: Config,
        device: str,
        threads: int,
        data: FederatedData | None = None,
        reads: Sequence[str] = (),
        side: Callable[[Any, Method, Spec], ClientSide] = make_side,
    ):
        self.threads = threads
        self.trainer = LocalTrainer(config, device, threads, data, reads)
        self.method = make_method(config)
        self.spec = make_spec(config, self.trainer.layers, self.trainer.data.clients)
        self.side = side(self.trainer, self.method, self.spec)
        self._increments: dict[tuple[int, str], dict[str, Tensor]] = {}  # by version and digest

    def forget_increments(self) -> None:
        """Ask for all of them again."""
        self._increments.clear()

    def describe(self) -> tuple[tuple[Layer, ...], dict[str, Tensor]]:
        """The adapted layers and the heads' initial values."""
        return self.trainer.describe()

    def train(
        self, client: str, round: int, header: Header, packet: Packet, fetch: Fetch, kept: Packet | None, orders: Orders
    ) -> tuple[Packet | None, Packet | None, Trained | Failure]:
        """(update, what the client keeps, report) of a client's round (from 0), or its failure. Never raises for the
        client's sake.

        `kept`: what it kept last time, its optimizer state and its own factors; they never reach the aggregation.
        """
        try:
            # Objects of its own: what somebody else says of them (a digest) is not believed.
            header, packet, kept = Header.parse(header.to_text()), packet.again(), kept and kept.again()
            private = self.side.protect(client, round, partial(inputs_digest, header, packet, kept), orders)
            held = unpack(kept) if kept is not None else {}
            view, base_key = self._view(client, header, packet, fetch, held)
            steps = partial(self.trainer.train, view, client, round, optimizer_kept(held) or None, base_key, private)
            result = self.side.trained(client, view, steps)
            update = self.side.send(client, round, view, result.tensors, orders)
        except Exception as error:  # noqa: BLE001 - whatever a client's data or step raises is that client's failure
            self.trainer.reset()
            return None, None, self.side.failure(client, error)
        return update, self._kept(result), self.side.report(client, result, update.nbytes, private)

    def _kept(self, result: LocalResult) -> Packet | None:
        """What stays with the client of its round."""
        names = self.spec.names if self.method.asks else self.method.keeps(self.spec)
        factors = {n: t for n, t in result.tensors.items() if factor_of(n) in names}
        tensors = kept_tensors(factors, result.optimizer_state)
        return pack(tensors) if tensors else None

    def ask(
        self, client: str, question: Question, kept: Packet | None
    ) -> tuple[Packet | None, None, Answered | Failure]:
        """(answer, nothing, report) to a question outside local training, or the client's failure."""
        try:
            packet, report = self.side.respond(client, question, kept)
        except Exception as error:  # noqa: BLE001 - as in `train`
            self.trainer.reset()
            return None, None, self.side.failure(client, error)
        return packet, None, report

    def evaluate(
        self,
        part: str,
        client: str | None,
        share: tuple[int, int],
        header: Header,
        packet: Packet,
        fetch: Fetch,
        kept: Packet | None = None,
    ) -> tuple[list[list[dict[str, Any]]], float]:
        """Statistics by batch, and what the base's dtype lost. Raises PrivacyError for examples that are private."""
        self.side.check_evaluation(part)
        try:
            view, base_key = self._view(client, header, packet, fetch, unpack(kept) if kept is not None else {})
            statistics = self.trainer.evaluate(view, part, client or "", share, base_key)
        except Exception:
            self.trainer.reset()
            raise
        return statistics, self.trainer.base_lost

    def _view(
        self, client: str | None, header: Header, packet: Packet, fetch: Fetch, held: dict[str, Tensor]
    ) -> tuple[View, Any]:
        """What the client trains from, and a key that equal base weights share."""
        live = {(version, digest) for version, _, digest in header.increments}
        self._increments = {k: t for k, t in self._increments.items() if k in live}
        for version, digest in sorted(live - self._increments.keys()):
            self._increments[version, digest] = unpack(as_announced(fetch(version), digest))
        increments = {version: self._increments[version, digest] for version, _, digest in header.increments}
        view = self.method.view(self.spec, decode(header, packet, increments), client)
        keeps = self.method.keeps(self.spec)
        factors = {n: t for n, t in factors_kept(held).items() if factor_of(n) in keeps}
        view = View(view.tensors | factors, view.base, view.trained)
        return view, None if self.method.personal else header.base_key
