"""The coordinator: holds the server's state, its checkpoint and its records. Knows workers only as a `Pool`, and what
protects clients only as a `Channel`.

The same code runs inside an actor (`coordinator_ray.py`) and in one process (`run.py`). A round itself is in
`round.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedray.adapters import Layer
from fedray.config.build import make_method, make_spec
from fedray.config.sections import Config
from fedray.data.partition import FederatedData, load_data
from fedray.data.tasks import TASKS
from fedray.federation import checkpoint as checkpoints
from fedray.federation.best import round_to_keep
from fedray.federation.buffered import buffering
from fedray.federation.channels.base import Context, Pool
from fedray.federation.channels.registry import make_channel
from fedray.federation.clocks import aggregation_threads, threads, timed
from fedray.federation.coding import feeds_back, opening
from fedray.federation.evaluation import evaluate
from fedray.federation.messages import Outcome
from fedray.federation.record import RoundRecord
from fedray.federation.round import run_round
from fedray.federation.start import make_start
from fedray.federation.starts import Starts
from fedray.federation.storage import storage_of
from fedray.federation.wire import Message, Packet, encode, pack, unpack
from fedray.methods import State


class Coordinator:
    """One federated run's server side. `run_round` does one round and returns its record.

    `facts`: the adapted layers, and the heads' initial values. `records`: as `rounds.jsonl` has them, the evaluation
    before round 1 first. `kept`: by client, what stays with it, as handles.
    """

    state: State
    message: Message
    handle: Any

    def __init__(
        self,
        config: Config,
        folder: str,
        facts: tuple[tuple[Layer, ...], dict[str, torch.Tensor]],
        pool: Pool,
        data: FederatedData | None = None,
        channel: Callable[[Context], Any] = make_channel,
    ):
        layers, self._heads = facts
        self.config, self.folder = config, Path(folder)
        self.method = make_method(config)
        self.data = data if data is not None else load_data(config)
        self.task = TASKS[config.model.task](config, self.data, None)
        self.spec = make_spec(config, layers, self.data.clients)
        starts = Starts(self.method, self.spec, list(self._heads))
        pool = buffering(opening(pool, config.federation.wire, starts), config, len(self.data.clients), starts)
        self.pool = pool
        self.start: dict[str, Any] | None = None
        self.records: list[dict[str, Any]] = []
        self.kept: dict[str, Any] = {}
        self._seen = dict.fromkeys(self.data.clients, 0)
        self._packets: dict[int, Packet] = {}
        self._storage = storage_of(config.output.checkpoints)
        saved = checkpoints.latest(self._checkpoints, self.spec, self._storage)
        context = Context(config, tuple(self.data.clients), pool, self.method, self._checkpoints)
        self.channel = channel(context)
        if saved is not None:
            self._resume(saved)
        elif not self.spec.adapter.started:
            self.publish(self.method.init(self.spec, self._heads))

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoint"

    def _resume(self, saved: checkpoints.Checkpoint) -> None:
        self.publish(saved.state)
        self._seen, self.records, self.start = dict(saved.seen), list(saved.records), saved.start
        self.kept = {client: pack(tensors) for client, tensors in saved.kept.items()}
        self.channel.resume(self.records, saved.mark)

    # --- the run ---

    def evaluate_start(self) -> dict[str, Any]:
        """The adapter's start where it has one, and metrics before the first round, kept as record 0. A second call
        changes nothing.

        Raises ClientError when a client cannot give its part of the start.
        """
        if self.records:
            return self.records[0]
        seconds: dict[str, float] = {}
        self.channel.begin()
        if not hasattr(self, "state"):
            with timed(seconds, "start"), threads(aggregation_threads(self.spec.layers)):
                start = make_start(self.spec, self.data.clients, self.channel.ask)
                self.publish(self.method.init(self.spec, self._heads, start.tensors))
                self.start = start.record()
            self._save()  # it may cost as much as a round; an engine that has evaluated could not make it again
        with timed(seconds, "evaluate"):
            record = {"round": 0, **evaluate(self).to_json(), "start": self.start}
        self.records.append(record | self.channel.begun() | {"seconds": seconds})
        return self.records[-1]

    def run_round(self) -> dict[str, Any] | None:
        """See `fedray.federation.round.run_round`; the record as `rounds.jsonl` holds it."""
        return self.records[-1] if run_round(self) is not None else None

    def finish(self) -> None:
        """The run is over."""
        self.channel.end()

    # --- what a round needs to know, and leaves behind ---

    @property
    def rounds_done(self) -> int:
        return self.state.round

    @property
    def done(self) -> bool:
        """Whether the last of the configured rounds is done."""
        return self.state.round == self.config.federation.rounds

    @property
    def stopped(self) -> bool:
        """Whether the last record says that no round may follow."""
        return bool(self.records) and "stopped" in self.records[-1]

    def publish(self, state: State) -> None:
        """Go on from this state: its broadcast is what workers get from now on."""
        self.state = state
        self.message = encode(self.method.broadcast(state), self._packets, self.spec)
        self._packets = self.message.increments
        self.handle = self.pool.publish(self.message)

    def keep(self, outcomes: Sequence[Outcome]) -> None:
        """What stays with these clients, where the run keeps anything of them."""
        section = self.config.federation
        if section.keep_optimizer or feeds_back(section, self.method) or self.method.keeps(self.spec):
            self.kept |= {o.client: o.kept for o in outcomes if o.kept is not None}  # SGD has no state

    def count_bytes_down(self, clients: Sequence[str], share: float) -> int:
        """What these clients receive: a `share` of them the packet of every round, and each of them every increment
        that it has not had yet, which it has had from now on."""
        every = once = 0
        for client in clients:
            new = [v for v in self.message.increments if v > self._seen[client]]
            every += self.message.packet_of(client).nbytes
            once += sum(self.message.increments[v].nbytes for v in new)
            self._seen[client] = max([self._seen[client], *new])
        return round(every * share) + once

    def bytes_moved(self) -> int:
        """Of all rounds that are written down, and of the start."""
        start = self.start or {}
        rounds = sum(r["bytes_up"] + r["bytes_down"] for r in self.records[1:])
        return rounds + start.get("bytes_up", 0) + start.get("bytes_down", 0)

    def write_down(self, record: RoundRecord) -> RoundRecord:
        """Record and state are on disk when this returns; the time that it took is in the record from then on."""
        self.records.append(record.to_json())
        with timed(self.records[-1]["seconds"], "checkpoint"):
            self._save()
        return record

    def _save(self) -> None:
        kept = {client: unpack(self.pool.fetch(handle)) for client, handle in self.kept.items()}
        mark = self.channel.mark()
        saved = checkpoints.Checkpoint(self.state, self._seen, kept, tuple(self.records), self.start, mark)
        result = round_to_keep(self.config, self.records)
        checkpoints.save(self._checkpoints, saved, result, self.config.output.keep, self._storage)
