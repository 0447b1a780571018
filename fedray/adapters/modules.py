"""The modules that compute factored products inside a model: x -> (product) x, without the adapter's scale."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedray.lowrank import khatri_rao_columns, khatri_rao_rows


class Product(nn.Module, ABC):
    """Base of the products: what PEFT's merging and DP-SGD need beside `forward`. `_names`: its factors, None for one it lacks."""

    _names: tuple[str | None, ...]
    _seen: list | None = None

    def _factors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) if name else None for name in self._names)

    def remember(self, on: bool) -> None:
        """Keep the factors that a training pass saw for `sample_gradients`: ZeRO-3 has taken the parameters away again by then."""
        self._seen = [] if on else None

    def _remember(self) -> None:
        if self._seen is not None:
            self._seen.append([f.detach() if f is not None else None for f in self._factors()])

    @abstractmethod
    def dense(self) -> Tensor:
        """The m x n product."""

    def sample_gradients(self, x: Tensor, grad: Tensor) -> dict[nn.Parameter, Tensor]:
        """Each trained parameter's gradient for every sample apart (batch x its shape), from inputs x (batch x ... x n) and the
        gradient of the outputs (batch x ... x m). Asked for once after each training pass."""
        parameters = self._factors()
        wanted = [p is not None and p.requires_grad for p in parameters]
        found = self._sample_gradients(x, grad, self._seen.pop(), wanted)
        return {p: g for p, g, asked in zip(parameters, found, wanted, strict=True) if asked}

    @abstractmethod
    def _sample_gradients(
        self, x: Tensor, grad: Tensor, factors: list[Tensor], wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """As many as factors, in their order; None is allowed where none is wanted."""


class CoreProduct(Product):
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
        self._remember()
        A, B = getattr(self, self._names[0]), getattr(self, self._names[1])
        linear = nn.functional.linear
        return linear(linear(linear(x.to(A.dtype), A), self._core()), B)

    def dense(self) -> Tensor:
        return getattr(self, self._names[1]) @ self._core() @ getattr(self, self._names[0])

    def _sample_gradients(
        self, x: Tensor, grad: Tensor, factors: list[Tensor], wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        A, B, core, scales = factors
        x_btn, g_btm = (
            x.reshape(len(x), -1, x.shape[-1]).to(A.dtype),
            grad.reshape(len(grad), -1, grad.shape[-1]).to(B.dtype),
        )
        heads = (1, *core.shape) if core.ndim == 2 else core.shape
        whole = core if core.ndim == 2 else torch.block_diag(*(core * scales[:, None, None]))
        u_btk, v_btk = x_btn @ A.T, g_btm @ B
        dA = (v_btk @ whole).mT @ x_btn if wanted[0] else None
        dB = g_btm.mT @ (u_btk @ whole.T) if wanted[1] else None
        if not (wanted[2] or wanted[3]):
            return dA, dB, None, None
        d_bhij = torch.einsum("bthi,bthj->bhij", v_btk.unflatten(-1, heads[:2]), u_btk.unflatten(-1, heads[:2]))
        if scales is None:
            return dA, dB, d_bhij.squeeze(1), None
        return dA, dB, d_bhij * scales[:, None, None], torch.einsum("bhij,hij->bh", d_bhij, core)


class HadamardProduct(Product):
    """x -> ((B1 A1) o (B2 A2)) x through the Khatri-Rao factors; m x n is never formed (METHODS.md 2.1)."""

    def __init__(self, A1: str, B1: str, A2: str, B2: str, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        self._names = (B1, A1, B2, A2)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> Tensor:
        self._remember()
        with torch.autocast(
            x.device.type, enabled=False
        ):  # fp32 inside, as the factors are; so is the gradient that comes back
            return _KhatriRao.apply(x, *(getattr(self, name) for name in self._names))

    def dense(self) -> Tensor:
        B1, A1, B2, A2 = (getattr(self, name) for name in self._names)
        return (B1 @ A1) * (B2 @ A2)

    def _sample_gradients(
        self, x: Tensor, grad: Tensor, factors: list[Tensor], wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        B1, A1, B2, A2 = factors
        x_btn, g_btm = (
            x.reshape(len(x), -1, x.shape[-1]).to(A1.dtype),
            grad.reshape(len(grad), -1, grad.shape[-1]).to(B1.dtype),
        )
        split, dB1, dA1, dB2, dA2 = (B1.shape[1], B2.shape[1]), None, None, None, None
        if wanted[0] or wanted[2]:
            d_bmpq = (g_btm.mT @ (x_btn @ khatri_rao_columns(A1, A2).T)).unflatten(2, split)
            dB1 = torch.einsum("bmpq,mq->bmp", d_bmpq, B2) if wanted[0] else None
            dB2 = torch.einsum("bmpq,mp->bmq", d_bmpq, B1) if wanted[2] else None
            del d_bmpq
        if wanted[1] or wanted[3]:
            d_bpqn = ((g_btm @ khatri_rao_rows(B1, B2)).mT @ x_btn).unflatten(1, split)
            dA1 = torch.einsum("bpqn,qn->bpn", d_bpqn, A2) if wanted[1] else None
            dA2 = torch.einsum("bpqn,pn->bqn", d_bpqn, A1) if wanted[3] else None
        return dB1, dA1, dB2, dA2


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
        g_tm = grad.reshape(-1, grad.shape[-1]).to(B1.dtype)
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
