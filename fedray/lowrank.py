"""The algebra everything rests on: matrices kept as thin factors, never formed.

Shapes: `m` rows, `n` columns, `k` the number of factor columns, `r` a target rank.
`B_mk` and `A_kn` hold the matrix B A. A sum of products is a concatenation of factors, so every federated aggregate
(a weighted sum of clients' updates) is exact before anything is compressed.

Tensors of the meta device have a shape and no numbers; all of it works on them too. Where numbers would decide a
shape the result is the largest that any numbers could give, and a norm is not a number (`math.nan`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Columns, for each singular value and more that are asked for, from which iterating is cheaper than two QRs.
KRYLOV_COLUMNS = 8
#: Vectors in a block beyond those that are asked for.
OVERSAMPLE = 8
#: Blocks in the basis at most: less than `KRYLOV_COLUMNS`, so that it never outgrows the matrix.
KRYLOV_STEPS = 7
#: Of the energy that the first values capture: what more of it is not worth a step.
SETTLED = 1e-13


@dataclass(frozen=True)
class LowRank:
    """The m x n matrix B A, with B (m x k) and A (k x n) of one floating dtype and device.

    Raises ValueError when the factors do not fit each other.
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"factors {tuple(self.B.shape)} and {tuple(self.A.shape)} do not form a product")

    @staticmethod
    def zeros(m: int, n: int, dtype: torch.dtype = torch.float32) -> LowRank:
        """The m x n zero matrix, with k = 0."""
        return LowRank(torch.zeros(m, 0, dtype=dtype), torch.zeros(0, n, dtype=dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix that is meant."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def k(self) -> int:
        """Number of factor columns: an upper bound on the rank."""
        return self.B.shape[1]

    def to(self, *args: Any, **kwargs: Any) -> LowRank:
        """Both factors through `Tensor.to`."""
        return LowRank(self.B.to(*args, **kwargs), self.A.to(*args, **kwargs))

    def __add__(self, other: LowRank) -> LowRank:
        if self.shape != other.shape:
            raise ValueError(f"cannot add {self.shape} and {other.shape}")
        return LowRank(torch.cat([self.B, other.B], 1), torch.cat([self.A, other.A], 0))

    def __mul__(self, factor: float) -> LowRank:
        if self.B.is_meta or factor == 1.0:
            return self
        return LowRank(self.B * factor, self.A)

    __rmul__ = __mul__

    def __neg__(self) -> LowRank:
        return self * -1.0

    def __sub__(self, other: LowRank) -> LowRank:
        return self + -other

    @staticmethod
    def sum(terms: Iterable[LowRank], weights: Iterable[float] | None = None) -> LowRank:
        """sum_i w_i M_i with one concatenation (m x sum k_i, sum k_i x n). Raises ValueError on an empty list."""
        terms = list(terms) if weights is None else [t * w for t, w in zip(terms, weights, strict=True)]
        if not terms:
            raise ValueError("a sum of no matrices has no shape")
        if len(terms) == 1:
            return terms[0]
        return LowRank(torch.cat([t.B for t in terms], 1), torch.cat([t.A for t in terms], 0))

    @staticmethod
    def total(terms: Iterable[LowRank], weights: Sequence[float], dtype: torch.dtype | None = None) -> LowRank:
        """sum_i w_i M_i, exact, in at most min(m, n) columns: one concatenation as `sum` where that has no more, else
        one dense matrix that each is added to, beside an identity; rounded once to `dtype`. `terms` may be made one by
        one: then the memory is two matrices, however many there are. O(m n) a column. Raises ValueError on an empty
        list."""
        terms = iter(terms)
        if (first := next(terms, None)) is None:
            raise ValueError("a sum of no matrices has no shape")
        every = itertools.chain([first], terms)
        if first.k * len(weights) <= min(first.shape) or first.B.is_meta:
            return _concatenated(every, weights, first, dtype or first.B.dtype).bounded()
        whole = torch.zeros(first.shape, dtype=torch.promote_types(first.B.dtype, first.A.dtype), device=first.B.device)
        for term, weight in zip(every, weights, strict=True):
            whole.addmm_(term.B, term.A, alpha=weight)
        return _beside_identity(whole if dtype is None else whole.to(dtype))

    def image(self, vectors: Tensor, weights: Tensor | None = None) -> Tensor:
        """The matrix times the vectors (n x p), m x p, in the vectors' dtype: factors of another one are converted a
        few columns at a time. `weights` (k): of the factors' columns, where they are of that dtype."""
        vectors = vectors.to(self.A.device)
        if self.B.dtype == vectors.dtype:
            thin_kp = self.A @ vectors
            return self.B @ (thin_kp if weights is None else thin_kp.mul_(weights[:, None]))
        image = vectors.new_zeros(self.B.shape[0], vectors.shape[1])
        for start in range(0, self.k, _COLUMNS):
            some = slice(start, start + _COLUMNS)
            image.addmm_(self.B[:, some].to(vectors.dtype), self.A[some].to(vectors.dtype) @ vectors)
        return image

    def _triangles(self) -> tuple[Tensor, Tensor]:
        """R of the thin QR of B and of A^T, in fp64: B A = Q_B (R_B R_A^T) Q_A^T."""
        return torch.linalg.qr(self.B.double(), mode="r").R, torch.linalg.qr(self.A.double().T, mode="r").R

    def norm(self, probes: int = 0) -> float:
        """Frobenius norm, in fp64. By Gram matrices, which is the fastest, to 1e-9 relative; where the terms cancel
        by more than three digits by QR, which stays accurate down to the rounding of the factors. With `probes`, a
        norm that is mere rounding (below 1e-6 of its terms) is only estimated, by that many Gaussian vectors:
        relative standard deviation at most sqrt(2 / probes), much cheaper."""
        if self.k == 0:
            return 0.0
        if self.B.is_meta:
            return math.nan
        B, A = self.B.double(), self.A.double()
        gram_B, gram_A = B.T @ B, A @ A.T
        square, size = (gram_B * gram_A).sum().item(), (gram_B.abs() * gram_A.abs()).sum().item()
        if square > 1e-6 * size:
            return square**0.5
        if probes:
            generator = torch.Generator().manual_seed(0)
            test = torch.randn(A.shape[1], probes, dtype=torch.float64, generator=generator).to(A.device)
            estimate = torch.linalg.matrix_norm(B @ (A @ test)).item() / probes**0.5
            if estimate**2 < 1e-12 * size:
                return estimate
        R_B, R_A = self._triangles()
        return torch.linalg.matrix_norm(R_B @ R_A.T).item()

    def inner(self, other: LowRank) -> float:
        """Frobenius inner product <M, N> = sum of (B_M^T B_N) * (A_M A_N^T), in fp64: O((m + n) k_M k_N)."""
        left = self.B.double().T @ other.B.double()
        right = self.A.double() @ other.A.double().T
        return (left * right).sum().item()

    def svd(self, rank: int | None = None, tolerance: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """U (m x p), S (p, descending), Vt (p x n) in fp64, with p = min(k, m, n, rank).

        Singular values at or below `tolerance` times the largest are left out. QR of both sides, then the SVD of the
        small core, in O((m + n) k^2); m x n is never formed, and of each Q only its product with the p vectors that
        are kept. Where few are asked for of many columns (`KRYLOV_COLUMNS` times as many), by `_leading` instead,
        whose cost is linear in k.
        """
        if self.B.is_meta:
            return self._svd_shapes(rank)
        if rank is not None and tolerance == 0 and self.krylov(rank):
            return self._leading(rank)
        reflectors_B, R_B = _qr(self.B.double())
        reflectors_A, R_A = _qr(self.A.double().T)
        U, S, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        p = len(S) if rank is None else min(rank, len(S))
        if tolerance > 0 and len(S):
            p = min(p, int((tolerance * S[0] < S).sum()))
        return _apply_q(reflectors_B, U[:, :p]), S[:p], _apply_q(reflectors_A, Vt[:p].T).T

    def krylov(self, rank: int) -> bool:
        """Whether `svd` of that rank iterates."""
        return min(self.k, *self.shape) >= KRYLOV_COLUMNS * (rank + OVERSAMPLE)

    def _leading(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first singular triplets by block Krylov iteration (Musco and Musco, NeurIPS 2015, algorithm 2), with a
        basis that is orthogonal to rounding: O((m + n) k) a step.

        It ends once a step adds less than `SETTLED` of the energy captured, sum S_j^2, or after `KRYLOV_STEPS`. What
        U S V^T leaves of the matrix is then ||M||^2 - sum S_j^2, at most (1 + eps) of the least possible: eps is of
        the order of (log min(m, n) / steps)^2 where the spectrum is flat, and falls exponentially with the steps where
        S_r exceeds the values after it.
        """
        B, A, (m, n) = self.B.double(), self.A.double(), self.shape
        generator = torch.Generator().manual_seed(0)
        block = torch.randn(n, rank + OVERSAMPLE, dtype=torch.float64, generator=generator).to(A.device)
        basis, rows, captured = B.new_empty(m, 0), A.new_empty(0, n), 0.0
        for _ in range(KRYLOV_STEPS):
            new = _orthonormal(B @ (A @ block), basis)
            block = ((new.T @ B) @ A).T
            basis, rows = torch.cat([basis, new], 1), torch.cat([rows, block.T])
            before, captured = captured, torch.linalg.eigvalsh(rows @ rows.T)[-rank:].sum().item()
            if captured - before <= SETTLED * captured:
                break
        U, S, Vt = LowRank(torch.eye(len(rows), dtype=rows.dtype, device=rows.device), rows).svd()
        return basis @ U[:, :rank], S[:rank], Vt[:rank]

    def _svd_shapes(self, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """What `svd` gives on the meta device, which has no Householder reflectors; no singular value is small."""
        (m, n), p = self.shape, min(self.k, *self.shape)
        p = p if rank is None else min(rank, p)
        U_mp, S_p, Vt_pn = (torch.empty(size, dtype=torch.float64, device="meta") for size in ((m, p), (p,), (p, n)))
        return U_mp, S_p, Vt_pn

    def compress(self, rank: int | None = None, tolerance: float = 0.0) -> LowRank:
        """The best approximation of at most `rank` (Eckart-Young), in the input's dtype.

        Singular values at or below `tolerance` times the largest are dropped too. Singular values stay on B;
        A has orthonormal rows.
        """
        if self.k == 0:
            return self
        U, S, Vt = self.svd(rank, tolerance)
        return LowRank(U * S, Vt).to(self.B.dtype)

    def bounded(self) -> LowRank:
        """Itself while k <= min(m, n); else the dense matrix, summed in fp64, beside an identity: O(m n k), and memory
        stays below twice the dense matrix's."""
        m, n = self.shape
        if self.k <= min(m, n):
            return self
        return _beside_identity((self.B.double() @ self.A.double()).to(self.B.dtype))

    def dense(self) -> Tensor:
        """The m x n matrix itself, for tests and for writing into weights."""
        return self.B @ self.A


def _orthonormal(columns: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis (m x b) of what the columns (m x b) add to an orthonormal one (m x c); of nothing, any that
    is orthogonal to it. Twice, because once leaves rounding errors of what was taken away."""
    for _ in range(2):
        columns = torch.linalg.qr(columns - basis @ (basis.T @ columns)).Q
    return columns


def _concatenated(terms: Iterable[LowRank], weights: Sequence[float], like: LowRank, dtype: torch.dtype) -> LowRank:
    """As `sum`, each term written where it stays. There is room for as many columns each as the last one needed room
    for, so that nothing is moved where all have the same."""
    (m, n), at = like.shape, 0
    B, A = like.B.new_empty(m, 0, dtype=dtype), like.A.new_empty(0, n, dtype=dtype)
    for i, (term, weight) in enumerate(zip(terms, weights, strict=True)):
        end = at + term.k
        if end > B.shape[1]:
            room, old_B, old_A = at + term.k * (len(weights) - i), B, A
            B, A = B.new_empty(m, room), A.new_empty(room, n)
            B[:, :at], A[:at] = old_B[:, :at], old_A[:at]
        torch.mul(term.B, weight, out=B[:, at:end])
        A[at:end] = term.A
        at = end
    return LowRank(B[:, :at].contiguous(), A[:at])


def _beside_identity(whole: Tensor) -> LowRank:
    """A dense matrix as thin factors."""
    m, n = whole.shape
    identity = torch.eye(min(m, n), dtype=whole.dtype, device=whole.device)
    return LowRank(identity, whole) if m <= n else LowRank(whole, identity)


def squared_distances(matrices: Sequence[LowRank]) -> Tensor:
    """||M_i - M_j||_F^2 (k x k, fp64) of k matrices of one shape, by Gram matrices: O((m + n) K^2) for K columns.

    Good to about 1e-15 of ||M_i||^2 + ||M_j||^2, which is finer than factors of fp32 resolve their product; a large
    matrix takes nothing from the distances of the others.
    """
    B, A = [t.B.double() for t in matrices], [t.A.double() for t in matrices]
    inner = torch.zeros(len(matrices), len(matrices), dtype=torch.float64, device=B[0].device)
    for i in range(len(matrices)):  # a row of blocks at a time: all would be K^2 numbers
        products = (B[i].T @ torch.cat(B[i:], 1)) * (A[i] @ torch.cat(A[i:], 0).T)
        blocks = products.split([t.k for t in matrices[i:]], 1)
        inner[i, i:] = inner[i:, i] = torch.stack([block.sum() for block in blocks])
    squares = inner.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * inner).clamp(min=0)


_COLUMNS = 128
"""Columns at a time in `LowRank.image`."""
_CHUNK = 1 << 17
"""Numbers at a time in `weighted_sum`: the fp64 accumulator stays in a core's cache, so memory is read once and written
once."""


def add_weighted(total: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> None:
    """total += sum_i w_i T_i in place, in the order given; `total`: contiguous fp64, on their device."""
    if total.is_meta:
        return
    flat, sums = [t.reshape(-1) for t in tensors], total.view(-1)
    term = torch.empty(min(len(sums), _CHUNK), dtype=torch.float64, device=total.device)
    for start in range(0, len(sums), _CHUNK):
        part = sums[start : start + _CHUNK]
        for tensor, weight in zip(flat, weights, strict=True):
            part.add_(term[: len(part)].copy_(tensor[start : start + _CHUNK]), alpha=weight)


def weighted_sum(
    tensors: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype = torch.float64, out: Tensor | None = None
) -> Tensor:
    """sum_i w_i T_i of tensors of one shape, added in fp64 in the order given and rounded once to `dtype`; on their
    device.

    `out`: a contiguous tensor of that many numbers to write into (its dtype counts).
    """
    if tensors[0].is_meta:
        return torch.empty_like(tensors[0], dtype=dtype)
    flat = [t.reshape(-1) for t in tensors]
    size, device = flat[0].numel(), flat[0].device
    result = torch.empty(size, dtype=dtype, device=device) if out is None else out.view(-1)
    total = torch.empty(min(size, _CHUNK), dtype=torch.float64, device=device)
    term = torch.empty_like(total)
    for start in range(0, size, _CHUNK):
        count = min(_CHUNK, size - start)
        torch.mul(term[:count].copy_(flat[0][start : start + count]), weights[0], out=total[:count])
        for tensor, weight in zip(flat[1:], weights[1:], strict=True):
            total[:count].add_(term[:count].copy_(tensor[start : start + count]), alpha=weight)
        result[start : start + count].copy_(total[:count])
    return result.reshape(tensors[0].shape)


def columns_reaching(S: Tensor, energy: float) -> int:
    """How many of the first singular values it takes until their squares sum to `energy`: all, where they do not
    reach it."""
    if S.is_meta:
        return len(S)
    return min(len(S), int((S.square().cumsum(0) < energy).sum()) + 1)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in every number; without numbers, whether they are one tensor."""
    return one is other if one.is_meta else torch.equal(one, other)


def khatri_rao_rows(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise Khatri-Rao product: (m x p), (m x q) -> m x (p q), column p' q + q' is left[:, p'] * right[:, q'].
    Dimensions before those are broadcast."""
    return (left[..., :, None] * right[..., None, :]).flatten(-2)


def khatri_rao_columns(left: Tensor, right: Tensor) -> Tensor:
    """Column-wise Khatri-Rao product: (p x n), (q x n) -> (p q) x n, so that rows @ columns is the Hadamard product
    of the two matrices. Dimensions before those are broadcast."""
    return (left[..., :, None, :] * right[..., None, :, :]).flatten(-3, -2)


def top_svd(
    matrix: Tensor, rank: int, generator: torch.Generator, oversample: int = 16, iterations: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """U (m x rank), S, Vt (rank x n) of a dense matrix, fp32: exact up to 512 on the shorter side, beyond it a
    randomised range finder with power iterations (Halko, Martinsson, Tropp, 2011)."""
    matrix = matrix.float()
    if min(matrix.shape) <= 512:
        U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        sketch = torch.randn(matrix.shape[1], min(rank + oversample, *matrix.shape), generator=generator).to(
            matrix.device
        )
        Q = torch.linalg.qr(matrix @ sketch).Q
        for _ in range(iterations):
            Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q).Q).Q
        U, S, Vt = torch.linalg.svd((Q.T @ matrix).double(), full_matrices=False)
        U = Q.double() @ U
    return U[:, :rank].float(), S[:rank].float(), Vt[:rank].float()


def _qr(thin: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Q as Householder reflectors, and R."""
    packed, tau = torch.geqrf(thin)
    size = min(thin.shape)
    return (packed[:, :size], tau), packed[:size].triu()


def _apply_q(reflectors: tuple[Tensor, Tensor], vectors: Tensor) -> Tensor:
    """Q times the vectors, without forming Q."""
    packed, tau = reflectors
    padded = vectors.new_zeros(packed.shape[0], vectors.shape[1])
    padded[: vectors.shape[0]] = vectors
    return torch.ormqr(packed, tau, padded)


def total_norm(matrices: Iterable[LowRank]) -> float:
    """The Frobenius norm over all of them together."""
    return sum(m.norm() ** 2 for m in matrices) ** 0.5
