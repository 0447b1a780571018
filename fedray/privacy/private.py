"""What makes one client's work private, as a value: the key that its noise comes from, and what the noise is for.

Apart from the training that uses it, so that the coordinator, which imports no model, can name it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedray.privacy.keys import Key, Stream
from fedray.privacy.plan import Mechanism


@dataclass(frozen=True)
class Private:
    """How a client's steps of a round are made private. `purpose`: what its random numbers are for; other inputs must
    have another. `rate`: each example's chance of being in a step. `beside`: adds in place what an audit's canaries put
    into the sum of a step's clipped gradients, by name (fp64)."""

    key: Key
    purpose: tuple[str | int, ...]
    rate: float
    mechanism: Mechanism
    beside: Callable[[Mapping[str, Tensor]], None] | None = None


@dataclass(frozen=True)
class SketchNoise:
    """Of a private sketch: standard deviation (the sensitivity is 1), its numbers, and what the sum is divided by.
    `beside`: adds an audit's canaries to the sum; `seen`: is shown the answer."""

    deviation: float
    stream: Stream
    expected: float
    beside: Callable[[dict[str, Tensor]], None] | None = None
    seen: Callable[[Mapping[str, Tensor]], None] | None = None
