"""Server optimizers (Reddi et al., ICLR 2021, arXiv 2003.00295; FedAvgM: Hsu et al., 2019, arXiv 1909.06335): a step
along the change that the mean of a linear method makes, instead of the mean itself. Algorithm 2 there, without bias
correction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ServerOptimizer:
    """x <- x + lr m (`avgm`) or x + lr m / (sqrt(v) + tau) (`adam`, `yogi`), with d = mean - x the change of a round.

    m <- beta1 m + d for `avgm`, beta1 m + (1 - beta1) d otherwise; v starts at tau^2.
    """

    kind: Literal["avgm", "adam", "yogi"]
    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def step(
        self, x: dict[str, Tensor], mean: dict[str, Tensor], memory: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The new values and the new moments (`m/NAME`, `v/NAME`, fp64) of the tensors that are given; other moments
        rest."""
        stepped, memory = {}, dict(memory)
        for name, old in x.items():
            d = mean[name] - old
            m = self.beta1 * memory.get(f"m/{name}", torch.zeros_like(d)) + (
                d if self.kind == "avgm" else (1 - self.beta1) * d
            )
            memory[f"m/{name}"] = m
            if self.kind == "avgm":
                stepped[name] = old + self.lr * m
                continue
            v, square = memory.get(f"v/{name}", torch.full_like(d, self.tau**2)), d.square()
            if self.kind == "adam":
                v = self.beta2 * v + (1 - self.beta2) * square
            else:
                v = v - (1 - self.beta2) * square * torch.sign(v - square)
            memory[f"v/{name}"] = v
            stepped[name] = old + self.lr * m / (v.sqrt() + self.tau)
        return stepped, memory
