"""How many workers run, on what, and where: decided from the config and what the cluster has, and said in one
sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedray.config.sections import Config, WorkerSection
from fedray.errors import ConfigError

Labels = tuple[tuple[str, str], ...]
#: Labels, as sorted pairs, with the clients that are kept to the nodes that have them.
Silos = dict[Labels, list[str]]


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
    """`workers` actors of `gpus` GPUs and `cpus` CPUs (threads) each; `reason` is for the person. `homes`: one for
    each worker, where clients are kept to their own nodes; empty where any worker may serve any client."""

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

    Raises ConfigError, with the arithmetic, where the config wants what can never be placed.
    """
    cohort = min(config.federation.cohort or clients, clients)
    if config.engine == "inline":
        return _in_this_process(config.worker, clients, cpus, gpus)
    if config.worker.wait is not None:
        return _waited_for(config.worker, clients, cohort, config.worker.wait)
    return _on_what_is_there(config.worker, clients, cohort, cpus, gpus)


def _in_this_process(worker: WorkerSection, clients: int, cpus: float, gpus: float) -> Placement:
    each = _gpus_each(worker, gpus)
    if each > gpus:
        raise ConfigError(f"worker.gpus {each:g} is more than the {gpus:g} GPUs there are: lower it")
    threads = worker.cpus or max(1, int(cpus))
    where = "the GPU" if each else f"{threads} CPU threads"
    return Placement(1, each, threads, f"inline: {clients} clients in turn, one process, {where}")


def _waited_for(worker: WorkerSection, clients: int, cohort: int, seconds: float) -> Placement:
    """Workers on machines that are still to be brought."""
    count, share, each = worker.count or cohort, worker.cpus or 1, worker.gpus or 0.0
    reason = f"{_workers(count)} of {_words(each, share)}, waited for up to {seconds:g} s, {_turns(count, clients)}"
    return Placement(count, each, share, reason)


def _on_what_is_there(worker: WorkerSection, clients: int, cohort: int, cpus: float, gpus: float) -> Placement:
    """One worker a client of the cohort while they fit; a client beyond that waits for its turn."""
    each = _gpus_each(worker, gpus)
    count = worker.count or max(1, min(cohort, _room(worker, each, cpus, gpus)))
    share = worker.cpus or max(1, int(cpus / count))
    for kind, one, there in (("GPU", each, gpus), ("CPU", share, cpus)):
        if count * one > there:
            raise ConfigError(
                f"{count} workers x {one:g} {kind}s = {count * one:g} {kind}s, but there are {there:g}: "
                f"lower worker.count or worker.{kind.lower()}s, or give worker.wait where machines are brought"
            )
    resources = _words(each, share) + ("" if gpus else " (no GPU here)")
    return Placement(count, each, share, f"{_workers(count)} of {resources}, {_turns(count, clients)}")


def _room(worker: WorkerSection, each: float, cpus: float, gpus: float) -> int:
    """How many workers fit, by GPUs where they have some, else by CPUs."""
    return int(gpus / each) if each else int(cpus / (worker.cpus or 1))


def _gpus_each(worker: WorkerSection, gpus: float) -> float:
    """A worker's GPUs: as the config says, else one where there are any."""
    if worker.gpus is not None:
        return worker.gpus
    return 1.0 if gpus else 0.0


def silos_of(config: Config) -> Silos:
    """The places of a siloed run: labels, as sorted pairs, and the clients that ask for them."""
    silos: Silos = {}
    for name, client in config.clients.items():
        silos.setdefault(tuple(sorted((client.node_labels or {}).items())), []).append(name)
    return silos


def place_silos(config: Config, nodes: Sequence[Node]) -> Placement:
    """The workers for clients that are kept to the nodes that have their labels: of every place (clients that ask for
    the same labels) as many as `worker.count`, or as fit, at most one a client.

    Raises ConfigError where no node has a client's labels, or those that have them are too small.
    """
    worker, silos = config.worker, silos_of(config)
    there = {labels: [n for n in nodes if matches(dict(labels), n.labels)] for labels in silos}
    if worker.wait is None:
        _check_there(silos, there, nodes)
    gpus = _gpus_each(worker, max((n.resources.get("GPU", 0.0) for some in there.values() for n in some), default=0.0))
    cpus = worker.cpus or 1
    homes = _settle(config, silos, nodes, gpus, cpus)
    if worker.cpus is None and worker.wait is None:
        homes, cpus = _widest(config, silos, nodes, gpus, homes)
    reason = (
        f"{_workers(len(homes))} of {_words(gpus, cpus)} in {len(silos)} place{'s' if len(silos) > 1 else ''}: "
        + "; ".join(f"{', '.join(members)} on {said(dict(labels))}" for labels, members in silos.items())
    )
    return Placement(len(homes), gpus, cpus, reason, tuple(homes))


