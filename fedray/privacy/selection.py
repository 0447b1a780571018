"""Many runs on the same data: what all of them tell together, and what their best tells alone.

Every run of a sweep is a release. Whoever sees all of them, or a choice that was made among them, is told their
composition. One exception is known (Papernot and Steinke, ICLR 2022): when the number of runs is itself random, drawn
from a distribution with a long tail, the runs are alike but for hyperparameters drawn at random, and only the best
one is ever shown, that one tells little more than a single run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedray.privacy.accountant import Release, epsilon, rdp_curve
from fedray.privacy.keys import Stream

#: How the number of runs may be drawn.
STOPPING = ("geometric", "poisson")


def dominating(clients: Iterable[Sequence[Release]]) -> list[Release]:
    """Releases that tell at least as much as any of the clients' own: of each kind the highest rate, the least noise,
    the most steps.

    For an example that may be any client's, since runs deal the examples out differently.
    """
    most: dict[str, Release] = {}
    for releases in clients:
        total: dict[str, Release] = {}
        for release in releases:
            total[release.what] = _over(total[release.what], release, add=True) if release.what in total else release
        for what, release in total.items():
            most[what] = _over(most[what], release) if what in most else release
    return list(most.values())


def _over(one: Release, other: Release, add: bool = False) -> Release:
    steps = one.steps + other.steps if add else max(one.steps, other.steps)
    return Release(one.what, min(one.noise, other.noise), max(one.rate, other.rate), steps)


def composed(runs: Sequence[Mapping[str, Sequence[Release]]], delta: float, splits: Sequence[str]) -> dict[str, float]:
    """What all runs together have told of each client's data, epsilon at `delta`. `runs`: each one's releases by
    client; a run without privacy is given as a release without noise. `splits`: by run, a word for how it dealt the
    examples out: with one word for all, a client has the same examples in every run. Else there is one number, under
    ANY_CLIENT, that holds for every example: the largest over all clients that it may be dealt to, split by split;
    where those are more than MOST_WAYS, an upper bound of it."""
    if len(set(splits)) <= 1:
        return {client: epsilon(releases, delta) for client, releases in sorted(_by_client(runs).items())}
    by_split: dict[str, list[Mapping[str, Sequence[Release]]]] = {}
    for run, split in zip(runs, splits, strict=True):
        by_split.setdefault(split, []).append(run)
    different = [list({tuple(told): told for told in _by_client(of).values()}.values()) for of in by_split.values()]
    if math.prod(map(len, different)) > MOST_WAYS:
        return {ANY_CLIENT: epsilon([release for run in runs for release in dominating(run.values())], delta)}
    ways = (list(itertools.chain(*way)) for way in itertools.product(*different))
    return {ANY_CLIENT: max((epsilon(way, delta) for way in ways), default=0.0)}


def _by_client(runs: Iterable[Mapping[str, Sequence[Release]]]) -> dict[str, list[Release]]:
    """All that the runs have told of each client's data, one run after another."""
    together: dict[str, list[Release]] = {}
    for run in runs:
        for client, releases in run.items():
            together.setdefault(client, []).extend(releases)
    return together


#: So many ways of an example through the splits are gone through one by one.
MOST_WAYS = 64


ANY_CLIENT = "(any client)"


def draw_runs(stopping: str, expected: float, stream: Stream) -> int:
    """How many runs to make: `geometric` (stop after each with probability 1 / expected; at least one) or `poisson`
    (mean `expected`; may be none). Raises ValueError for another kind or mean."""
    _check(stopping, expected)
    u = stream.uniforms(1).item()
    if stopping == "geometric":
        return 1 if expected == 1 else 1 + int(math.log1p(-u) / math.log1p(-1 / expected))
    count, term, total = 0, math.exp(-expected), math.exp(-expected)
    while total <= u:
        count += 1
        term *= expected / count
        total += term
        if term == 0.0:
            break
    return count


def best_alone(releases: Sequence[Release], delta: float, stopping: str, expected: float) -> float:
    """Epsilon at `delta` of the best of so many runs, each with these releases, when no other is shown.

    Papernot and Steinke, theorem 2 with eta = 1 (geometric) and theorem 6 (poisson), over the orders of the RDP
    accountant. Infinite where a release has no noise. Raises ValueError as `draw_runs`.
    """
    _check(stopping, expected)
    orders, curve = rdp_curve(releases)
    if not all(math.isfinite(value) for value in curve):
        return math.inf
    least = math.inf
    if stopping == "geometric":
        # epsilon'(l) = epsilon(l) + 2 (1 - 1/h) epsilon(h) + 2 log(1/gamma) / h + log E[K] / (l - 1), for any order h.
        more = min(2 * (1 - 1 / h) * value + 2 * math.log(expected) / h for h, value in zip(orders, curve, strict=True))
        selected = [value + more + math.log(expected) / (order - 1) for order, value in zip(orders, curve, strict=True)]
    else:
        # epsilon'(l) = epsilon(l) + mu delta_l + log(mu) / (l - 1), where a run is (log(1 + 1/(l - 1)), delta_l)-DP.
        selected = [
            value
            + expected * _delta_at(orders, curve, math.log1p(1 / (order - 1)))
            + max(0.0, math.log(expected)) / (order - 1)
            for order, value in zip(orders, curve, strict=True)
        ]
    for order, value in zip(orders, selected, strict=True):  # Canonne, Kamath, Steinke (2020), proposition 12
        least = min(least, value + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return max(0.0, least)


def _delta_at(orders: Sequence[int], curve: np.ndarray, at: float) -> float:
    """The least delta for which the RDP curve gives (at, delta)-DP."""
    logs = [
        (order - 1) * (value - at + math.log1p(-1 / order)) - math.log(order)
        for order, value in zip(orders, curve, strict=True)
    ]
    return min(1.0, math.exp(min(0.0, *logs)))


def _check(stopping: str, expected: float) -> None:
    if stopping not in STOPPING:
        raise ValueError(f"the number of runs is drawn from {' or '.join(STOPPING)}, not {stopping}")
    if not 1 <= expected <= 500:
        raise ValueError(f"so many runs are not drawn: {expected:g}; have 1 to 500 on average")
