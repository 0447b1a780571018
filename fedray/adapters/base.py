"""What an adapter is: how one layer's update is parametrised by named factors, and the delta they mean.

Pure values over tensors. What ties them to a real model is in `attach.py`; what writes them out is in `export.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedray.lowrank import LowRank

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """One adapted matrix: W0 is `m` x `n` (out x in); the adapter has `rank` and multiplies its product by `scale`."""

    name: str
    m: int
    n: int
    rank: int
    scale: float


class Adapter(Protocol):
    """A parametrisation of the delta. Stateless: every tensor is an argument."""

    kind: str

    def shapes(self, layer: Layer) -> dict[str, tuple[int, int]]:
        """Factor name -> shape. The number of trained values of a method follows from these."""

    def draw(self, layer: Layer, seed: int) -> dict[str, Tensor]:
        """Fresh fp32 factors whose delta is zero, the same on every client for the same seed."""

    def delta(self, layer: Layer, factors: Factors) -> LowRank:
        """The m x n update that the factors mean, scale included."""

    def factors(self, layer: Layer, delta: LowRank) -> dict[str, Tensor]:
        """Factors whose delta is the given one. Raises ValueError when its k is above the layer's rank."""

    def averaging_error(self, layer: Layer, clients: Sequence[Factors], weights: Sequence[float], means: Factors) -> LowRank:
        """sum_i p_i delta(client_i) - delta(means), in the fewest columns that hold it exactly."""
