"""How many others a client shares its secrets with and masks against (Bell et al., CCS 2020): all of them in a small
cohort, O(log n) of them in a large one.

Each client draws its neighbours itself, from its own key: a graph that all derive from what everyone has announced
could be tried out, by a coordinator with clients of its own, until it surrounds somebody. The coordinator sees the
graph before it says who dropped out, so what is bounded holds for whichever clients it drops.

Of n clients let c = `colluding` n work with the coordinator, and let n / 3 drop out. Each honest client draws k others
and any t of the k + 1 holders of its secrets (itself among them) open one. But for a probability of 2^-40 a session:

- no honest client drew t of the colluding ones, so no secret is opened without honest clients, and those open of each
  client one secret and never both (`rules`);
- whoever's own mask is opened has t - 1 - c' honest neighbours in the sum (c' colluding ones at most), and no group of
  fewer than n / 10 honest clients has that many within itself: what a coordinator learns is sums over n / 10 honest
  clients or more, whoever it drops. With drops that do not follow the graph it is one sum over all.

And but for 2^-30 every secret has t holders left when a third drops out. All by the hypergeometric distribution and
a sum over who and over groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

#: -log2 of the probability that a session protects less than it says, or does not open.
SECURITY, CORRECTNESS = 40, 30
DROPPED = 1 / 3
GROUP = 1 / 10
#: A sparser graph must spare at least this share of the neighbours of the complete one, whose promise is the simpler.
SPARSE = 1 / 3


@dataclass(frozen=True)
class Neighbours:
    """`drawn`: how many others each client draws; `needed`: how many holders open one of its secrets; `group`: the
    fewest honest clients whose sum a lying coordinator may learn. `complete`: every client has all others."""

    drawn: int
    needed: int
    group: int
    complete: bool


@cache
def neighbours(members: int, threshold: int, colluding: float) -> Neighbours:
    """For a cohort of so many, of whom `threshold` must stay. `colluding`: the share of clients that may work with the
    coordinator. The complete graph unless the bound is met by a third of it."""
    most = int(SPARSE * members)
    table = _Bounds(members, int(colluding * members))
    if table.needed(most) is None:
        return Neighbours(members - 1, threshold, threshold, True)
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if table.needed(middle) is not None else (middle + 1, high)
    needed = table.needed(high)
    assert needed is not None, "the upper end of the search meets the bound"
    return Neighbours(high, needed, math.ceil(GROUP * members), False)


class _Bounds:
    """What k of n clients drawn without replacement may hold. Logarithms are of base 2."""

    def __init__(self, members: int, colluding: int):
        self.members, self.colluding = members, colluding
        self._factorial = np.concatenate([[0.0], np.cumsum(np.log2(np.arange(1, members + 1)))])

    def _choose(self, n: int, k: np.ndarray | int) -> np.ndarray:
        return self._factorial[n] - self._factorial[k] - self._factorial[n - np.asarray(k)]

    def tail(self, marked: int, drawn: int, least: int) -> float:
        """log P[at least `least` of `drawn` others are among `marked` others]."""
        others = self.members - 1
        hits = np.arange(max(least, 0, drawn - others + marked), min(marked, drawn) + 1)
        if not len(hits):
            return -math.inf
        terms = self._choose(marked, hits) + self._choose(others - marked, drawn - hits) - self._choose(others, drawn)
        return float(terms.max() + np.log2(np.exp2(terms - terms.max()).sum()))

    def needed(self, drawn: int) -> int | None:
        """The holders that must open a secret; None where no number meets the bounds."""
        everyone = math.log2(self.members)
        # One bit for either of the two promises of security.
        corrupt = next(
            c for c in range(drawn + 1) if everyone + self.tail(self.colluding, drawn, c + 1) < -SECURITY - 1
        )
        dropped = int(DROPPED * self.members)
        gone = next(g for g in range(drawn + 1) if everyone + self.tail(dropped, drawn, g + 1) <= -CORRECTNESS)
        needed = drawn - gone
        return needed if needed - 1 > corrupt and self._no_group(drawn, needed - 1 - corrupt) else None

    def _no_group(self, drawn: int, within: int) -> bool:
        """Whether no small group has members who each drew `within` others of it."""
        total = 0.0
        for size in range(2, math.ceil(GROUP * self.members)):
            total += 2.0 ** min(
                0.0, float(self._choose(self.members, size)) + size * self.tail(size - 1, drawn, within)
            )
        return total <= 2.0 ** -(SECURITY + 1)
