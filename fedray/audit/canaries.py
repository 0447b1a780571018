"""Canaries: their coins, the number of each one's own, when they are sampled, and what is seen of them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedray.audit.noise import NoiseSeen

Tensors = Mapping[str, Tensor]


class Canaries:
    """`count` of them, each in or out by a fair coin. Their places are drawn when the tensors are first seen; coins,
    places and samples come from the operating system's randomness. `noise`: of the sums that they were added to."""

    def __init__(self, count: int):
        self._generator = np.random.default_rng(secrets.randbits(128))
        self.included = self._generator.random(count) < 0.5
        self.scores = np.zeros(count)
        self.noise = NoiseSeen()
        self._places: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # by tensor: canaries, and the number of each

    def scatter(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Give each a number of its own among all the tensors' numbers. Raises ValueError where these are fewer."""
        if self._places:
            return
        sizes = {name: int(np.prod(shape)) for name, shape in sorted(shapes.items())}
        total = sum(sizes.values())
        if total < len(self.included):
            raise ValueError(f"{len(self.included)} canaries need as many numbers, and there are {total}")
        places = self._generator.choice(total, len(self.included), replace=False)
        offset = 0
        for name, size in sizes.items():
            here = np.flatnonzero((places >= offset) & (places < offset + size))
            if len(here):
                self._places[name] = (here, places[here] - offset)
            offset += size

    def spread(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Give each a number of its own in every tensor. Raises ValueError where a tensor has fewer."""
        for name, shape in sorted(shapes.items()):
            size, count = int(np.prod(shape)), len(self.included)
            if size < count:
                raise ValueError(f"{count} canaries need as many numbers in {name}, which has {size}")
            self._places[name] = (np.arange(count), self._generator.choice(size, count, replace=False))

    def sampled(self, rate: float) -> np.ndarray:
        """Who of those that are in is in a Poisson sample."""
        return self.included & (self._generator.random(len(self.included)) < rate)

    def add(self, tensors: Tensors, weight: float, who: np.ndarray) -> None:
        """Add to each tensor in place what these put into their numbers."""
        for name, (canaries, numbers) in self._places.items():
            chosen = torch.from_numpy(numbers[who[canaries]])
            tensors[name].view(-1)[chosen] += weight

    def see(self, tensors: Tensors, sign: float = 1.0) -> None:
        """Take what an attacker sees of their numbers."""
        for name, (canaries, numbers) in self._places.items():
            self.scores[canaries] += sign * tensors[name].reshape(-1).double().numpy()[numbers]
