"""How many workers run, on what, and where: decided from the config and what the cluster has, and said in one
sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedray.config.sections import Config, WorkerSection
from fedray.errors import ConfigError

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: its resources and its labels, as Ray has them."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def room(self, each: Mapping[str, float]) -> int:
        """How many workers of that much fit."""
        return min(int(self.resources.get(kind, 0.0) / n + 1e-9) for kind, n in each.items())


@dataclass(frozen=True)
class Place:
    """What clients that share workers ask for: labels of a node, as sorted pairs, and what a worker is made of."""

    labels: Labels
    gpus: float | None
    ranks: int
    zero_stage: int


#: The places that clients ask for, with the clients.
Places = dict[Place, list[str]]


@dataclass(frozen=True)
class Seat:
    """Where one worker lives, whom it may serve (nobody in particular: anyone), and its ranks, of so many GPUs each."""

    labels: Mapping[str, str]
    clients: tuple[str, ...]
    gpus: float
    ranks: int
    zero_stage: int

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def config_of(self, config: Config) -> Config:
        """The run's config as it holds at this worker."""
        update = {"gpus": self.gpus, "ranks": self.ranks, "zero_stage": self.zero_stage}
        return config.model_copy(update={"worker": config.worker.model_copy(update=update)})


@dataclass(frozen=True)
class Placement:
    """The workers, each with its seat; every rank has `cpus` CPUs (threads). `reason` is for the person. `homes`: the
    seats, where clients are kept to some of them; empty where any worker may serve any client."""

    seats: tuple[Seat, ...]
    cpus: int
    reason: str

    @property
    def workers(self) -> int:
        return len(self.seats)

    @property
    def gpus(self) -> float:
        """The most that a rank has."""
        return max(seat.gpus for seat in self.seats)

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def homes(self) -> tuple[Seat, ...]:
        return self.seats if any(seat.clients for seat in self.seats) else ()


def _alike(worker: WorkerSection, count: int, gpus: float) -> tuple[Seat, ...]:
    """So many workers that serve anyone."""
    return (Seat({}, (), gpus, worker.ranks, worker.zero_stage),) * count


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
    return Placement(_alike(worker, 1, each), threads, f"inline: {clients} clients in turn, one process, {where}")


def _waited_for(worker: WorkerSection, clients: int, cohort: int, seconds: float) -> Placement:
    """Workers on machines that are still to be brought."""
    count, share, each = worker.count or cohort, worker.cpus or 1, worker.gpus or 0.0
    made = _words(each, share, worker.ranks)
    reason = f"{_workers(count)} of {made}, waited for up to {seconds:g} s, {_turns(count, clients)}"
    return Placement(_alike(worker, count, each), share, reason)


def _on_what_is_there(worker: WorkerSection, clients: int, cohort: int, cpus: float, gpus: float) -> Placement:
    """One worker a client of the cohort while they fit; a client beyond that waits for its turn."""
    each = _gpus_each(worker, gpus)
    count = worker.count or max(1, min(cohort, _room(worker, each, cpus, gpus)))
    share = worker.cpus or max(1, int(cpus / (count * worker.ranks)))
    ranks = f" x {worker.ranks} ranks" if worker.ranks > 1 else ""
    for kind, one, there in (("GPU", each, gpus), ("CPU", share, cpus)):
        if (needed := count * worker.ranks * one) > there:
            raise ConfigError(
                f"{count} workers{ranks} x {one:g} {kind}s = {needed:g} {kind}s, but there are {there:g}: lower "
                f"worker.count{', worker.ranks' if ranks else ''} or worker.{kind.lower()}s, or give worker.wait where "
                "machines are brought"
            )
    resources = _words(each, share, worker.ranks) + ("" if gpus else " (no GPU here)")
    reason = f"{_workers(count)} of {resources}, {_turns(count, clients)}"
    return Placement(_alike(worker, count, each), share, reason)


def _room(worker: WorkerSection, each: float, cpus: float, gpus: float) -> int:
    """How many workers fit, by GPUs where they have some, else by CPUs."""
    return int((gpus / each if each else cpus / (worker.cpus or 1)) / worker.ranks)


def _gpus_each(worker: WorkerSection, gpus: float) -> float:
    """A worker's GPUs: as the config says, else one where there are any."""
    if worker.gpus is not None:
        return worker.gpus
    return 1.0 if gpus else 0.0


def places_of(config: Config, clients: Sequence[str]) -> Places:
    """What these clients ask for, in their order."""
    places: Places = {}
    for name in clients:
        labels = config.clients[name].node_labels if name in config.clients else None
        worker = config.worker_of(name)
        place = Place(tuple(sorted((labels or {}).items())), worker.gpus, worker.ranks, worker.zero_stage)
        places.setdefault(place, []).append(name)
    return places


