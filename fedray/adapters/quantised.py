"""A frozen base of few bits (QLoRA: Dettmers et al., NeurIPS 2023), and what is added to it: an update of the base
never goes into the bits, where most of it would be rounded away, but stays beside them, as two thin factors.

The bits and what they mean are bitsandbytes': nf4 in blocks of 64 with their scales quantised once more, or int8 by
rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedray.errors import ConfigError
from fedray.lowrank import LowRank


class QuantisedLinear(nn.Linear):
    """x -> x (W + B A)^T + b: W frozen in `kind` bits (nf4, int8), B A the base update. W is there whole only while it
    is multiplied with: what is kept for the backward pass are the bits."""

    def __init__(self, linear: nn.Linear, kind: str):
        import bitsandbytes.functional as bits  # the extra `fedray[quantised]`; it looks for GPUs when it is imported

        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        weight = linear.weight.detach().contiguous()
        self._state: Any
        if kind == "nf4":
            packed, self._state = bits.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        else:  # the kernels for int8 take fp16
            packed, self._state, _ = bits.int8_vectorwise_quant(weight.half(), threshold=0.0)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.update: LowRank | None = None

    def dense(self) -> Tensor:
        """W (m x n) as its bits mean it, in the dtype it had."""
        import bitsandbytes.functional as bits

        device = self.weight.device
        if torch.is_tensor(self._state):  # largest magnitudes of the rows
            self._state = self._state.to(device)
            return (self.weight.float() * (self._state[:, None] / 127)).to(self.dtype)
        self._state.to(device)
        dense: Tensor = bits.dequantize_4bit(self.weight.detach(), self._state)
        return dense.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _Product.apply(x, self)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if self.update is not None:
            inner = nn.functional.linear(x.to(self.update.A.dtype), self.update.A)
            y = y + nn.functional.linear(inner, self.update.B).to(y.dtype)
        return y


class _Product(torch.autograd.Function):
    """x -> x W^T. Only x has a gradient, which needs W, and not x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return x @ layer.dense().to(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope @ ctx.layer.dense().to(slope.dtype), None


def quantise(model: Any, kind: str, heads: Sequence[str] = ()) -> None:
    """Every linear layer of a plain model but those that make its outputs (`lm_head`, a classifier), and those that
    train whole (`heads`, their names' ends), in place, one by one."""
    for module in list(model.get_submodule(model.base_model_prefix).modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and name not in heads:
                setattr(module, name, QuantisedLinear(child, kind))


@torch.no_grad()
def dequantise(model: nn.Module) -> None:
    """Every quantised layer as a plain one of the weights that its bits mean, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, QuantisedLinear):
                plain = nn.Linear(child.in_features, child.out_features, bias=False, dtype=child.dtype)
                plain.weight.copy_(child.dense())
                plain.bias = child.bias
                setattr(module, name, plain)


class BaseUpdates:
    """Keeps base updates beside quantised weights. `layers`: the frozen layers under the adapters; `rank`: the most
    that is kept of an update, by its best approximation (Eckart-Young)."""

    def __init__(self, layers: Mapping[str, nn.Module], rank: int):
        """Raises ConfigError for a layer whose weights are not quantised."""
        self._layers = {name: layer for name, layer in layers.items() if isinstance(layer, QuantisedLinear)}
        self._rank = rank
        if plain := sorted(layers.keys() - self._layers.keys()):
            raise ConfigError(
                f"model.quantise leaves {plain[0]} as it is, and adapter.targets names it: leave it out of the targets"
            )

    @torch.no_grad()
    def write(self, totals: Mapping[str, LowRank]) -> float:
        """Each layer's update is `totals[layer]`, or none. Returns the Frobenius norm, over all layers, of what the
        rank cut off."""
        lost = 0.0
        for name, layer in self._layers.items():
            if (total := totals.get(name)) is None:
                layer.update = None
                continue
            kept = bounded(total, self._rank)
            if kept is not total:
                lost += (total.to(torch.float64) - kept.to(torch.float64)).norm() ** 2
            layer.update = kept.to(layer.weight.device, torch.float32)
        return lost**0.5


def bounded(update: LowRank, rank: int) -> LowRank:
    """What is kept of a base update: itself, or its best approximation of that rank."""
    return update if update.k <= rank else update.compress(rank)


def weight_of(layer: nn.Module) -> Tensor:
    """A frozen layer's weight as it works, fp32 on the CPU, without a base update that stays beside it."""
    weight = layer.dense() if isinstance(layer, QuantisedLinear) else layer.get_parameter("weight").detach()
    return weight.float().cpu()
