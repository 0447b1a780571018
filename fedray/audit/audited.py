"""A whole run with canaries in it, and what they prove."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedray.audit import sides
from fedray.audit.attack import Attacks
from fedray.audit.bounds import ROUNDING, example_moves, tells_of
from fedray.audit.canaries import Canaries
from fedray.audit.noise import NoiseSeen
from fedray.config.sections import Config
from fedray.errors import ConfigError, FedrayError
from fedray.federation.channels.registry import make_channel, make_side
from fedray.federation.coordinator import Coordinator
from fedray.federation.prepare import prepare
from fedray.federation.worker import Worker
from fedray.privacy.accountant import Release, epsilon
from fedray.privacy.audit import audit
from fedray.privacy.ledger import EVERYONE, Ledger
from fedray.privacy.planning import count_noise

#: Of all findings of a run together.
CONFIDENCE = 0.95
#: Of so few numbers as there are clients: how seldom their noise looks too small, and from how many on it is looked at.
FEW_BY_CHANCE, FEWEST_COUNTS = 1e-4, 3


@dataclass(frozen=True)
class Finding:
    """What was audited, the epsilon that is claimed of it (at `delta`), and the one that canaries prove, with a
    confidence of 95 % for all findings of a run together. `most`: what so many canaries could prove at all: a larger
    claim cannot be refuted by them. `noise`: what was seen of the noise itself, which any claim rests on."""

    what: str
    claimed: float
    proven: float
    delta: float
    most: float
    noise: NoiseSeen

    @property
    def holds(self) -> bool:
        return self.proven <= self.claimed and not self.noise.faults()


@dataclass(frozen=True)
class Audited:
    """`asked`, `answered`: how many second questions a client was asked after its answers, and how many it answered.
    `moved`: the furthest that one example, an update, or a client that keeps to nothing moved a sum, in clips. `told`:
    fields of the records that tell of a secret cohort. `counts`: the noise on the clients' numbers of examples.
    `fixed`: a test's word has fixed the keys, so that anyone knows the noise."""

    findings: list[Finding]
    asked: int
    answered: int
    moved: float
    told: list[str]
    counts: NoiseSeen
    fixed: bool
    rounds: int
    seconds: float

    @property
    def holds(self) -> bool:
        bounded = self.moved <= 1 + ROUNDING
        kept = self.answered == 0 and bounded and not self.told and self.counts.enough and not self.fixed
        return kept and all(finding.holds for finding in self.findings)


def audit_run(config: Config, canaries: int, folder: Path, said: Callable[[str], None] = lambda line: None) -> Audited:
    """Run the config in one process, in `folder`, with so many canaries. Raises ConfigError for a config without
    privacy, or with fewer numbers than canaries."""
    if not config.privacy.on:
        raise ConfigError("fedray audit tries a guarantee: give privacy.epsilon, or privacy.noise")
    began = time.monotonic()
    output = config.output.model_copy(update={"dir": str(folder)})
    privacy = config.privacy.model_copy(update={"key_dir": str(folder / "keys")})
    config = config.model_copy(update={"output": output, "privacy": privacy, "engine": "inline"})
    prepared = prepare(config)
    config = prepared.config.model_copy(update={"output": output})
    watch = _Watched(config, prepared.data.clients[0], canaries)
    worker = Worker(config, prepared.placement.device, prepared.placement.cpus, prepared.data, side=watch.side)
    pool = Attacks(worker, watch.client)
    server = Coordinator(config, str(folder), worker.describe(), pool, prepared.data, channel=watch.channel)
    _check_room(canaries, watch, worker, prepared.trainable)
    server.evaluate_start()
    records = []
    for record in _rounds(server, pool):
        records.append(record)
        said(f"round {record['round']} of {config.federation.rounds}")
    ledger = server.channel.ledger
    findings, moved, told = watch.findings(ledger), watch.moved(worker, ledger), watch.told(records)
    counts = _counts(config, worker, ledger)
    server.finish()
    seconds = time.monotonic() - began
    return Audited(findings, pool.asked, pool.answered, moved, told, counts, ledger.fixed, len(records), seconds)


