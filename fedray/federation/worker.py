"""A worker: trains and evaluates whichever client it is asked to. Plain Python; `pool_ray.py` makes it an actor."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedray.adapters import Layer
from fedray.config.build import make_method, make_spec
from fedray.config.sections import Config
from fedray.data.partition import FederatedData
from fedray.errors import PrivacyError
from fedray.federation.guard import COUNT_NOISE, check_orders
from fedray.federation.messages import PUBLIC, Ask, Failure, Orders, Question, Report, Secure
from fedray.federation.secure import masked
from fedray.federation.wire import Header, Packet, decode, inputs_digest, pack, unpack
from fedray.methods import View
from fedray.privacy import client_level, secure_sum
from fedray.privacy.keys import Key, KeyStore
from fedray.privacy.plan import Mechanism
from fedray.training import subspace
from fedray.training.local import LocalTrainer, Private

OWN, OPTIMIZER = "own/", "optimizer/"


class Worker:
    """Holds the model for its whole life and the increments it has seen; nothing about any client."""

    def __init__(
        self, config: Config, device: str, threads: int, data: FederatedData | None = None, reads: Sequence[str] = ()
    ):
        self.threads = threads
        self.trainer = LocalTrainer(config, device, threads, data, reads)
        self.method = make_method(config)
        self.spec = make_spec(config, self.trainer.layers, self.trainer.data.clients)
        self._increments: dict[tuple[int, str], dict[str, Tensor]] = {}  # by version and digest
        self._keys = KeyStore(config.privacy.key_dir)
        self._fingerprints: dict[str, bytes] = {}

    def describe(self) -> tuple[tuple[Layer, ...], dict[str, Tensor]]:
        """The adapted layers and the heads' initial values."""
        return self.trainer.describe()

    def train(
        self,
        client: str,
        round: int,
        header: Header,
        packet: Packet,
        fetch: Callable[[int], Packet],
        kept: Packet | None,
        orders: Orders | None = None,
    ) -> tuple[Packet | None, Packet | None, Report | Failure]:
        """(update, what the client keeps, report) of a client's round (from 0), or its failure. Never raises for the client's sake.

        `kept`: what it kept last time, its optimizer state and its own factors; they never reach the aggregation. `orders`: of a
        private run.
        """
        try:
            key = self._key(client, orders)
            held = unpack(kept) if kept is not None else {}
            view, base_key = self._view(client, header, packet, fetch, held)
            state = {n.removeprefix(OPTIMIZER): t for n, t in held.items() if n.startswith(OPTIMIZER)}
            private = None
            if self.private and not self.by_client:
                check_orders(self.trainer.config, client, len(self.trainer.examples("train", client)), orders)
                purpose = ("round", client, round, inputs_digest(header, packet), *_told(orders))
                private = Private(key, purpose, orders.rate, Mechanism(orders.clip, orders.noise, orders.expected))
            result = self.trainer.train(view, client, round, state or None, base_key, private)
            sent = self.method.upload(self.spec, client, result.tensors, round)
            if self.by_client:
                sent = self._clipped(client, round, view, result.tensors, sent, orders)
            packet = self._packed(client, sent, orders)
        except (
            Exception
        ) as error:  # whatever a client's data or step raises is that client's failure, and is reported as such
            self.trainer.reset()
            return None, None, self._failure(client, error)
        keeps = {f"{OPTIMIZER}{n}": t for n, t in result.optimizer_state.items()}
        own = self.spec.names if self.method.asks else self.method.keeps(self.spec)
        keeps |= {f"{OWN}{n}": t for n, t in result.tensors.items() if n.rsplit(".", 1)[1] in own}
        examples, loss, seconds = (0, None, 0.0) if self.private else (result.examples, result.loss, result.seconds)
        report = Report(client, examples, loss, result.base_lost, seconds, key_is_fixed=key is not None and key.fixed)
        return packet, pack(keeps) if keeps else None, report

    @property
    def by_client(self) -> bool:
        """Whether whole clients are what is protected."""
        return self.private and self.trainer.config.privacy.unit == "client"

    def _clipped(
        self, client: str, round: int, view: View, trained: dict[str, Tensor], sent: dict[str, Tensor], orders: Orders
    ) -> dict[str, Tensor]:
        """What the client's training changed of what it sends, clipped; and whether it was within the clip, where that is asked."""
        untrained = self.method.upload(self.spec, client, {n: view.tensors[n] for n in trained}, round)
        update, within = client_level.clipped({n: t - untrained[n] for n, t in sent.items()}, orders.clip)
        bit = (
            {client_level.WITHIN: torch.tensor([float(within) - 0.5])}
            if self.trainer.config.privacy.adaptive_clip
            else {}
        )
        return update | bit

    def _packed(self, client: str, tensors: dict[str, Tensor], orders: Orders | None) -> Packet:
        """As it travels: masked where the orders name a secure sum."""
        if orders is None or orders.secure is None:
            return pack(tensors)
        weight = orders.weight if orders.weight is not None else float(len(self.trainer.examples("train", client)))
        return masked(self._keys.key(orders.run, client), client, tensors, orders.secure, weight)

    def _secure(self, client: str, ask: Ask, secure: Secure) -> Any:
        """The answer to a step of a secure sum."""
        key = self._keys.key(secure.run, client)
        if ask is Ask.ADVERTISE:
            return secure_sum.advertise(key, secure.session)
        if ask is Ask.SHARE:
            return secure_sum.share(key, client, secure.session, secure.adverts)
        return secure_sum.reveal(key, client, secure.session, secure.adverts, secure.sealed[client], secure.sent)

    def _key(self, client: str, orders: Orders | None) -> Key | None:
        """Where the client adds noise, the key of it."""
        if orders is None or not self.private or self.by_client:
            return None
        # Changed data are met like a lost key: other noise, and a new charge.
        key = self._keys.key(orders.run, client).bound(self._fingerprint(client))
        if orders.key and key.identity != orders.key:
            raise _KeyLost(key.identity)
        return key

    def _fingerprint(self, client: str) -> bytes:
        if client not in self._fingerprints:
            self._fingerprints[client] = self.trainer.examples("train", client).digest()
        return self._fingerprints[client]

    def _failure(self, client: str, error: Exception) -> Failure:
        """In a private run an error's own words stay here, in the worker's log: they may quote data."""
        if isinstance(error, _KeyLost):
            return Failure(client, "its noise key was lost, or its data are others", "", error.identity)
        if not self.private or isinstance(error, (PrivacyError, FloatingPointError)):
            return Failure(client, _cause(error), traceback.format_exc() if not self.private else "")
        logging.getLogger("fedray").error("client %s failed", client, exc_info=error)
        return Failure(
            client,
            f"{type(error).__name__}; its words are in the log of the worker that served it, since they may quote data",
            "",
        )

    @property
    def private(self) -> bool:
        return self.trainer.config.privacy.on

    def ask(self, client: str, question: Question, kept: Packet | None) -> tuple[Packet | None, None, Report | Failure]:
        """(answer, nothing, report) to a question outside local training, or the client's failure."""
        try:
            if question.secure is not None:
                return (
                    None,
                    None,
                    Report(client, 0, None, 0.0, 0.0, sealed=self._secure(client, question.ask, question.secure)),
                )
            key = self._key(client, question.orders.get(client)) if question.ask is not Ask.FORGET else None
            packet = self._packed(client, self._answer(client, question, kept, key), question.orders.get(client))
        except Exception as error:  # as in `train`
            return None, None, self._failure(client, error)
        told = question.ask not in (Ask.WEIGHTS, Ask.FORGET) and client != PUBLIC and not self.private
        identity = (key.identity, key.fixed) if key is not None else ("", False)
        return (
            packet,
            None,
            Report(
                client,
                len(self.trainer.examples("train", client)) if told else 0,
                None,
                0.0,
                0.0,
                packet.nbytes,
                key=identity[0],
                key_is_fixed=identity[1],
            ),
        )

    def _answer(self, client: str, question: Question, kept: Packet | None, key: Key | None) -> dict[str, Tensor]:
        orders = question.orders.get(client)
        if self.private and client != PUBLIC:
            self._check_ask(question.ask)
        if question.ask is Ask.COUNT:
            if self.trainer.config.siloed and len(self.trainer.examples("train", client)) < (
                batch := self.trainer.config.client(client).batch_size
            ):
                raise PrivacyError(
                    f"client '{client}' has fewer examples than its batch_size {batch}, by which a private step divides: lower it"
                )
            noise = key.stream("count", client).normals(1).item() * (
                self.trainer.config.privacy.count_noise or COUNT_NOISE
            )
            return {"count": torch.tensor([len(self.trainer.examples("train", client)) + noise]).round()}
        if question.ask is Ask.KEY:
            return {}
        if question.ask is Ask.FORGET:
            self._keys.forget(orders.run, client)
            return {}
        given = unpack(question.packet) if question.packet is not None else {}
        if question.ask is Ask.ANSWER:
            trained = {n.removeprefix(OWN): t for n, t in unpack(kept).items() if n.startswith(OWN)}
            return self.method.answer(self.spec, given, trained)
        if question.ask is Ask.WEIGHTS:
            return self.trainer.start_from_weights(self.spec.adapter)
        if question.packet is None:
            given = subspace.gaussian_tests(self.spec.layers, question.columns, self.spec.seed)
        noise = None
        if self.private and client != PUBLIC:
            purpose = (
                "subspace",
                client,
                question.ask.name,
                question.packet.digest if question.packet is not None else "",
                *_told(orders),
            )
            every = self.trainer.examples("train", client)
            check_orders(self.trainer.config, client, len(every), orders, subspace=True)
            examples = [every[i] for i in key.stream("sample", *purpose).sample(len(every), orders.rate)]
            noise = subspace.Noise(orders.noise, key.stream("noise", *purpose), orders.expected)
        else:
            examples = self.trainer.gradient_examples(client if client != PUBLIC else None, question.examples)
        if question.ask is Ask.DENSE:
            return subspace.dense(self.trainer, examples, question.layers)
        return {Ask.RANGE: subspace.range_sketch, Ask.ROWS: subspace.row_sketch}[question.ask](
            self.trainer, examples, given, noise
        )

    def _check_ask(self, ask: Ask) -> None:
        """Raises PrivacyError for a question that a private run does not have: the coordinator may not bring it up."""
        if ask is Ask.DENSE or (ask in (Ask.RANGE, Ask.ROWS) and self.trainer.config.adapter.subspace != "private"):
            raise PrivacyError(f"the coordinator asked for {ask.value}, which this run keeps private: it sends nothing")

    def evaluate(
        self,
        part: str,
        client: str | None,
        share: tuple[int, int],
        header: Header,
        packet: Packet,
        fetch: Callable[[int], Packet],
        kept: Packet | None = None,
    ) -> tuple[list[list[dict[str, Any]]], float]:
        """Statistics by batch, and what the base's dtype lost. Raises PrivacyError for examples that are private."""
        if self.private and part != "test":
            raise PrivacyError(f"the coordinator asked for metrics of {part} examples, which this run keeps private")
        view, base_key = self._view(client, header, packet, fetch, unpack(kept) if kept is not None else {})
        statistics = self.trainer.evaluate(view, part, client or "", share, base_key)
        return statistics, self.trainer.base_lost

    def _view(
        self,
        client: str | None,
        header: Header,
        packet: Packet,
        fetch: Callable[[int], Packet],
        held: dict[str, Tensor],
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


def _told(orders: Orders) -> tuple[str, ...]:
    """What of the orders shapes a draw: other orders must not meet the same noise."""
    return tuple(float(n).hex() for n in (orders.rate, orders.noise, orders.clip, orders.expected))


class _KeyLost(Exception):
    """The client's key, bound to its data, is not the one that the ledger knows."""

    def __init__(self, identity: str):
        super().__init__(identity)
        self.identity = identity


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (FloatingPointError, ValueError)) and text else f"{type(error).__name__}: {text}"
