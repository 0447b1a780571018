"""Noise of whole numbers, for sums whose members trust nobody: each adds its share inside the secure sum's ring, so
that the exact sum is never seen (distributed differential privacy).

A share is discrete Gaussian: P(x) proportional to exp(-x^2 / (2 s^2)) on the integers (Canonne, Kamath, Steinke,
NeurIPS 2020). A sum of m shares is not itself discrete Gaussian, but as near as no matter: adding it to a sum of
sensitivity D, both in steps of the ring, is 1/2 e^2-concentrated private with (Kairouz, Liu, Steinke, ICML 2021,
theorem 1)

    e <= D / (sqrt(m) s) + tau sqrt(d),   tau = 10 sum_{k=1}^{m-1} exp(-2 pi^2 s^2 k / (k + 1)),

so its RDP of order a is a e^2 / 2, which is that of Gaussian noise of standard deviation sqrt(m) s where tau is
nothing. `LEAST_SHARE` sees to that: from s = 10 on, tau is below 10 m exp(-9.8 s^2) < m 10^-424, which no fp64 holds.
"""

from __future__ import annotations

import math

import numpy as np

from fedray.privacy.keys import Stream

#: The least standard deviation of a share, in steps of the ring, with which tau is nothing.
LEAST_SHARE = 10.0

#: The most: 40 standard deviations are below 2^53, up to which fp64 has every whole number.
MOST_SHARE = 2.0**47

_BLOCK = 1 << 20  # numbers tried at a time


def share_of(deviation: float, members: int) -> float:
    """Standard deviation of each member's share of noise of `deviation` on their sum, both in steps of the ring. Raises
    ValueError where it is too little for whole numbers, or too much for those that fp64 draws and the ring holds."""
    share = deviation / math.sqrt(members)
    if not share >= LEAST_SHARE:
        raise ValueError(
            f"noise of {share:.3g} steps of the ring a client is too little for whole numbers, which need "
            f"{LEAST_SHARE:g}: raise privacy.clip"
        )
    if not share <= MOST_SHARE:
        raise ValueError(
            f"noise of {share:.3g} steps of the ring a client is more than fp64 draws whole numbers of, which is "
            f"{MOST_SHARE:.3g}: lower privacy.clip"
        )
    return share


def effective_noise(noise: float, planned: int, sent: int) -> float:
    """The noise multiplier on a sum of `sent` members whose shares were for `planned`: short by sqrt(sent / planned).
    More members than planned are none."""
    return noise * math.sqrt(min(sent, planned) / planned)


def integers(stream: Stream, deviation: float, count: int) -> np.ndarray:
    """int64 discrete Gaussians of that standard deviation, by rejection from the discrete Laplace distribution
    (Canonne, Kamath, Steinke, 2020, algorithm 3), with uniform numbers of 53 bits.

    Three in four are accepted where the deviation is large: the cost is linear in `count`.
    """
    made = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:
        tried = _accepted(stream, deviation, min(_BLOCK, int(1.5 * (count - done)) + 16))
        taken = tried[: count - done]
        made[done : done + len(taken)] = taken
        done += len(taken)
    return made


def _accepted(stream: Stream, deviation: float, tries: int) -> np.ndarray:
    scale = math.floor(deviation) + 1.0
    # floor(-t log U) is geometric: P(k) proportional to exp(-k / t).
    size = np.floor(-scale * np.log1p(-stream.uniforms(tries).numpy()))
    negative = stream.uniforms(tries).numpy() < 0.5
    accept = np.exp(-((size - deviation**2 / scale) ** 2) / (2 * deviation**2))
    keep = (stream.uniforms(tries).numpy() < accept) & ~(negative & (size == 0))  # 0 has one sign
    return np.where(negative, -size, size)[keep].astype(np.int64)
