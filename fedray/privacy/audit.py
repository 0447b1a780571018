"""How much a mechanism really tells: a lower bound on its epsilon from one run with canaries (Steinke, Nasr,
Jagielski, NeurIPS 2023).

Each of m canaries is put in or left out by a fair coin before the run; afterwards an attacker who saw the result
guesses the coins it is surest of. A mechanism that is (epsilon, delta)-private for adding or removing one example
cannot let too many of the guesses be right; so many right guesses prove a larger epsilon. The bound is on the claim,
never a proof of privacy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binom


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely it is, at most, that so many of the guesses are right if the mechanism is (epsilon, delta)-private
    (theorem 5.2 there)."""
    chance = 1 / (1 + math.exp(-min(epsilon, 700.0)))
    missed = np.arange(1, right + 1)  # how many right guesses may be owed to the delta
    within = np.cumsum(binom.pmf(right - missed, guesses, chance)) / missed
    return float(min(1.0, binom.sf(right - 1, guesses, chance) + 2 * canaries * delta * within.max(initial=0.0)))


def lower_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that the guesses contradict with that confidence; 0 when they contradict none."""
    allowed, low, high = 1 - confidence, 0.0, 50.0
    if p_value(canaries, guesses, right, 0.0, delta) > allowed:
        return 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(canaries, guesses, right, middle, delta) <= allowed else (low, middle)
    return low


def audit(
    included: Sequence[bool], scores: Sequence[float], delta: float, share: float = 0.5, confidence: float = 0.95
) -> float:
    """Lower bound on epsilon from each canary's score, which is larger where it looks included: the attacker guesses
    "in" for the highest `share / 2` of the scores and "out" for the lowest, and passes on the rest."""
    count = max(1, int(len(scores) * share / 2))
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    right = sum(not included[i] for i in order[:count]) + sum(bool(included[i]) for i in order[-count:])
    return lower_bound(len(scores), 2 * count, right, delta, confidence)
