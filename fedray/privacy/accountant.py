"""How much a sequence of releases tells: (epsilon, delta) of composed Poisson-subsampled Gaussian mechanisms.

The neighbouring relation is add-or-remove-one throughout. Epsilon is opacus's PRV accountant (Gopi, Lee, Wutschitz,
NeurIPS 2021), its upper bound, and never more than its RDP accountant's (Mironov et al., 2019), which is an upper
bound too, and stands alone where the mesh of the other is too coarse.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

#: Above this the mesh of the PRV accountant outgrows memory, and the number means nothing anyway.
PRV_UP_TO = 200.0


@dataclass(frozen=True)
class Release:
    """`steps` Gaussian mechanisms of sensitivity 1 and standard deviation `noise`, each on a Poisson sample of `rate`.

    `what`: training, subspace, count, ... `discrete`: the noise is a sum of whole numbers (`privacy/discrete.py`), of
    which the RDP bound is proven. Raises ValueError for numbers that mean no mechanism.
    """

    what: str
    noise: float
    rate: float = 1.0
    steps: int = 1
    discrete: bool = False

    def __post_init__(self) -> None:
        if not (self.noise >= 0 and 0 < self.rate <= 1 and self.steps >= 0):
            raise ValueError(f"no mechanism has noise {self.noise}, rate {self.rate} and {self.steps} steps")


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """The epsilon of all of them together at `delta`, rounded up to six digits after the point; 0 for none, infinite
    where one has no noise.

    Rounded because sums in NumPy's libraries differ in the last bits from process to process, and a resumed run must
    say the same. Raises ValueError for a delta outside (0, 1).
    """
    releases = list(releases)
    bound = _rdp if any(release.discrete and release.steps for release in releases) else _epsilon
    value = bound(_history(releases, delta), delta)
    return math.ceil(value * 1e6 - 1e-3) / 1e6 if math.isfinite(value) else value


def rdp_epsilon(releases: Iterable[Release], delta: float) -> float:
    """The RDP accountant's bound alone: larger, and a hundred times cheaper."""
    return _rdp(_history(releases, delta), delta)


def rdp_curve(releases: Iterable[Release]) -> tuple[tuple[int, ...], np.ndarray]:
    """(orders, RDP of all of them together at each); infinite where one has no noise."""
    total = np.zeros(len(ORDERS))
    for release in releases:
        total = total + (
            release.steps * _curve(release.noise, release.rate)
            if release.noise > 0
            else math.inf
            if release.steps
            else 0.0
        )
    return ORDERS, total


_History = tuple[tuple[float, float, int], ...]


def merged(releases: Iterable[Release]) -> dict[tuple[float, float], int]:
    """Steps of each mechanism, which (noise, rate) stand for."""
    steps: dict[tuple[float, float], int] = {}
    for release in releases:
        if release.steps:
            steps[release.noise, release.rate] = steps.get((release.noise, release.rate), 0) + release.steps
    return steps


def _history(releases: Iterable[Release], delta: float) -> _History:
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, not at {delta}")
    return tuple(sorted((noise, rate, steps) for (noise, rate), steps in merged(releases).items()))


#: Orders of the RDP bound: whole ones, which cost a hundredth of fractional ones and bound as well.
ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)


@lru_cache(maxsize=4096)
def _curve(noise: float, rate: float) -> np.ndarray:
    """RDP of one step at each of ORDERS."""
    from opacus.accountants.analysis.rdp import compute_rdp  # two seconds, which runs without privacy do not pay

    return np.asarray(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=ORDERS))


def _rdp(history: _History, delta: float) -> float:
    if not history:
        return 0.0
    if any(noise == 0 for noise, _, _ in history):
        return math.inf
    from opacus.accountants.analysis.rdp import get_privacy_spent

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of orders at the end of the grid: the bound holds all the same
        return float(
            get_privacy_spent(
                orders=ORDERS, rdp=sum(steps * _curve(noise, rate) for noise, rate, steps in history), delta=delta
            )[0]
        )


@cache
def _prv() -> type:
    """Opacus's accountant, with the extent of its mesh (Gopi et al., remark 5.6) from RDP curves that are worked out
    once: they are nearly all of its time otherwise."""
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import Domain

    class PRV(PRVAccountant):
        def _get_domain(
            self, prvs: Sequence[Any], num_self_compositions: Sequence[int], eps_error: float, delta_error: float
        ) -> Domain:
            total = sum(num_self_compositions)
            extent = max(
                eps_error,
                _rdp(tuple(self.history), delta_error / 4),
                *(_rdp(((noise, rate, 1),), delta_error / (8 * total)) for noise, rate, _ in self.history),
            )
            mesh = eps_error / math.sqrt(total * math.log(12 / delta_error) / 2)
            return Domain.create_aligned(-extent - 3, extent + 3, mesh)

    return PRV


@lru_cache(maxsize=4096)
def _epsilon(history: _History, delta: float) -> float:
    bound = _rdp(history, delta)
    if bound == 0.0 or bound > PRV_UP_TO:
        return bound
    accountant = _prv()()
    accountant.history = list(history)
    try:
        with np.errstate(divide="ignore"):  # log 0 at the end of a mechanism's support, which opacus selects away
            return min(bound, float(accountant.get_epsilon(delta)))
    except RuntimeError:
        # With little noise much of a loss lies in one cell of the mesh, and opacus refuses a mean that is half a cell
        # off (`discretize`). Such an epsilon is tens at least, and its RDP bound true.
        return bound
