"""How many workers run, on what, and where: decided from the config and what the cluster has, and said in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedray.config.sections import Config
from fedray.errors import ConfigError


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: its resources and its labels, as Ray has them."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def room(self, each: Mapping[str, float]) -> int:
        """How many workers of that much fit."""
        return min(int(self.resources.get(kind, 0.0) / n + 1e-9) for kind, n in each.items())


@dataclass(frozen=True)
class Home:
    """Where one worker lives and whom it may serve."""

    labels: Mapping[str, str]
    clients: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """`workers` actors of `gpus` GPUs and `cpus` CPUs (threads) each; `reason` is for the person. `homes`: one for each worker, where clients
    are kept to their own nodes; empty where any worker may serve any client."""

    workers: int
    gpus: float
    cpus: int
    reason: str
    homes: tuple[Home, ...] = ()

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


def place(config: Config, clients: int, cpus: float, gpus: float) -> Placement:
    """The workers for that many clients on a cluster of that many CPUs and GPUs.

    Raises ConfigError, with the arithmetic, for an ask that can never be placed.
    """
    asked = config.worker
    each = asked.gpus if asked.gpus is not None else (1.0 if gpus else 0.0)
    if config.engine == "inline":
        if each > gpus:
            raise ConfigError(f"worker.gpus {each:g} is more than the {gpus:g} GPUs there are: lower it")
        threads = asked.cpus or max(1, int(cpus))
        where = "the GPU" if each else f"{threads} CPU threads"
        return Placement(1, each, threads, f"inline: {clients} clients in turn, one process, {where}")
    cohort = min(config.federation.cohort or clients, clients)
    if asked.wait is not None:
        count, share = asked.count or cohort, asked.cpus or 1
        resources = _words(asked.gpus or 0.0, share)
        return Placement(
            count,
            asked.gpus or 0.0,
            share,
            f"{_workers(count)} of {resources}, waited for up to {asked.wait:g} s, {_turns(count, clients)}",
        )
    # One worker a client of the cohort while they fit; a client beyond that waits for its turn.
    room = int(gpus / each) if each else int(cpus / (asked.cpus or 1))
    count = asked.count or max(1, min(cohort, room))
    share = asked.cpus or max(1, int(cpus / count))
    if each and count * each > gpus:
        raise ConfigError(
            f"{count} workers x {each:g} GPUs = {count * each:g} GPUs, but there are {gpus:g}: lower worker.count or worker.gpus, or give worker.wait where machines are brought"
        )
    if count * share > cpus:
        raise ConfigError(
            f"{count} workers x {share} CPUs = {count * share} CPUs, but there are {cpus:g}: lower worker.count or worker.cpus, or give worker.wait where machines are brought"
        )
    resources = _words(each, share) + ("" if gpus else " (no GPU here)")
    return Placement(count, each, share, f"{_workers(count)} of {resources}, {_turns(count, clients)}")


def silos_of(config: Config) -> dict[tuple[tuple[str, str], ...], list[str]]:
    """The places of a siloed run: labels, as sorted pairs, and the clients that ask for them."""
    silos: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, client in config.clients.items():
        silos.setdefault(tuple(sorted(client.node_labels.items())), []).append(name)
    return silos


def place_silos(config: Config, nodes: Sequence[Node]) -> Placement:
    """The workers for clients that are kept to the nodes that have their labels: of every place (clients that ask for the same labels) as
    many as `worker.count`, or as fit, at most one a client.

    Raises ConfigError where no node has a client's labels, or those that have them are too small.
    """
    asked, silos = config.worker, silos_of(config)
    there = {labels: [n for n in nodes if matches(dict(labels), n.labels)] for labels in silos}
    if asked.wait is None:
        for labels, members in silos.items():
            if not there[labels]:
                raise ConfigError(
                    f"no node has the labels {said(dict(labels))} that clients.{members[0]}.node_labels asks for ({known(nodes)}): start one by `ray start --labels {said(dict(labels))}`, "
                    "or give worker.wait where machines are brought"
                )
    some_gpus = any(n.resources.get("GPU", 0.0) for found in there.values() for n in found)
    gpus = asked.gpus if asked.gpus is not None else (1.0 if some_gpus else 0.0)
    homes, cpus = _settle(config, silos, nodes, gpus, asked.cpus or 1), asked.cpus or 1
    if asked.cpus is None and asked.wait is None:  # the largest share that costs no worker
        for share in range(int(max(n.resources.get("CPU", 0.0) for n in nodes)), 1, -1):
            try:
                wider = _settle(config, silos, nodes, gpus, share)
            except ConfigError:
                continue
            if len(wider) == len(homes):
                homes, cpus = wider, share
                break
    reason = (
        f"{_workers(len(homes))} of {_words(gpus, cpus)} in {len(silos)} place{'s' if len(silos) > 1 else ''}: "
        + "; ".join(f"{', '.join(members)} on {said(dict(labels))}" for labels, members in silos.items())
    )
    return Placement(len(homes), gpus, cpus, reason, tuple(homes))


def _settle(
    config: Config, silos: Mapping[tuple, list[str]], nodes: Sequence[Node], gpus: float, cpus: int
) -> list[Home]:
    """A home for each worker; nodes that several places share are filled once. Raises ConfigError where a place has no room."""
    asked, left, homes = config.worker, list(nodes), []
    each = {"CPU": float(cpus)} | ({"GPU": gpus} if gpus else {})
    # The most particular labels first: they have the fewest nodes to choose from.
    for labels, members in sorted(silos.items(), key=lambda item: sum(matches(dict(item[0]), n.labels) for n in nodes)):
        count = min(asked.count or len(members), len(members))
        if asked.wait is None:
            own = [i for i, n in enumerate(left) if matches(dict(labels), n.labels)]
            room = sum(left[i].room(each) for i in own)
            if room < (count if asked.count else 1):
                have = " and ".join(f"{sum(left[i].resources.get(kind, 0.0) for i in own):g} {kind}s" for kind in each)
                raise ConfigError(
                    f"{_workers(count)} of {_words(gpus, cpus)} for {', '.join(members)} do not fit on the nodes with {said(dict(labels))}, where {have} are left: "
                    "lower worker.count, worker.gpus or worker.cpus"
                )
            count = min(count, room)
            for i, taken in zip(own, _dealt(count, [left[i].room(each) for i in own]), strict=True):
                left[i] = Node({k: v - taken * each.get(k, 0.0) for k, v in left[i].resources.items()}, left[i].labels)
        homes += [Home(dict(labels), tuple(members))] * count
    order = list(silos)
    return sorted(homes, key=lambda home: order.index(tuple(sorted(home.labels.items()))))


def _dealt(count: int, rooms: Sequence[int]) -> list[int]:
    """How many go where when the first are filled first."""
    taken = []
    for room in rooms:
        taken.append(min(room, count - sum(taken)))
    return taken


def matches(asked: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node has the labels, in Ray's own words for values: `a`, `!a`, `in(a,b)`, `!in(a,b)`."""

    def one(text: str, value: str | None) -> bool:
        positive, word = not text.startswith("!"), text.removeprefix("!")
        choices = (
            [v.strip() for v in word[3:-1].split(",")] if word.startswith("in(") and word.endswith(")") else [word]
        )
        return (value in choices) == positive

    return all(one(text, labels.get(key)) for key, text in asked.items())


def said(labels: Mapping[str, str]) -> str:
    """Labels as a person writes them."""
    return ",".join(f"{k}={v}" for k, v in labels.items())


def known(nodes: Sequence[Node]) -> str:
    """What labels there are, for a sentence."""
    own = sorted({f"{k}={v}" for n in nodes for k, v in n.labels.items() if not k.startswith("ray.io/")})
    return f"there are {', '.join(own)}" if own else f"{len(nodes)} node{'s' if len(nodes) != 1 else ''} without labels"


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


def _turns(count: int, clients: int) -> str:
    return "each client has its own" if count >= clients else f"serving {clients} clients in turn"


def _words(gpus: float, cpus: int) -> str:
    cpu = f"{cpus} CPU{'s' if cpus > 1 else ''}"
    return f"{gpus:g} GPU{'s' if gpus > 1 else ''} and {cpu}" if gpus else cpu
