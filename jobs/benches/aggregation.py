"""Aggregating from thin factors, against forming m x n first."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor

from benches.measure import table, threads, timed
from fedray.lowrank import LowRank


def aggregation(console: Console, m: int, n: int, clients: int, rank: int) -> None:
    """sum p_i B_i A_i reduced to rank r: from thin factors, against forming m x n first."""
    g = torch.Generator().manual_seed(0)
    # Clients start from the same factors and drift apart: a common part and a private one, as real updates have.
    common = LowRank(torch.randn(m, rank, generator=g), torch.randn(rank, n, generator=g))

    def drifted(tensor: Tensor) -> Tensor:
        return tensor + 0.2 * torch.randn(tensor.shape, generator=g)

    terms = [LowRank(drifted(common.B), drifted(common.A)) for _ in range(clients)]
    weights = [(i + 1) / sum(range(1, clients + 1)) for i in range(clients)]

    def dense() -> Tensor:
        total = torch.zeros(m, n)
        for term, weight in zip(terms, weights, strict=True):
            total.addmm_(term.B, term.A, alpha=weight)
        return total

    def full_svd() -> LowRank:
        U, S, Vt = torch.linalg.svd(dense(), full_matrices=False)
        return LowRank(U[:, :rank] * S[:rank], Vt[:rank])

    def randomised(niter: int) -> LowRank:
        U, S, V = torch.svd_lowrank(dense(), q=rank, niter=niter)
        return LowRank(U * S, V.T)

    ways = {
        "factored (fedray, fp64 inside)": timed(lambda: LowRank.sum(terms, weights).compress(rank), 9),
        "form m x n, svd_lowrank (default: 2)": timed(lambda: randomised(2), 5),
        "form m x n, svd_lowrank (references: 10)": timed(lambda: randomised(10), 5),
        "form m x n, full SVD": timed(full_svd, 1),
    }
    (factored, _), *_, (_, exact) = ways.values()
    shown = table(
        f"aggregate {clients} clients of rank {rank} at {m} x {n}, to rank {rank} ({threads()})",
        ("way", "median s", "times factored", "distance from the full SVD's result"),
    )
    for name, (seconds, result) in ways.items():
        gap = (result - exact).norm() / exact.norm()
        shown.add_row(name, f"{seconds:.4f}", f"{seconds / factored:.1f}", f"{gap:.1e}")
    console.print(shown)