def _check_there(silos: Silos, there: Mapping[Labels, list[Node]], nodes: Sequence[Node]) -> None:
    """Every place has a node."""
    for labels, members in silos.items():
        if not there[labels]:
            raise ConfigError(
                f"no node has the labels {said(dict(labels))} that clients.{members[0]}.node_labels asks "
                f"for ({known(nodes)}): start one by `ray start --labels {said(dict(labels))}`, "
                "or give worker.wait where machines are brought"
            )


def _widest(
    config: Config, silos: Silos, nodes: Sequence[Node], gpus: float, homes: list[Home]
) -> tuple[list[Home], int]:
    """The largest share of CPUs that costs none of the workers that fit with one CPU each (`homes`)."""
    for share in range(int(max(n.resources.get("CPU", 0.0) for n in nodes)), 1, -1):
        try:
            wider = _settle(config, silos, nodes, gpus, share)
        except ConfigError:
            continue
        if len(wider) == len(homes):
            return wider, share
    return homes, 1


def _settle(config: Config, silos: Silos, nodes: Sequence[Node], gpus: float, cpus: int) -> list[Home]:
    """A home for each worker; nodes that several places share are filled once. Raises ConfigError where a place has
    no room."""
    left, homes = list(nodes), []
    each = {"CPU": float(cpus)} | ({"GPU": gpus} if gpus else {})
    # The most particular labels first: they have the fewest nodes to choose from.
    for labels, members in sorted(silos.items(), key=lambda item: sum(matches(dict(item[0]), n.labels) for n in nodes)):
        count = min(config.worker.count or len(members), len(members))
        if config.worker.wait is None:
            least = count if config.worker.count else 1
            count = _take(left, labels, each, least, count, f"of {_words(gpus, cpus)} for {', '.join(members)}")
        homes += [Home(dict(labels), tuple(members))] * count
    order = list(silos)
    return sorted(homes, key=lambda home: order.index(tuple(sorted(home.labels.items()))))


def _take(left: list[Node], labels: Labels, each: Mapping[str, float], least: int, most: int, whose: str) -> int:
    """How many workers, at most `most`, found room on the nodes with the labels; `left` is what is left of all nodes
    afterwards. Raises ConfigError where not even `least` do."""
    fitting = [i for i, n in enumerate(left) if matches(dict(labels), n.labels)]
    rooms = [left[i].room(each) for i in fitting]
    if sum(rooms) < least:
        have = " and ".join(f"{sum(left[i].resources.get(kind, 0.0) for i in fitting):g} {kind}s" for kind in each)
        raise ConfigError(
            f"{_workers(most)} {whose} do not fit on the nodes with {said(dict(labels))}, where {have} are left: "
            "lower worker.count, worker.gpus or worker.cpus"
        )
    count = min(most, sum(rooms))
    for i, taken in zip(fitting, _dealt(count, rooms), strict=True):
        left[i] = Node({k: v - taken * each.get(k, 0.0) for k, v in left[i].resources.items()}, left[i].labels)
    return count


def _dealt(count: int, rooms: Sequence[int]) -> list[int]:
    """How many go where when the first are filled first."""
    taken: list[int] = []
    for room in rooms:
        taken.append(min(room, count - sum(taken)))
    return taken


def matches(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node has the labels, in Ray's own words for values: `a`, `!a`, `in(a,b)`, `!in(a,b)`."""

    def one(text: str, value: str | None) -> bool:
        positive, word = not text.startswith("!"), text.removeprefix("!")
        choices = (
            [v.strip() for v in word[3:-1].split(",")] if word.startswith("in(") and word.endswith(")") else [word]
        )
        return (value in choices) == positive

    return all(one(text, labels.get(key)) for key, text in wanted.items())


def said(labels: Mapping[str, str]) -> str:
    """Labels as a person writes them."""
    return ",".join(f"{k}={v}" for k, v in labels.items())


def known(nodes: Sequence[Node]) -> str:
    """What labels there are, for a sentence."""
    given = sorted({f"{k}={v}" for n in nodes for k, v in n.labels.items() if not k.startswith("ray.io/")})
    return (
        f"there are {', '.join(given)}"
        if given
        else f"{len(nodes)} node{'s' if len(nodes) != 1 else ''} without labels"
    )


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


def _turns(count: int, clients: int) -> str:
    return "each client has its own" if count >= clients else f"serving {clients} clients in turn"


def _words(gpus: float, cpus: int) -> str:
    cpu = f"{cpus} CPU{'s' if cpus > 1 else ''}"
    return f"{gpus:g} GPU{'s' if gpus > 1 else ''} and {cpu}" if gpus else cpu
