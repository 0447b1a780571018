"""A worker: trains and evaluates whichever client it is asked to. Plain Python; `worker_ray.py` makes it an actor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from fedray.adapters import Layer
from fedray.config.build import make_method, make_spec
from fedray.config.sections import Config
from fedray.data.partition import FederatedData
from fedray.federation.channels.base import ClientSide
from fedray.federation.channels.registry import make_side
from fedray.federation.coding import make_coder
from fedray.federation.kept import factors_kept, kept_tensors, optimizer_kept
from fedray.federation.messages import Answered, Failure, Orders, Trained
from fedray.federation.questions import Question
from fedray.federation.wire import Header, Packet, Unpack, UnpackOnce, as_announced, decode, inputs_digest, pack, unpack
from fedray.methods import Method, Spec, View
from fedray.methods.state import factor_of
from fedray.privacy.private import Private
from fedray.training.led import Crew, LedTrainer
from fedray.training.local import LocalResult, LocalTrainer
from fedray.training.together import train_together

Fetch = Callable[[int], Packet]


@dataclass(frozen=True)
class Work:
    """One client's part in a round: the packet that it is sent, what it kept last time, and its orders."""

    client: str
    packet: Packet
    kept: Packet | None
    orders: Orders


#: A client's update as it travels (`wire.py`, `coding.py`), what it keeps, and its report, or its failure.
Done = tuple[Any, Packet | None, Trained | Failure]


@dataclass(frozen=True)
class _Begun:
    """A client that is about to train. `held`: what it kept, unpacked."""

    work: Work
    view: View
    base_key: Any
    held: dict[str, Tensor]
    private: Private | None


