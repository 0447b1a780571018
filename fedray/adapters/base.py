"""What an adapter is: how one layer's update is parametrised by named factors, and the delta they mean.

Pure values over tensors. The module that computes a factored product inside a model is in `modules.py`, the layer
that PEFT puts it into in `peft_layer.py`, what ties it to a real model in `attach.py`, what writes it out in
`export.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedray.errors import ConfigError
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


def sketch_columns(layer: Layer, oversample: int) -> int:
    """q: how many columns a sketch of the layer's gradient has, so many beyond the rank where there is room."""
    return min(layer.rank + oversample, layer.m, layer.n)


def check_width(adapter: Adapter, layer: Layer) -> None:
    """Raises ConfigError for a rank that the layer has no room for."""
    width, room = adapter.width(layer.rank), min(layer.m, layer.n)
    if width > room:
        bases = f" ({width} columns in all)" if width > layer.rank else ""
        raise ConfigError(
            f"adapter.rank {layer.rank}{bases} is above the size of layer {layer.name} "
            f"({layer.m} x {layer.n}): at most {room * layer.rank // width}"
        )


@dataclass(frozen=True)
class Origin:
    """What an adapter's `started` factors are decomposed from before round 1: the `source` of a matrix for each layer
    (the base weights, or a gradient over so many `examples` of each client), and how a gradient's range is found:
    columns beyond the rank, and power iterations. `fedray/federation/start.py` has the sources."""

    source: str = "weights"
    examples: int = 0
    oversample: int = 0
    passes: int = 0


@dataclass(frozen=True)
class Adapter(ABC):
    """A parametrisation of the delta. Holds options, never tensors: every tensor is an argument.

    `trains`: the factors that train unless a method says otherwise. `pair`: the names (B, A) of two factors whose
    product the delta is linear in while the others rest (None where a single core trains). `started`: factors that
    come from the base weights or from gradients before round 1, not from the seed. `stacked`: the clients' factors
    are fewer numbers than their deltas' thin factors. `unpaired`: of an adapter without a pair,
    why methods that need one do not fit, and which does.
    """

    kind: ClassVar[str]
    trains: ClassVar[tuple[str, ...]]
    pair: ClassVar[tuple[str, str] | None] = None
    started: ClassVar[tuple[str, ...]] = ()
    stacked: ClassVar[bool] = False
    unpaired: ClassVar[str] = ""

    @classmethod
    def configured(cls, options: Mapping[str, Any], rslora: bool) -> Adapter:
        """The adapter with a config's `options`, those that are set.

        Raises ValueError, with the reason, for what does not go together.
        """
        return cls(**options)

    @property
    def origin(self) -> Origin:
        """Where the `started` factors come from."""
        return Origin()

    def scaling(self, rank: int, alpha: float, rslora: bool) -> float:
        """What the product is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return alpha / rank**0.5 if rslora else alpha / rank

    def alpha(self, rank: int) -> float:
        """The alpha of a config that names none."""
        return 16.0

    def width(self, rank: int) -> int:
        """The longest side that two layers' bases share; at most min(m, n). Raises ValueError for a rank that cannot
        be."""
        return rank

    def delta_columns(self, rank: int) -> int:
        """Columns of the thin factors of a delta: the largest rank it can have."""
        return rank

    @abstractmethod
    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Factor name -> shape. The number of trained values of a method follows from these."""

    @abstractmethod
    def draw(self, layer: Layer, seed: int) -> dict[str, Tensor]:
        """Fresh fp32 factors, all but the `started` ones, the same on every client for the same seed; the delta is
        zero."""

    def start(self, layer: Layer, weight: Tensor, seed: int) -> dict[str, Tensor]:
        """The `started` factors from the base weight W0 (m x n) alone."""
        return {}

    @abstractmethod
    def delta(self, layer: Layer, factors: Factors) -> LowRank:
        """The m x n update that the factors mean, scale included."""

    def mean_delta(
        self, layer: Layer, clients: Sequence[Factors], weights: Sequence[float], dtype: torch.dtype = torch.float64
    ) -> LowRank:
        """The ideal sum_i p_i delta(client_i) of fp64 factors, rounded once to `dtype`, in the fewest columns: one
        client's where the delta is linear in all that differs."""
        differ = [f for f in clients[0] if any(c[f] is not clients[0][f] for c in clients)]
        if len(differ) <= 1:
            mean: dict[str, Any] = {f: sum(w * c[f] for w, c in zip(weights, clients, strict=True)) for f in differ}
            return self.delta(layer, {**clients[0], **mean}).to(dtype)
        return LowRank.total((self.delta(layer, c) for c in clients), weights, dtype)

    def lift(self, layer: Layer, factors: Factors, inner: LowRank) -> LowRank:
        """The delta if the product of the `pair` were `inner`; linear in it. `factors`: those at rest."""
        raise NotImplementedError(f"{self.kind} has no pair")

    def averaging_error(
        self,
        layer: Layer,
        clients: Sequence[Factors],
        weights: Sequence[float],
        means: Factors,
        dtype: torch.dtype = torch.float64,
    ) -> LowRank:
        """sum_i p_i delta(client_i) - delta(means) of fp64 factors, rounded once to `dtype`."""
        terms = (self.delta(layer, factors) for factors in itertools.chain(clients, [means]))
        return LowRank.total(terms, [*weights, -1.0], dtype)

    def together(self, layer: Layer, factors: Factors, x_ctn: Tensor) -> Tensor:
        """The scale-free products of c clients, each applied to its own t inputs: c x t x n -> c x t x m. A factor has
        a first dimension c, or none where all clients share it. One client after the other unless an adapter knows
        better."""
        plain, shapes = dataclasses.replace(layer, scale=1.0), self.shapes(layer)
        outputs = []
        for i, x_tn in enumerate(x_ctn):
            own = {name: t if t.dim() == len(shapes[name]) else t[i] for name, t in factors.items()}
            delta = self.delta(plain, own)
            outputs.append(x_tn @ delta.A.T @ delta.B.T)
        return torch.stack(outputs)

    def module(self, layer: Layer) -> nn.Module | None:
        """The module that computes scale-free x -> product x, its parameters named as the factors; None for PEFT's
        own LoRA."""
        return None


def covariance(
    clients: Sequence[Factors],
    weights: Sequence[float],
    means: Factors,
    pair: tuple[str, str],
    dtype: torch.dtype = torch.float64,
) -> LowRank:
    """sum_i p_i B_i A_i - (sum_i p_i) Bbar Abar as sum_{i<k} p_i (B_i - Bbar)(A_i - A_k): the covariance of the
    factors, of which sum_i p_i (B_i - Bbar) = 0 takes away one client.

    (k - 1) r columns, and no cancellation of large terms, unlike the difference of the two sums.
    """
    (B, A), last = pair, clients[-1]
    if len(clients) == 1:
        return LowRank(last[B][:, :0], last[A][:0]).to(dtype)
    terms = (LowRank(c[B] - means[B], c[A] - last[A]) for c in itertools.islice(clients, len(clients) - 1))
    return LowRank.total(terms, weights[:-1], dtype)


def pad_to(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros after the last row and column up to a shape; the tensor itself when it has that shape."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    return torch.nn.functional.pad(
        tensor, [x for have, want in zip(tensor.shape[::-1], shape[::-1], strict=True) for x in (0, want - have)]
    )
