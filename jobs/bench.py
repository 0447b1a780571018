"""What fedray's own parts cost, as ratios measured in one run, with medians.

    python jobs/bench.py                # both
    python jobs/bench.py aggregation    # factored against dense, 4096 x 4096, 10 clients, rank 16
    python jobs/bench.py step           # a DeepSpeed client step against the same loop in plain PyTorch

Times in seconds are this machine's; the ratios are what is claimed. Run it on a quiet machine.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from fedray.adapters import ADAPTERS
from fedray.config import from_dict, make_method
from fedray.lowrank import LowRank
from fedray.methods import Spec
from fedray.training.local import LocalTrainer


def timed(call, repeats: int) -> tuple[float, object]:
    """Median seconds of a call, and its last result."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def aggregation(console: Console, m: int, n: int, clients: int, rank: int) -> None:
    """sum p_i B_i A_i reduced to rank r: from thin factors, against forming m x n first."""
    g = torch.Generator().manual_seed(0)
    # Clients start from the same factors and drift apart: a common part and a private one, as real updates have.
    common = LowRank(torch.randn(m, rank, generator=g), torch.randn(rank, n, generator=g))

    def drifted(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.2 * torch.randn(tensor.shape, generator=g)

    terms = [LowRank(drifted(common.B), drifted(common.A)) for _ in range(clients)]
    weights = [(i + 1) / sum(range(1, clients + 1)) for i in range(clients)]

    def dense() -> torch.Tensor:
        total = torch.zeros(m, n)
        for term, weight in zip(terms, weights, strict=True):
            total.addmm_(term.B, term.A, alpha=weight)
        return total

    def full_svd():
        U, S, Vt = torch.linalg.svd(dense(), full_matrices=False)
        return LowRank(U[:, :rank] * S[:rank], Vt[:rank])

    def randomised(niter: int):
        U, S, V = torch.svd_lowrank(dense(), q=rank, niter=niter)
        return LowRank(U * S, V.T)

    factored, ours = timed(lambda: LowRank.sum(terms, weights).compress(rank), 9)
    quick, rough = timed(lambda: randomised(2), 5)
    lowrank, approximate = timed(lambda: randomised(10), 5)
    full, exact = timed(full_svd, 1)
    table = Table(title=f"aggregate {clients} clients of rank {rank} at {m} x {n}, to rank {rank} ({torch.get_num_threads()} CPU threads)")
    for column in ("way", "median s", "times factored", "distance from the full SVD's result"):
        table.add_column(column, justify="left" if column == "way" else "right")
    ways = (
        ("factored (fedray, fp64 inside)", factored, ours),
        ("form m x n, svd_lowrank (default: 2)", quick, rough),
        ("form m x n, svd_lowrank (references: 10)", lowrank, approximate),
        ("form m x n, full SVD", full, exact),
    )
    for name, seconds, result in ways:
        gap = (result - exact).norm() / exact.norm()
        table.add_row(name, f"{seconds:.4f}", f"{seconds / factored:.1f}", f"{gap:.1e}")
    console.print(table)


def step(console: Console, rounds: int) -> None:
    """A client's local step on the built-in model, engines in turn so that drift of the machine hits both alike."""
    trainers = {}
    for backend in ("torch", "deepspeed"):
        config = from_dict({"worker": {"backend": backend}, "engine": "inline", "federation": {"local_steps": 4, "batch_size": 8}})
        trainer = LocalTrainer(config, "cpu", torch.get_num_threads())
        method = make_method(config)
        state = method.init(Spec(ADAPTERS["lora"], trainer.layers, 0), trainer.describe()[1])
        trainers[backend] = (trainer, method.view(state.spec, state, None))
        trainer.train(trainers[backend][1], "xml", 0)  # warm
    seconds = {backend: [] for backend in trainers}
    ratios = []
    for round in range(1, rounds + 1):
        order = list(trainers) if round % 2 else list(trainers)[::-1]
        for backend in order:
            trainer, view = trainers[backend]
            seconds[backend].append(trainer.train(view, "xml", round, base_key="same").seconds / 4)
        ratios.append(seconds["deepspeed"][-1] / seconds["torch"][-1])
    table = Table(title=f"a client's step, built-in model, batch 8 x 256 ({torch.get_num_threads()} CPU threads, {rounds} rounds of 4 steps)")
    for column in ("engine", "median s a step", "times plain PyTorch (median of the rounds)"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    table.add_row("plain PyTorch", f"{statistics.median(seconds['torch']):.4f}", "1.00")
    table.add_row("DeepSpeed, ZeRO 0", f"{statistics.median(seconds['deepspeed']):.4f}", f"{statistics.median(ratios):.3f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("all", "aggregation", "step"), default="all")
    parser.add_argument("--size", type=int, default=4096, help="m = n of the aggregation")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the step benchmark")
    args = parser.parse_args()
    console = Console(width=130)
    if args.part != "step":
        aggregation(console, args.size, args.size, clients=10, rank=16)
    if args.part != "aggregation":
        step(console, args.rounds)


if __name__ == "__main__":
    main()
