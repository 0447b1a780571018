"""Server optimizers (Reddi et al., ICLR 2021, arXiv 2003.00295; FedAvgM: Hsu et al., 2019, arXiv 1909.06335): a step
along the change that the mean of a linear method makes, instead of the mean itself. Algorithm 2 there, without bias
correction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedray.options import option


@dataclass(frozen=True)
class ServerOptimizer:
    """x <- x + lr m (`avgm`) or x + lr m / (sqrt(v) + tau) (`adam`, `yogi`), with d = mean - x the change of a round.

    m <- beta1 m + d for `avgm`, beta1 m + (1 - beta1) d otherwise; v starts at tau^2.
    """

    optimizer: Literal["avgm", "adam", "yogi"] = option(
        MISSING,
        "Step of FedAvgM, FedAdam or FedYogi along the mean's change, for methods whose aggregate is a mean "
        "(default: take the mean)",
    )
    lr: float = option(1.0, "Server optimizer: learning rate", gt=0)
    beta1: float = option(0.9, "Server optimizer: momentum", ge=0, lt=1)
    beta2: float = option(0.99, "Server optimizer, adam and yogi: decay of the second moment", ge=0, lt=1)
    tau: float = option(1e-3, "Server optimizer, adam and yogi: what is added to its root (default 1e-3)", gt=0)

    @classmethod
    def configured(cls, options: Mapping[str, Any]) -> ServerOptimizer:
        """The one that a config's `method.server_*` mean. Raises ValueError for those that do not go together."""
        if "optimizer" not in options:
            raise ValueError(f"method.server_{next(iter(options))} needs method.server_optimizer: avgm, adam or yogi")
        for name in ("beta2", "tau"):
            if options["optimizer"] == "avgm" and name in options:
                raise ValueError(
                    f"method.server_{name} belongs to server_optimizer adam and yogi, not to avgm: leave it out"
                )
        return cls(**options)

    def step(
        self, x: dict[str, Tensor], mean: dict[str, Tensor], memory: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The new values and the new moments (`m/NAME`, `v/NAME`, fp64) of the tensors that are given; other moments
        rest."""
        stepped, memory = {}, dict(memory)
        for name, old in x.items():
            d = mean[name] - old
            m = self.beta1 * memory.get(f"m/{name}", torch.zeros_like(d)) + (
                d if self.optimizer == "avgm" else (1 - self.beta1) * d
            )
            memory[f"m/{name}"] = m
            if self.optimizer == "avgm":
                stepped[name] = old + self.lr * m
                continue
            v, square = memory.get(f"v/{name}", torch.full_like(d, self.tau**2)), d.square()
            if self.optimizer == "adam":
                v = self.beta2 * v + (1 - self.beta2) * square
            else:
                v = v - (1 - self.beta2) * square * torch.sign(v - square)
            memory[f"v/{name}"] = v
            stepped[name] = old + self.lr * m / (v.sqrt() + self.tau)
        return stepped, memory
