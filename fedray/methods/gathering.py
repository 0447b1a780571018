"""How a round's updates become a cohort: read once, in order, each folded into what is asked of all of them. They are
kept only where the method needs each (`Gathering.keeps`), so the memory of a mean does not grow with the cohort; those
that are kept of a large cohort stay as they came (`Complete`), and are looked at layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fedray.errors import RoundError
from fedray.lowrank import add_weighted
from fedray.methods.state import Cohort, Sketch, Spec, Tensors, Update, key

#: Up to so many columns of all clients together, every number about them is measured on the factors themselves.
GRAM_COLUMNS = 128
#: Gaussian vectors in the sketch of more: of one layer of rank 1 the relative standard error of a norm is 9 %, of more
#: less.
PROBES = 64
#: Of those vectors.
SEED = 0


class Complete(Mapping[str, Tensor]):
    """A client's factors: those that came, as they are given when they are asked for, and those that did not train."""

    def __init__(self, spec: Spec, start: Tensors, came: Tensors):
        self._spec, self._start, self._came = spec, start, came

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._came:
            return self._start[name]
        return self._spec.whole({name: self._came[name]})[name] if self._spec.ranks else self._came[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self._start), **dict.fromkeys(self._came)})

    def __len__(self) -> int:
        return len(self._start.keys() | self._came.keys())


@dataclass
class Gathering:
    """`starts`: a client's factors before it trained, complete. Of a large cohort, `keeps`: every update is kept;
    `ideal`: what tells sum p_i delta_i, the vectors' images under it or the means. `looks`: raise RoundError, naming
    the client, for a value that is not finite. Costs O(numbers) a client, with sketches PROBES times that."""

    spec: Spec
    starts: Callable[[str], Tensors]
    keeps: bool
    ideal: Literal["sketch", "means", "factors"]
    looks: bool

    def __post_init__(self) -> None:
        self._clients: list[str] = []
        self._weights: list[float] = []
        self._kept: list[Tensors] = []
        self._came: list[Tensors] = []  # as `_block`, as it came
        self._block: list[dict[str, Tensor]] = []
        self._sums: dict[str, Tensor] = {}
        self._images: dict[str, Tensor] = {}
        self._room: dict[tuple[str, torch.Size], Tensor] = {}
        self._dtype = torch.float32
        self._many = False

    def add(self, update: Update) -> None:
        """The next client's."""
        received = self.spec.whole(update.tensors) if self.spec.ranks else dict(update.tensors)
        self._clients.append(update.client)
        self._weights.append(update.weight)
        self._came.append(update.tensors)
        self._block.append(received)
        if len(self._block) * self._columns > GRAM_COLUMNS:
            self._many = True
            self._fold()

    @cached_property
    def _columns(self) -> int:
        """Of one client's delta in a layer, at most."""
        return max(self.spec.adapter.delta_columns(layer.rank) for layer in self.spec.layers)

    def _fold(self) -> None:
        """Add the block to the sums, and forget it where nobody needs it."""
        first = len(self._clients) - len(self._block)
        clients, weights = self._clients[first:], self._weights[first:]
        starts = [self.starts(client) for client in clients] if self._keeps or self._sketches else []
        complete = [{**start, **received} for start, received in zip(starts, self._block, strict=False)]
        self._sum(weights, complete)
        if self.looks and not all(math.isfinite(t.sum().item()) for t in self._sums.values()):
            for client, received in zip(clients, self._block, strict=True):  # what is not finite stays so in a sum
                check_finite(Update(client, 1.0, received))
        if self._keeps and self._many:
            self._kept += [Complete(self.spec, s, came) for s, came in zip(starts, self._came, strict=True)]
        elif self._keeps:
            self._kept += complete
        self._block, self._came = [], []

    @property
    def _keeps(self) -> bool:
        return self.keeps or not self._many

    @property
    def _sketches(self) -> bool:
        return self.ideal == "sketch" and self._many

    def _sum(self, weights: Sequence[float], complete: Sequence[Tensors]) -> None:
        if not self._sums:
            block = self._block[0]
            self._dtype = next(iter(block.values())).dtype
            self._sums = {n: torch.zeros(t.shape, dtype=torch.float64, device=t.device) for n, t in block.items()}
        sketched = self._sketch(complete, weights) if self._sketches else set()
        for name, total in self._sums.items():
            if name not in sketched:
                add_weighted(total, [received[name] for received in self._block], weights)

    def _sketch(self, block: Sequence[Tensors], weights: Sequence[float]) -> set[str]:
        """Of each layer, the images and the sums of the factors, whose names are returned: one conversion to fp64,
        which costs as much as either, serves both."""
        for layer in self.spec.layers:
            names = self._names[layer.name]
            for tensors, weight in zip(block, weights, strict=True):
                factors = {f: self._in_fp64(f, tensors[name]) for f, name in names.items()}
                for f, name in names.items():
                    if name in self._sums:
                        self._sums[name].add_(factors[f], alpha=weight)
                image = self.spec.adapter.delta(layer, factors).image(self._vectors[: layer.n])
                if layer.name in self._images:
                    self._images[layer.name].add_(image, alpha=weight)
                else:
                    self._images[layer.name] = image.mul_(weight)
        return self._sketched

    @cached_property
    def _names(self) -> dict[str, dict[str, str]]:
        """By layer and factor, the factor's name among an update's."""
        return {layer.name: {f: key(layer, f) for f in self.spec.names} for layer in self.spec.layers}

    @cached_property
    def _sketched(self) -> set[str]:
        return {name for of_layer in self._names.values() for name in of_layer.values()}

    def _in_fp64(self, factor: str, tensor: Tensor) -> Tensor:
        """In memory that the next client's is written over, which is why it is still in the cache."""
        room = self._room.get((factor, tensor.shape))
        if room is None:
            room = self._room[factor, tensor.shape] = torch.empty_like(tensor, dtype=torch.float64)
        return room.copy_(tensor)

    @cached_property
    def _vectors(self) -> Tensor:
        """One set for all layers: errors rest on the vectors' independence alone."""
        generator, widest = torch.Generator().manual_seed(SEED), max(layer.n for layer in self.spec.layers)
        return torch.randn(widest, PROBES, dtype=torch.float64, generator=generator)

    def cohort(self, start: Mapping[str, Tensor]) -> Cohort:
        """All of it; `start`: the global model's factors before the round. Raises RoundError where no update with a
        positive weight came."""
        if self._block:
            self._fold()
        if not self._clients or (total := math.fsum(self._weights)) <= 0:
            raise RoundError("a round needs at least one update with a positive weight")
        for summed in (*self._sums.values(), *self._images.values()):  # they are nobody else's
            summed /= total
        unrounded = dict(self._sums)
        means = {name: t.to(self._dtype) for name, t in {**start, **unrounded}.items()}
        sketch = Sketch(self._vectors, self._images) if self._images else None
        shares = tuple(weight / total for weight in self._weights)
        by_means = self._many and self.ideal == "means"
        return Cohort(tuple(self._clients), shares, tuple(self._kept), means, self._dtype, unrounded, sketch, by_means)


def checked(updates: Iterable[Update]) -> Iterator[Update]:
    """The same updates, each looked at as it comes (`check_finite`)."""
    for update in updates:
        check_finite(update)
        yield update


def check_finite(update: Update) -> None:
    """Raises RoundError, naming the client, for a value that is not finite."""
    for name, tensor in update.tensors.items():
        if not torch.isfinite(tensor).all():
            raise RoundError(
                f"client '{update.client}' sent a value that is not finite in {name}: lower its learning rate"
            )