class Worker:
    """Holds the model for its whole life and the increments it has seen; nothing about any client.

    What a client keeps to itself is up to `side`, the client's half of the run's guarantee. `crew`: the other ranks of
    a worker of several.
    """

    def __init__(
        self,
        config: Config,
        device: str,
        threads: int,
        data: FederatedData | None = None,
        reads: Sequence[str] = (),
        side: Callable[[Any, Method, Spec], ClientSide] = make_side,
        crew: Crew | None = None,
    ):
        self.threads = threads
        make = LocalTrainer if crew is None else partial(LedTrainer, crew)
        self.trainer: LocalTrainer = make(config, device, threads, data, reads)
        self.method = make_method(config)
        self.spec = make_spec(config, self.trainer.layers, self.trainer.data.clients)
        self.side = side(self.trainer, self.method, self.spec)
        self._coder = make_coder(config.federation, self.method, self.spec, list(self.trainer.describe()[1]))
        self._increments: dict[tuple[int, str], dict[str, Tensor]] = {}  # by version and digest

    def forget_increments(self) -> None:
        """Ask for all of them again."""
        self._increments.clear()

    def describe(self) -> tuple[tuple[Layer, ...], dict[str, Tensor]]:
        """The adapted layers and the heads' initial values."""
        return self.trainer.describe()

    def train_all(self, round: int, header: Header, fetch: Fetch, work: Iterable[Work]) -> Iterator[Done]:
        """`train` for each of these clients, in their order, `worker.batch_clients` of them together; no more of the
        work is taken at once."""
        together, work = self.trainer.config.worker.batch_clients, iter(work)
        while here := list(itertools.islice(work, together)):
            if together == 1:
                yield from (self.train(w.client, round, header, w.packet, fetch, w.kept, w.orders) for w in here)
            else:
                yield from self._train_together(round, header, fetch, here)

    def train(
        self, client: str, round: int, header: Header, packet: Packet, fetch: Fetch, kept: Packet | None, orders: Orders
    ) -> Done:
        """(update, what the client keeps, report) of a client's round (from 0), or its failure. Never raises for the
        client's sake.

        `kept`: what it kept last time, its optimizer state and its own factors; they never reach the aggregation.
        """
        try:
            begun = self._begin(round, header, fetch, Work(client, packet, kept, orders))
            state = optimizer_kept(begun.held) or None
            return self._end(
                round,
                begun,
                partial(self.trainer.train, begun.view, client, round, state, begun.base_key, begun.private),
            )
        except Exception as error:  # noqa: BLE001 - whatever a client's data or step raises is that client's failure
            return self._failed(client, error)

    def _train_together(self, round: int, header: Header, fetch: Fetch, work: Sequence[Work]) -> list[Done]:
        begun: dict[str, _Begun] = {}
        done: dict[str, Done] = {}
        unpack_once = UnpackOnce()
        for part in work:
            try:
                begun[part.client] = self._begin(round, header, fetch, part, unpack_once)
            except Exception as error:  # noqa: BLE001 - as in `train`
                done[part.client] = self._failed(part.client, error)
        try:
            views = {client: one.view for client, one in begun.items()}
            results = train_together(self.trainer, views, round, header.base_key)
        except Exception as error:  # noqa: BLE001 - of which client, nobody can tell
            results = dict.fromkeys(begun, error)
        for client, one in begun.items():
            try:
                done[client] = self._end(round, one, partial(_given, results[client]))
            except Exception as error:  # noqa: BLE001 - as in `train`
                done[client] = self._failed(client, error)
        return [done[part.client] for part in work]

    def _begin(self, round: int, header: Header, fetch: Fetch, work: Work, unpack: Unpack = unpack) -> _Begun:
        """What a client trains from, and how."""
        # Objects of its own: what somebody else says of them (a digest) is not believed.
        header, packet, kept = Header.parse(header.to_text()), work.packet.again(), work.kept and work.kept.again()
        private = self.side.protect(work.client, round, partial(inputs_digest, header, packet, kept), work.orders)
        held = unpack(kept) if kept is not None else {}
        view, base_key = self._view(work.client, header, packet, fetch, held, unpack)
        return _Begun(work, view, base_key, held, private)

    def _end(self, round: int, begun: _Begun, steps: Callable[[], LocalResult]) -> Done:
        """What a client's steps give, as it is sent, kept and told."""
        client, orders = begun.work.client, begun.work.orders
        result = self.side.trained(client, begun.view, steps)
        update = self.side.send(client, round, begun.view, result.tensors, orders)
        sent = self._coder.encode(client, update, begun.view, round, begun.held)
        report = self.side.report(client, result, sent.update.nbytes, begun.private)
        return sent.update, self._kept(result, sent.rest), replace(report, lost=sent.lost, meant=sent.meant)

    def _failed(self, client: str, error: Exception) -> Done:
        self.trainer.reset()
        return None, None, self.side.failure(client, error)

    def _kept(self, result: LocalResult, rest: Mapping[str, Tensor]) -> Packet | None:
        """What stays with the client of its round. `rest`: of its update, under the names by which it is kept."""
        names = self.spec.names if self.method.asks else self.method.keeps(self.spec)
        factors = {n: t for n, t in result.tensors.items() if factor_of(n) in names}
        tensors = kept_tensors(factors, result.optimizer_state) | dict(rest)
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
        self,
        client: str | None,
        header: Header,
        packet: Packet,
        fetch: Fetch,
        held: dict[str, Tensor],
        unpack: Unpack = unpack,
    ) -> tuple[View, Any]:
        """What the client trains from, and a key that equal base weights share."""
        live = {(version, digest) for version, _, digest in header.increments}
        self._increments = {k: t for k, t in self._increments.items() if k in live}
        for version, digest in sorted(live - self._increments.keys()):
            self._increments[version, digest] = unpack(as_announced(fetch(version), digest))
        increments = {version: self._increments[version, digest] for version, _, digest in header.increments}
        view = self.method.view(self.spec, decode(header, unpack(packet), increments), client)
        keeps = self.method.keeps(self.spec)
        factors = {n: t for n, t in factors_kept(held).items() if factor_of(n) in keeps}
        view = View(view.tensors | factors, view.base, view.trained)
        return view, None if self.method.personal else header.base_key


def _given(result: LocalResult | Exception) -> LocalResult:
    """The steps of a client that has taken them, or failed in them."""
    if isinstance(result, Exception):
        raise result
    return result
