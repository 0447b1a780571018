"""The modules that compute factored products inside a model, and the PEFT layer that carries them.

PEFT's extension points: its enum of tuners is closed to other packages (`register_peft_method` wants a member of `PeftType`), but
`LoraConfig._register_custom_module` lets a config bring its own layer class. So each of our adapters is a LoRA layer whose `lora_A`
entry is the whole product: PEFT finds the targets, saves, loads, merges and unmerges it; a loader must register the class first
(`attach.lora_config`), because PEFT does not write it into adapter_config.json. Exports need no fedray: they are plain LoRA.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from fedray.adapters.base import Adapter, Layer
from fedray.lowrank import khatri_rao_columns, khatri_rao_rows


class CoreProduct(nn.Module):
    """x -> B C A x for a core C = blockdiag(s_h R_h): LoRA-SB with one block, RAVAN with several and scales.

    Only what the core needs is kept for the backward pass: A x, not x.
    """

    def __init__(self, A: str, B: str, core: str, shapes: dict[str, tuple[int, ...]], scales: str | None = None):
        super().__init__()
        self._names = (A, B, core, scales)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape) if name == scales else torch.zeros(shape)))

    def _core(self) -> Tensor:
        core, scales = getattr(self, self._names[2]), self._names[3]
        if core.ndim == 2:
            return core
        return torch.block_diag(*(core * getattr(self, scales)[:, None, None]))

    def forward(self, x: Tensor) -> Tensor:
        A, B = getattr(self, self._names[0]), getattr(self, self._names[1])
        linear = nn.functional.linear
        return linear(linear(linear(x.to(A.dtype), A), self._core()), B)

    def dense(self) -> Tensor:
        """The m x n product."""
        return getattr(self, self._names[1]) @ self._core() @ getattr(self, self._names[0])


class HadamardProduct(nn.Module):
    """x -> ((B1 A1) o (B2 A2)) x through the Khatri-Rao factors; m x n is never formed (METHODS.md 2.1)."""

    def __init__(self, A1: str, B1: str, A2: str, B2: str, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        self._names = (B1, A1, B2, A2)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return _KhatriRao.apply(x, *(getattr(self, name) for name in self._names))

    def dense(self) -> Tensor:
        """The m x n product."""
        B1, A1, B2, A2 = (getattr(self, name) for name in self._names)
        return (B1 @ A1) * (B2 @ A2)


class _KhatriRao(torch.autograd.Function):
    """y = Bkr (Akr x), T x n -> T x m. Bkr (m x r1 r2) and Akr (r1 r2 x n) live only inside a pass: kept for the backward pass
    are x as it came, the four factors, and h = Akr x (T x r1 r2)."""

    @staticmethod
    def forward(ctx, x: Tensor, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        h_tq = flat.to(A1.dtype) @ khatri_rao_columns(A1, A2).T
        ctx.save_for_backward(x, B1, A1, B2, A2, h_tq)
        return (h_tq @ khatri_rao_rows(B1, B2).T).reshape(*x.shape[:-1], B1.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, B1, A1, B2, A2, h_tq = ctx.saved_tensors
        need_x, need_B1, need_A1, need_B2, need_A2 = ctx.needs_input_grad
        dx = dB1 = dA1 = dB2 = dA2 = None
        g_tm = grad.reshape(-1, grad.shape[-1])
        r1, r2 = B1.shape[1], B2.shape[1]
        dh_tq = g_tm @ khatri_rao_rows(B1, B2)
        if need_B1 or need_B2:
            d_mpq = (g_tm.T @ h_tq).view(-1, r1, r2)
            dB1 = torch.bmm(d_mpq, B2[:, :, None]).squeeze(2) if need_B1 else None
            dB2 = torch.bmm(B1[:, None, :], d_mpq).squeeze(1) if need_B2 else None
            del d_mpq
        if need_A1 or need_A2:
            d_pqn = (dh_tq.T @ x.reshape(-1, x.shape[-1]).to(A1.dtype)).view(r1, r2, -1)
            dA1 = torch.stack([(d * A2).sum(0) for d in d_pqn]) if need_A1 else None
            dA2 = (d_pqn * A1[:, None]).sum(0) if need_A2 else None
            del d_pqn
        if need_x:
            dx = (dh_tq @ khatri_rao_columns(A1, A2)).reshape(x.shape).to(x.dtype)
        return dx, dB1, dA1, dB2, dA2


class FactoredLinear(LoraLinear):
    """PEFT's LoRA layer with `lora_A[NAME]` the whole product and no `lora_B`. Subclassed for an adapter by `peft_layer`."""

    adapter: Adapter

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config, **kwargs) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        weight = self.get_base_layer().weight
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)  # n x m; PEFT sets this for its own layers only
        self.scaling[adapter_name] = self.adapter.scaling(r, lora_alpha, config.use_rslora)
        layer = Layer("", self.out_features, self.in_features, r, self.scaling[adapter_name])
        self.lora_A[adapter_name] = self.adapter.module(layer).to(weight.device)
        del self.lora_B[adapter_name]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        delta = self.lora_A[adapter].dense() * self.scaling[adapter]
        return delta.T if self.fan_in_fan_out else delta

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters or self.merged:
            if self.merged and self.disable_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.lora_A:
                result = result + (self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]).to(result.dtype)
        return result


def peft_layer(adapter: Adapter) -> type[FactoredLinear]:
    """The layer class of an adapter, for `LoraConfig._register_custom_module`."""
    return type(f"{type(adapter).__name__}Linear", (FactoredLinear,), {"adapter": adapter})