def place_apart(config: Config, nodes: Sequence[Node], clients: Sequence[str]) -> Placement:
    """The workers for clients that are kept to the nodes that have their labels, or whose workers are made
    differently: of every place (clients that ask for the same) as many as `worker.count`, or as fit, at most one a
    client.

    Raises ConfigError where no node has a client's labels, or those that have them are too small.
    """
    worker = config.worker
    asked = places_of(config, clients)
    there = {place: [n for n in nodes if matches(dict(place.labels), n.labels)] for place in asked}
    if worker.wait is None:
        _check_there(asked, there, nodes)
    most = max((n.resources.get("GPU", 0.0) for some in there.values() for n in some), default=0.0)
    places: Places = {}
    for place, members in asked.items():
        whole = replace(place, gpus=_gpus_each(config.worker_of(members[0]), most))
        places[whole] = places.get(whole, []) + members
    cpus = worker.cpus or 1
    seats = _settle(config, places, nodes, cpus)
    if worker.cpus is None and worker.wait is None:
        seats, cpus = _widest(config, places, nodes, seats)
    return Placement(tuple(seats), cpus, _reason(places, seats, cpus))


def _reason(places: Places, seats: Sequence[Seat], cpus: int) -> str:
    made = {_words(place.gpus or 0.0, cpus, place.ranks) for place in places}
    alike = f" of {made.pop()}" if len(made) == 1 else ""
    each = [
        f"{', '.join(members)} on {said(dict(place.labels)) or 'any node'}"
        + ("" if alike else f", of {_words(place.gpus or 0.0, cpus, place.ranks)}")
        for place, members in places.items()
    ]
    return f"{_workers(len(seats))}{alike} in {len(places)} place{'s' if len(places) > 1 else ''}: {'; '.join(each)}"


def _check_there(places: Places, there: Mapping[Place, list[Node]], nodes: Sequence[Node]) -> None:
    """Every place has a node."""
    for place, members in places.items():
        labels = place.labels
        if not there[place]:
            raise ConfigError(
                f"no node has the labels {said(dict(labels))} that clients.{members[0]}.node_labels asks "
                f"for ({known(nodes)}): start one by `ray start --labels {said(dict(labels))}`, "
                "or give worker.wait where machines are brought"
            )


def _widest(config: Config, places: Places, nodes: Sequence[Node], seats: list[Seat]) -> tuple[list[Seat], int]:
    """The largest share of CPUs that costs none of the workers that fit with one CPU each (`seats`)."""
    for share in range(int(max(n.resources.get("CPU", 0.0) for n in nodes)), 1, -1):
        try:
            wider = _settle(config, places, nodes, share)
        except ConfigError:
            continue
        if len(wider) == len(seats):
            return wider, share
    return seats, 1


def _settle(config: Config, places: Places, nodes: Sequence[Node], cpus: int) -> list[Seat]:
    """A seat for each worker, in the order of the places; nodes that several places share are filled once. Raises
    ConfigError where a place has no room."""
    cohort = config.federation.cohort or sum(map(len, places.values()))
    counts = {place: min(config.worker.count or cohort, cohort, len(members)) for place, members in places.items()}
    if config.worker.wait is None:
        # The most particular labels first: they have the fewest nodes to choose from. Then the largest.
        order = sorted(
            places, key=lambda place: (sum(matches(dict(place.labels), n.labels) for n in nodes), -_size(place))
        )
        left, taken = list(nodes), dict[Place, int]()
        for place in order:  # everyone's least before anyone's more
            least = counts[place] if config.worker.count else 1
            taken[place] = _take(left, place, cpus, least, least, ", ".join(places[place]))
        for place in order:
            taken[place] += _take(left, place, cpus, 0, counts[place] - taken[place], "")
        counts = taken
    return [
        Seat(dict(place.labels), tuple(members), place.gpus or 0.0, place.ranks, place.zero_stage)
        for place, members in places.items()
        for _ in range(counts[place])
    ]


def _size(place: Place) -> float:
    return place.ranks * max(place.gpus or 0.0, 1.0)


def _take(left: list[Node], place: Place, cpus: int, least: int, most: int, whose: str) -> int:
    """How many workers, at most `most`, found room for all their ranks on the nodes with the labels; `left` is what is
    left of all nodes afterwards. Raises ConfigError where not even `least` do."""
    each = {"CPU": float(cpus)} | ({"GPU": place.gpus} if place.gpus else {})
    fitting = [i for i, n in enumerate(left) if matches(dict(place.labels), n.labels)]
    rooms = [left[i].room(each) for i in fitting]
    if sum(rooms) // place.ranks < least:
        have = " and ".join(f"{sum(left[i].resources.get(kind, 0.0) for i in fitting):g} {kind}s" for kind in each)
        nodes = f"the nodes with {said(dict(place.labels))}" if place.labels else "the nodes"
        raise ConfigError(
            f"{_workers(most)} of {_words(place.gpus or 0.0, cpus, place.ranks)} for {whose} do not fit on {nodes}, "
            f"where {have} are left: lower worker.count, worker.gpus or worker.cpus"
            + (", or the ranks" if place.ranks > 1 else "")
        )
    count = min(most, sum(rooms) // place.ranks)
    for i, taken in zip(fitting, _dealt(count * place.ranks, rooms), strict=True):
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


def _words(gpus: float, cpus: int, ranks: int = 1) -> str:
    cpu = f"{cpus} CPU{'s' if cpus > 1 else ''}"
    one = f"{gpus:g} GPU{'s' if gpus > 1 else ''} and {cpu}" if gpus else cpu
    return one if ranks == 1 else f"{ranks} ranks of {one}"
