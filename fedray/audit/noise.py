"""The noise and the samples of a run's sums, measured: an audit sees each sum before and after, and holds the
difference against the noise that was charged, and who was in it against the rate. Canaries prove little of a claim that
is large; missing noise shows here whatever is claimed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from scipy.stats import binomtest, chi2
from torch import Tensor

#: How seldom what is charged looks like less: noise, and samples of few.
BY_CHANCE, SAMPLE_BY_CHANCE = 1e-6, 1e-5
#: From how many standard deviations on a fourth moment, or a product of two sums' noise, is no chance.
FAR = 8.0


@dataclass
class NoiseSeen:
    """Over all numbers of all sums so far. `squares`, `fourths`: of the noise in charged standard deviations;
    `products`: of the noise of one sum with the next one's, and of how many numbers; `sampled`, `of`: how many were in
    the sums of how many that could be, at `rate`."""

    by_chance: float = BY_CHANCE
    squares: float = 0.0
    fourths: float = 0.0
    numbers: int = 0
    products: float = 0.0
    paired: int = 0
    sampled: int = 0
    of: int = 0
    rate: float = 1.0
    _last: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def see(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], expected: float, deviation: float) -> None:
        """A sum (any float dtype) and what it became, divided by `expected`; `deviation` was charged."""
        parts = [
            ((after[n].double() * expected - before[n].double()) / deviation).reshape(-1).cpu() for n in sorted(before)
        ]
        noise = torch.cat(parts)
        self.squares += noise.square().sum().item()
        self.fourths += noise.pow(4).sum().item()
        self.numbers += len(noise)
        if len(self._last) == len(noise):
            self.products += (noise @ self._last).item()
            self.paired += len(noise)
        self._last = noise

    def see_sample(self, sampled: int, of: int, rate: float) -> None:
        """How many were in a sum, of how many that could be, each with probability `rate`."""
        self.sampled, self.of, self.rate = self.sampled + sampled, self.of + of, rate

    @property
    def share(self) -> float:
        """The standard deviation that was seen, of the charged one; 1 where no sum was seen."""
        return math.sqrt(self.squares / self.numbers) if self.numbers else 1.0

    @property
    def enough(self) -> bool:
        """Whether normal numbers of the charged deviation may be as small as these: 1,000 of them are refuted from a
        tenth less on. Where no sum was seen nothing is refuted."""
        return not self.numbers or float(chi2.cdf(self.squares, self.numbers)) >= self.by_chance

    @property
    def even(self) -> bool:
        """Whether all of them may have one deviation: else many have less, which others make up for."""
        if self.numbers < 100 or not self.squares:
            return True
        kurtosis = self.fourths * self.numbers / self.squares**2
        return kurtosis - 3 < FAR * (24 / self.numbers) ** 0.5

    @property
    def fresh(self) -> bool:
        """Whether the noise of one sum may be independent of the last one's: else their difference has less."""
        return not self.paired or abs(self.products) < FAR * self.paired**0.5

    @property
    def fair(self) -> bool:
        """Whether samples at the charged rate may be as large as these."""
        if not self.of or self.rate >= 1:
            return True
        return bool(binomtest(self.sampled, self.of, self.rate, alternative="greater").pvalue >= SAMPLE_BY_CHANCE)

    def faults(self) -> list[str]:
        """What is not as it is charged, in words."""
        found = {
            "less noise than is charged": self.enough,
            "some numbers have less noise than others": self.even,
            "the noise of one sum is that of another": self.fresh,
            "samples are larger than their rate": self.fair,
        }
        return [words for words, holds in found.items() if not holds]