def _counts(config: Config, worker: Worker, ledger: Ledger) -> NoiseSeen:
    """The noise of what clients have told of their numbers of examples: a number each."""
    seen = NoiseSeen(by_chance=FEW_BY_CHANCE)
    if config.privacy.unit == "example" and len(ledger.counts) >= FEWEST_COUNTS:
        true = {
            client: torch.tensor([float(len(worker.trainer.examples("train", client)))]) for client in ledger.counts
        }
        told = {client: torch.tensor([count]) for client, count in ledger.counts.items()}
        seen.see(true, told, 1.0, count_noise(config))
    return seen


def _rounds(server: Coordinator, pool: Attacks) -> Iterator[dict[str, Any]]:
    """The records of the run. One that breaks off after a client has answered an attack was broken by that."""
    while not server.done:
        try:
            record = server.run_round()
        except FedrayError:
            if not pool.answered:
                raise
            return
        if record is None:
            return
        yield record


def _check_room(canaries: int, watch: _Watched, worker: Worker, trainable: int) -> None:
    """Raises ConfigError for more canaries than numbers that they could be in."""
    room = trainable
    if watch.sketches is not None:
        room = min(room, *(min(layer.m, layer.n) * layer.rank for layer in worker.trainer.layers))
    if canaries > room:
        raise ConfigError(f"{canaries} canaries need a number each, and there are {room}: give fewer --canaries")


class _Watched:
    """Who has canaries, and where they are seen, by the config's guarantee."""

    def __init__(self, config: Config, client: str, canaries: int):
        self.config, self.client = config, client
        self.canaries, self.sketches = Canaries(canaries), None
        self.cohorts = sides.Cohorts()
        self.side: sides.SideMaker = make_side
        self.channel: sides.ChannelMaker = make_channel
        if config.privacy.trust == "nobody":
            self.side = sides.shares(client, self.canaries, self.cohorts)
            self.channel = sides.noised_mean_seen(self.canaries, self.cohorts)
        elif config.privacy.unit == "client":
            self.side = sides.clips(self.cohorts)
            self.channel = sides.clients(self.canaries, self.cohorts)
        else:
            self.sketches = Canaries(canaries) if config.adapter.subspace == "private" else None
            self.side = sides.examples(client, self.canaries, self.sketches)

    def findings(self, ledger: Ledger) -> list[Finding]:
        name, delta = EVERYONE if EVERYONE in ledger.plans else self.client, ledger.delta
        assert delta is not None, "a run that has trained has its delta"
        watched = [(self._what, self.canaries, "training")]
        if self.sketches is not None:
            watched.insert(0, ("the private subspace", self.sketches, "subspace"))
        # Bonferroni: by chance none of them proves too much.
        confidence = 1 - (1 - CONFIDENCE) / len(watched)
        return [
            _finding(
                what,
                canaries,
                [e.release for e in ledger.entries[name] if e.release.what.startswith(of)],
                delta,
                confidence,
            )
            for what, canaries, of in watched
        ]

    def moved(self, worker: Worker, ledger: Ledger) -> float:
        """How far one of those that are protected moved a sum, in clips."""
        if self.config.privacy.unit == "example":
            return example_moves(worker.trainer, self.client, ledger.plans[self.client].clip)
        return self.cohorts.moved

    def told(self, records: Sequence[Mapping[str, Any]]) -> list[str]:
        """Fields of the records that tell of a cohort that is a secret."""
        return tells_of(records, self.cohorts.drawn) if self.config.federation.cohort and self.cohorts.drawn else []

    @property
    def _what(self) -> str:
        if self.config.privacy.unit == "example":
            return f"training: an example of {self.client}, against the coordinator"
        against = "the coordinator" if self.config.privacy.trust == "nobody" else "whoever sees the models"
        return f"training: a client, against {against}"


def _finding(what: str, canaries: Canaries, releases: list[Release], delta: float, confidence: float) -> Finding:
    """The claim is of the releases that the canaries were in."""
    included = canaries.included.tolist()
    proven = audit(included, canaries.scores.tolist(), delta, confidence=confidence)
    most = audit(included, [float(i) for i in included], delta, confidence=confidence)  # where every guess is right
    return Finding(what, epsilon(releases, delta), proven, delta, most, canaries.noise)
