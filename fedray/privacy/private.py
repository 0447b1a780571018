"""What makes one client's work private, as a value: the key that its noise comes from, and what the noise is for.

Apart from the training that uses it, so that the coordinator, which imports no model, can name it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedray.privacy.keys import Key, Stream, Withheld
from fedray.privacy.plan import Mechanism


@dataclass(frozen=True)
class Watch:
    """What an audit does at a sum that is noised. `before`: adds its canaries to the sum (fp64, by name) in place;
    `after`: is shown what became of it, divided by the expected count; `sampled`: is told how many examples are in it,
    of how many."""

    before: Callable[[Mapping[str, Tensor]], None]
    after: Callable[[Mapping[str, Tensor]], None]
    sampled: Callable[[int, int], None]


@dataclass(frozen=True)
class Private:
    """How a client's steps of a round are made private. `purpose`: what its random numbers are for; other inputs must
    have another. `rate`: each example's chance of being in a step. `watch`: an audit's, of each step's sum."""

    key: Key
    purpose: tuple[str | int, ...]
    rate: float
    mechanism: Mechanism
    watch: Watch | None = None

    def stream(self, kind: str, step: int) -> Stream:
        """The random numbers of one kind in one of the round's steps."""
        return self.key.stream(kind, *self.purpose, step)

    def of_other_rank(self) -> Private:
        """As another rank of the client may have it: the key stays with the first."""
        return replace(self, key=Withheld(), watch=None)


@dataclass(frozen=True)
class SketchNoise:
    """Of a private sketch: standard deviation (the sensitivity is 1), its numbers, and what the sum is divided by.
    `watch`: an audit's, of the sum."""

    deviation: float
    stream: Stream
    expected: float
    watch: Watch | None = None
