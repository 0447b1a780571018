"""The modules that compute factored products inside a model: x -> (product) x, without the adapter's scale."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedray.lowrank import khatri_rao_columns, khatri_rao_rows


class Product(nn.Module, ABC):
    """Base of the products: what PEFT's merging and DP-SGD need beside `forward`. `names`: its factors, in order."""

    def __init__(self, names: tuple[str, ...], shapes: dict[str, tuple[int, ...]], ones: str | None = None):
        super().__init__()
        self._names = names
        self._seen: list[list[Tensor]] | None = None
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape) if name == ones else torch.zeros(shape)))

    def _factors(self) -> list[nn.Parameter]:
        return [getattr(self, name) for name in self._names]

    def remember(self, on: bool) -> None:
        """Keep the factors that a training pass saw for `sample_gradients`: ZeRO-3 has taken the parameters away
        again by then."""
        self._seen = [] if on else None

    def _remember(self) -> None:
        if self._seen is not None:
            self._seen.append([f.detach() for f in self._factors()])

    @abstractmethod
    def dense(self) -> Tensor:
        """The m x n product."""

    def sample_gradients(self, x: Tensor, grad: Tensor) -> dict[nn.Parameter, Tensor]:
        """Each trained parameter's gradient for every sample apart (batch x its shape), from inputs x (batch x ... x
        n) and the gradient of the outputs (batch x ... x m). To be called once after each training pass; raises
        RuntimeError where there was none."""
        if not self._seen:
            raise RuntimeError("no training pass was remembered whose gradients could be taken")
        parameters, factors = self._factors(), self._seen.pop()
        wanted = [p.requires_grad for p in parameters]
        x_btn = x.reshape(len(x), -1, x.shape[-1]).to(factors[0].dtype)
        g_btm = grad.reshape(len(grad), -1, grad.shape[-1]).to(factors[1].dtype)
        gradients = self._sample_gradients(x_btn, g_btm, factors, wanted)
        return {p: g for p, g, want in zip(parameters, gradients, wanted, strict=True) if want and g is not None}

    @abstractmethod
    def _sample_gradients(
        self, x_btn: Tensor, g_btm: Tensor, factors: list[Tensor], wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """As many as factors, in their order; None is allowed where none is wanted. `x_btn`, `g_btm`: inputs and
        gradients of outputs, in the factors' dtype."""


class CoreProduct(Product):
    """x -> B C A x for a core C = blockdiag(s_h R_h): LoRA-SB with one block, RAVAN with several and scales.

    Only what the core needs is kept for the backward pass: A x, not x.
    """

    def __init__(self, A: str, B: str, core: str, shapes: dict[str, tuple[int, ...]], scales: str | None = None):
        super().__init__((A, B, core) if scales is None else (A, B, core, scales), shapes, ones=scales)

    def forward(self, x: Tensor) -> Tensor:
        self._remember()
        A, B, *core = self._factors()
        linear = nn.functional.linear
        return linear(linear(linear(x.to(A.dtype), A), _whole(*core)), B)

    def dense(self) -> Tensor:
        A, B, *core = self._factors()
        return B @ _whole(*core) @ A

    def _sample_gradients(
        self, x_btn: Tensor, g_btm: Tensor, factors: list[Tensor], wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        A, B, *core = factors
        u_btk, v_btk = x_btn @ A.T, g_btm @ B
        dA = (v_btk @ _whole(*core)).mT @ x_btn if wanted[0] else None
        dB = g_btm.mT @ (u_btk @ _whole(*core).T) if wanted[1] else None
        return dA, dB, *(_core_gradients(u_btk, v_btk, *core) if any(wanted[2:]) else (None for _ in core))


def _whole(core: Tensor, scales: Tensor | None = None) -> Tensor:
    """blockdiag(s_h R_h) of R (h x r x r), or the core itself (r x r) where there is one block and no scale."""
    return core if scales is None else torch.block_diag(*(core * scales[:, None, None]))


def _core_gradients(u_btk: Tensor, v_btk: Tensor, core: Tensor, scales: Tensor | None = None) -> tuple[Tensor, ...]:
    """Gradients for every sample of the core, and of its scales where it has them, from u = A x and v = B^T dy."""
    heads = (1, *core.shape) if scales is None else core.shape
    d_bhij = torch.einsum("bthi,bthj->bhij", v_btk.unflatten(-1, heads[:2]), u_btk.unflatten(-1, heads[:2]))
    if scales is None:
        return (d_bhij.squeeze(1),)
    return d_bhij * scales[:, None, None], torch.einsum("bhij,hij->bh", d_bhij, core)


class HadamardProduct(Product):
    """x -> ((B1 A1) o (B2 A2)) x as Bkr (Akr x), through the Khatri-Rao factors; m x n is never formed."""

    def __init__(self, A1: str, B1: str, A2: str, B2: str, shapes: dict[str, tuple[int, ...]]):
        super().__init__((B1, A1, B2, A2), shapes)

    def forward(self, x: Tensor) -> Tensor:
        self._remember()
        # fp32 inside, as the factors are; so is the gradient that comes back
        with torch.autocast(x.device.type, enabled=False):
            product: Tensor = _KhatriRao.apply(x, *self._factors())
            return product

    def dense(self) -> Tensor:
        B1, A1, B2, A2 = self._factors()
        return (B1 @ A1) * (B2 @ A2)

    def _sample_gradients(
        self, x_btn: Tensor, g_btm: Tensor, factors: list[Tensor], wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        B1, A1, B2, A2 = factors
        dB1 = dB2 = dA1 = dA2 = None
        if wanted[0] or wanted[2]:
            h_btq = x_btn @ khatri_rao_columns(A1, A2).T
            dB1, dB2 = _columns_sample_gradients(g_btm, h_btq, B1, B2, (wanted[0], wanted[2]))
        if wanted[1] or wanted[3]:
            dh_btq = g_btm @ khatri_rao_rows(B1, B2)
            dA1, dA2 = _rows_sample_gradients(dh_btq, x_btn, A1, A2, (wanted[1], wanted[3]))
        return dB1, dA1, dB2, dA2


def _columns_sample_gradients(
    g_btm: Tensor, h_btq: Tensor, B1: Tensor, B2: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of B1 and B2 for every sample, from those of the outputs and h = Akr x."""
    d_bmpq = (g_btm.mT @ h_btq).unflatten(2, (B1.shape[1], B2.shape[1]))
    dB1 = torch.einsum("bmpq,mq->bmp", d_bmpq, B2) if wanted[0] else None
    dB2 = torch.einsum("bmpq,mp->bmq", d_bmpq, B1) if wanted[1] else None
    return dB1, dB2


def _rows_sample_gradients(
    dh_btq: Tensor, x_btn: Tensor, A1: Tensor, A2: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A1 and A2 for every sample, from those of h and the inputs."""
    d_bpqn = (dh_btq.mT @ x_btn).unflatten(1, (A1.shape[0], A2.shape[0]))
    dA1 = torch.einsum("bpqn,qn->bpn", d_bpqn, A2) if wanted[0] else None
    dA2 = torch.einsum("bpqn,pn->bqn", d_bpqn, A1) if wanted[1] else None
    return dA1, dA2


class _KhatriRao(torch.autograd.Function):
    """y = Bkr (Akr x), T x n -> T x m. Bkr (m x r1 r2) and Akr (r1 r2 x n) live only inside a pass: kept for the
    backward pass are x as it came, the four factors, and h = Akr x (T x r1 r2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        h_tq = flat.to(A1.dtype) @ khatri_rao_columns(A1, A2).T
        ctx.save_for_backward(x, B1, A1, B2, A2, h_tq)
        return (h_tq @ khatri_rao_rows(B1, B2).T).reshape(*x.shape[:-1], B1.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, B1, A1, B2, A2, h_tq = ctx.saved_tensors
        need_x, need_B1, need_A1, need_B2, need_A2 = ctx.needs_input_grad
        dx = dB1 = dA1 = dB2 = dA2 = None
        g_tm = grad.reshape(-1, grad.shape[-1]).to(B1.dtype)
        dh_tq = g_tm @ khatri_rao_rows(B1, B2)
        if need_B1 or need_B2:
            dB1, dB2 = _columns_gradients(g_tm, h_tq, B1, B2, (need_B1, need_B2))
        if need_A1 or need_A2:
            dA1, dA2 = _rows_gradients(dh_tq, x.reshape(-1, x.shape[-1]), A1, A2, (need_A1, need_A2))
        if need_x:
            dx = (dh_tq @ khatri_rao_columns(A1, A2)).reshape(x.shape).to(x.dtype)
        return dx, dB1, dA1, dB2, dA2


def _columns_gradients(
    g_tm: Tensor, h_tq: Tensor, B1: Tensor, B2: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of B1 and B2 from those of the outputs (T x m) and h = Akr x (T x r1 r2)."""
    d_mpq = (g_tm.T @ h_tq).view(-1, B1.shape[1], B2.shape[1])
    dB1 = torch.bmm(d_mpq, B2[:, :, None]).squeeze(2) if wanted[0] else None
    dB2 = torch.bmm(B1[:, None, :], d_mpq).squeeze(1) if wanted[1] else None
    return dB1, dB2


def _rows_gradients(
    dh_tq: Tensor, x_tn: Tensor, A1: Tensor, A2: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A1 and A2 from those of h (T x r1 r2) and the inputs (T x n)."""
    d_pqn = (dh_tq.T @ x_tn.to(A1.dtype)).view(A1.shape[0], A2.shape[0], -1)
    dA1 = torch.stack([(d * A2).sum(0) for d in d_pqn]) if wanted[0] else None
    dA2 = (d_pqn * A1[:, None]).sum(0) if wanted[1] else None
    return dA1, dA2


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter that ZeRO-3 may have partitioned."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
