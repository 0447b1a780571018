"""The privacy plan of one client: everything that its (epsilon, delta) follows from, in one value that cannot be put
together wrongly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from fedray.privacy.accountant import Release, epsilon, rdp_epsilon

RELATION, SAMPLING = "add-or-remove-one", "poisson"
UNITS = ("example", "client")
#: Calibrated noise is above the least possible by at most this share.
PRECISION = 2e-3
#: Less noise than this is not looked for.
LEAST = 1e-2


@dataclass(frozen=True)
class Mechanism:
    """Gaussian noise of standard deviation `noise * clip` on a sum of gradients of norm `clip` at most, divided by
    `expected`."""

    clip: float
    noise: float
    expected: float


@dataclass(frozen=True)
class PrivacyPlan:
    """Gaussian noise of standard deviation `noise * clip` on a sum whose every term has norm `clip` at most.

    `unit`: what may be added or removed, one example (a sequence as the task cuts it) or one client with all it has.
    `rate`: the Poisson rate of a step; `expected`: how many units that is, the divisor of the sum. `steps`: of the
    whole run for a client that is in every cohort (example), or rounds (client). `before`: what else is released of
    the same data. `budget`: epsilon at `delta` that may not be passed; None: no limit. `discrete`: whether the
    noise is of whole numbers. Raises ValueError for what is no plan.
    """

    unit: str
    rate: float
    expected: float
    clip: float
    noise: float
    steps: int
    delta: float
    budget: float | None = None
    before: tuple[Release, ...] = ()
    discrete: bool = False
    relation: str = RELATION
    sampling: str = SAMPLING

    def __post_init__(self) -> None:
        if self.unit not in UNITS or self.relation != RELATION or self.sampling != SAMPLING:
            raise ValueError(f"a plan is for {' or '.join(UNITS)}, {RELATION} and {SAMPLING} sampling")
        positive = (self.clip, self.expected, 1.0 if self.budget is None else self.budget)
        if not (0 < self.delta < 1 and all(value > 0 for value in positive)):
            raise ValueError("delta lies between 0 and 1; clip, the expected batch and the budget are above 0")
        self.release(self.steps)

    def release(self, steps: int) -> Release:
        """So many of its steps as an event of the ledger."""
        return Release("training", self.noise, self.rate, steps, self.discrete)

    @property
    def epsilon(self) -> float:
        """Of the whole run and what came before it."""
        return epsilon([*self.before, self.release(self.steps)], self.delta)

    def signal_to_noise(self, numbers: int) -> float:
        """At best, for one step: the norm of a mean of clipped terms that all agree, over that of the noise in
        `numbers` coordinates. The noise of T steps and k clients grows as sqrt(T k), what agrees as T k."""
        return math.inf if self.noise == 0 else self.expected / (self.noise * math.sqrt(numbers))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrivacyPlan:
        return cls(**values | {"before": tuple(Release(**r) for r in values["before"])})


def calibrate(
    rate: float, steps: int, delta: float, budget: float, before: Iterable[Release] = (), discrete: bool = False
) -> float:
    """The least noise multiplier (within PRECISION, from above, and rounded up to five digits after the point) with
    which `steps` steps and `before` stay within the budget.

    Raises ValueError when `before` alone spends it.
    """
    return math.ceil(_calibrate(rate, steps, delta, budget, tuple(before), discrete) * 1e5) / 1e5


@lru_cache(maxsize=1024)
def _calibrate(
    rate: float, steps: int, delta: float, budget: float, before: tuple[Release, ...], discrete: bool
) -> float:
    def releases(noise: float) -> list[Release]:
        return [*before, Release("training", noise, rate, steps, discrete)]

    if before and epsilon(before, delta) >= budget:
        raise ValueError(
            f"what is released before training ({', '.join(sorted({r.what for r in before}))}) alone spends epsilon "
            f"{epsilon(before, delta):.3g} of {budget:g}: "
            "raise privacy.epsilon, or release less (privacy.count_noise, privacy.subspace_fraction)"
        )
    # The RDP bound is cheap and above the PRV's: the noise that it asks for is enough, and not far from the least.
    enough = _enough(lambda noise: rdp_epsilon(releases(noise), delta), budget)
    if math.isinf(enough):
        raise ValueError(f"no noise keeps {steps} steps at rate {rate:g} within epsilon {budget:g}: raise it")
    return _least(lambda noise: epsilon(releases(noise), delta), budget, enough)


def _enough(bound: Callable[[float], float], budget: float) -> float:
    """Noise within a hundredth, from above, of the least with which `bound` is within the budget; infinite where
    there is none."""
    high = 1.0
    while bound(high) > budget:
        high *= 2
        if high > 1e6:
            return math.inf
    low = high / 2
    while high > LEAST and bound(low) <= budget:
        low, high = low / 2, low
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if bound(middle) <= budget else (middle, high)
    return high


def _least(spent: Callable[[float], float], budget: float, high: float) -> float:
    """Noise within PRECISION, from above, of the least with which `spent` is within the budget. `high`: noise that is
    enough."""
    at_high, low = spent(high), high / 1.1
    while (at_low := spent(low)) <= budget:
        if low < LEAST:
            return low
        low, high, at_high = low / 1.3, low, at_low
    while high / low > 1 + PRECISION:
        # log epsilon is nearly straight in log noise: a secant's step, kept off both ends.
        share = math.log(budget / at_high) / math.log(at_low / at_high)
        middle = high * (low / high) ** min(0.9, max(0.1, share))
        at_middle = spent(middle)
        if at_middle <= budget:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return high


def default_delta(units: float) -> float:
    """A power of ten, at most a tenth of 1 / units."""
    return 10.0 ** math.floor(math.log10(0.1 / max(1.0, units)) + 1e-9)


def round_up(rate: float) -> float:
    """To two digits, at most 1: a rate that is sampled at and accounted for, and that few clients differ in."""
    if rate >= 1:
        return 1.0
    unit = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return min(1.0, float(f"{math.ceil(rate / unit - 1e-9) * unit:.2g}"))
