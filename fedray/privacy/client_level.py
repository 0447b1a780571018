"""Client-level DP: each client's whole update is clipped at the client, the sum is noised at the coordinator (McMahan
et al., ICLR 2018).

The guarantee is against whoever sees the models, not against the coordinator: it adds the noise, and must be trusted
to (with `privacy.secure_aggregation` it sees only the sum before noise).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedray.privacy.keys import Stream

Tensors = Mapping[str, Tensor]

#: Learning rate of the clip's logarithm (Andrew et al., NeurIPS 2021).
CLIP_LR = 0.2

#: Name under which a client says whether its update was within the clip: HALF or -HALF, so that one client more or less
#: moves the sum by 1/2.
WITHIN, HALF = "(within the clip)", 0.5


def norm(update: Tensors) -> float:
    """Of all tensors together, in fp64."""
    return math.sqrt(math.fsum(t.double().square().sum().item() for t in update.values()))


def clipped(update: Tensors, clip: float) -> tuple[dict[str, Tensor], bool]:
    """The update (fp32) scaled down to norm `clip`, and whether it was within it. Raises FloatingPointError for what
    is not finite."""
    size = norm(update)
    if not math.isfinite(size):
        raise FloatingPointError("an update is not finite: lower federation.lr")
    within = size <= clip
    # A millionth below: what fp32 rounds up may not pass the clip.
    factor = 1.0 if within else clip * (1 - 1e-6) / size
    return {name: (t.double() * factor).float() for name, t in update.items()}, within


def bit_noise(noise: float, expected: float) -> float:
    """Standard deviation of the noise on the count of clients within the clip: a twentieth of the cohort, at least
    `noise`."""
    return max(expected / 20, noise)


def update_noise(noise: float, expected: float, adaptive: bool) -> float:
    """Noise multiplier on the updates' sum with which it and the count together are one mechanism of multiplier `noise`
    (Andrew et al., 2021, theorem 1; the count's sensitivity is 1/2)."""
    return (noise**-2 - (2 * bit_noise(noise, expected)) ** -2) ** -0.5 if adaptive else noise


def noised_mean(total: Tensors, deviation: float, expected: float, stream: Stream) -> dict[str, Tensor]:
    """(total + normals of that standard deviation) / expected, fp64, drawn in order of the names."""
    mean = {}
    for name in sorted(total):
        draw = stream.normals(total[name].numel()).reshape(total[name].shape)
        mean[name] = (total[name].double() + deviation * draw) / expected
    return mean


def next_clip(clip: float, quantile: float, within: float, noise: float, expected: float, stream: Stream) -> float:
    """The clip of the next round: moved so that the share of updates within it nears `quantile`. `within`: the sum of
    what the clients said under WITHIN, which is noised; `expected`: how many clients a cohort has."""
    share = (within + bit_noise(noise, expected) * stream.normals(1).item()) / expected + 0.5
    return clip * math.exp(-CLIP_LR * (share - quantile))


def zeros_like(reference: Tensors) -> dict[str, Tensor]:
    """The sum of no updates."""
    return {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in reference.items()}
