"""The noise of a run's sums, measured: an audit sees each sum before and after, and holds the difference against the
noise that was charged. Canaries prove little of a claim that is large; missing noise shows here whatever is claimed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.stats import chi2
from torch import Tensor

#: How seldom noise as large as charged looks too small.
BY_CHANCE = 1e-6


@dataclass
class NoiseSeen:
    """Over all numbers of all sums so far. `squares`: of the noise in charged standard deviations."""

    squares: float = 0.0
    numbers: int = 0

    def see(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], expected: float, deviation: float) -> None:
        """A sum (any float dtype) and what it became, divided by `expected`; `deviation` was charged."""
        for name, total in before.items():
            noise = (after[name].double() * expected - total.double()) / deviation
            self.squares += noise.square().sum().item()
            self.numbers += noise.numel()

    @property
    def share(self) -> float:
        """The standard deviation that was seen, of the charged one; 0 where no sum was seen."""
        return math.sqrt(self.squares / self.numbers) if self.numbers else 0.0

    @property
    def enough(self) -> bool:
        """Whether normal numbers of the charged deviation may be as small as these: 1,000 of them are refuted from a
        tenth less on. Where no sum was seen nothing is refuted."""
        return not self.numbers or float(chi2.cdf(self.squares, self.numbers)) >= BY_CHANCE
