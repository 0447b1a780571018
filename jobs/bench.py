"""What fedray's own parts cost, as ratios measured in one run, with medians.

    python jobs/bench.py                # all of it
    python jobs/bench.py aggregation    # factored against dense, 4096 x 4096, 10 clients, rank 16
    python jobs/bench.py step           # a DeepSpeed client step against the same loop in plain PyTorch
    python jobs/bench.py abba           # ABBA's memory and step against LoRA's at equal parameters, and LoHa's
    python jobs/bench.py privacy        # a DP-SGD step against the plain step, each adapter; what a secure sum costs a client
    python jobs/bench.py sharing        # what a sweep's trials on one machine share: tokenised data and base weights
    python jobs/bench.py model          # a whole Llama-3.2-1B: 10 clients of rank 16, every linear layer; --clients, --shape

Times in seconds are this machine's; the ratios are what is claimed. Run it on a quiet machine.
"""

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory says when it starts and stops

import torch
from rich.console import Console
from rich.table import Table

from fedray.adapters import ADAPTERS, attach
from fedray.config.build import make_method
from fedray.config.read import from_dict, read_config
from fedray.data.encoded import encode
from fedray.data.partition import load_data
from fedray.data.tasks import TASKS
from fedray.federation.wire import pack
from fedray.lowrank import LowRank
from fedray.methods import Spec
from fedray.privacy import secure_sum
from fedray.privacy.dpsgd import Mechanism, SampleHooks, private_step
from fedray.privacy.keys import Key
from fedray.training.engine import TorchEngine
from fedray.training.local import LocalTrainer
from fedray.training.model import load_model, load_tokenizer


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
    table = Table(
        title=f"aggregate {clients} clients of rank {rank} at {m} x {n}, to rank {rank} ({torch.get_num_threads()} CPU threads)"
    )
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
        config = from_dict(
            {"worker": {"backend": backend}, "engine": "inline", "federation": {"local_steps": 4, "batch_size": 8}}
        )
        trainer = LocalTrainer(config, "cpu", torch.get_num_threads())
        method = make_method(config)
        state = method.init(Spec(ADAPTERS["lora"](), trainer.layers, 0), trainer.describe()[1])
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
    table = Table(
        title=f"a client's step, built-in model, batch 8 x 256 ({torch.get_num_threads()} CPU threads, {rounds} rounds of 4 steps)"
    )
    for column in ("engine", "median s a step", "times plain PyTorch (median of the rounds)"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    table.add_row("plain PyTorch", f"{statistics.median(seconds['torch']):.4f}", "1.00")
    table.add_row(
        "DeepSpeed, ZeRO 0", f"{statistics.median(seconds['deepspeed']):.4f}", f"{statistics.median(ratios):.3f}"
    )
    console.print(table)


# --- ABBA ------------------------------------------------------------------------------------------------------


def peak_bytes(call, device: str) -> int:
    """The most bytes that PyTorch holds at one moment during a call, beyond what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for _, size in sorted(events, key=lambda e: e[0]):
        held += size
        most = max(most, held)
    return most


def encoder(kind: str, rank: int, hidden: int, layers: int):
    """A BERT of random weights with adapters on all linear layers of its encoder; LoHa is PEFT's own."""
    from peft import LoHaConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        intermediate_size=4 * hidden,
        vocab_size=1000,
    )
    model = BertForSequenceClassification(shape)
    targets = ("query", "key", "value", "dense")
    if kind == "loha":
        return get_peft_model(
            model, LoHaConfig(r=rank // 2, alpha=rank, target_modules=list(targets), exclude_modules="classifier")
        )
    method = {"lora-sb": "fed-sb", "ravan": "ravan"}.get(kind, "fedex")
    config = from_dict({"adapter": {"kind": kind, "rank": rank, "targets": targets}, "method": {"name": method}})
    return attach.attach(model, config.adapter, "classification")


def layer(kind: str, rank: int, width: int):
    """One width x width layer."""
    from peft import LoHaConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False))
    if kind == "loha":
        return get_peft_model(model, LoHaConfig(r=rank // 2, alpha=rank, target_modules=["0"]))
    section = from_dict({"adapter": {"kind": kind, "rank": rank}}).adapter
    config = attach.lora_config(section.model_copy(update={"targets": ("0",)}), "causal-lm")
    config.task_type = None
    return get_peft_model(model, config)


def abba(console: Console, repeats: int) -> None:
    """A training step (forward, backward, AdamW) of LoRA, ABBA and LoHa with the same number of parameters, in turn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = ("lora", "abba", "loha")
    cases = (
        ("BERT, 6 layers of 384, rank 8, 16 x 64 tokens", lambda kind: encoder(kind, 8, 384, 6), 16 * 64, None),
        ("one 4096 x 4096 layer, rank 32, 512 tokens", lambda kind: layer(kind, 32, 4096), 512, 4096),
    )
    for title, make, tokens, width in cases:
        models, steps = {}, {}
        for kind in kinds:
            model = models[kind] = make(kind).to(device)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
            if width is None:
                inputs = {
                    "input_ids": torch.randint(0, 1000, (16, 64), device=device),
                    "labels": torch.zeros(16, dtype=torch.long, device=device),
                }

                def step(model=model, optimizer=optimizer, inputs=inputs):
                    model(**inputs).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                x = torch.randn(tokens, width, device=device)

                def step(model=model, optimizer=optimizer, x=x):
                    model(x.requires_grad_()).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    x.grad = None

            steps[kind] = step
            step()
        seconds = {kind: [] for kind in kinds}
        for turn in range(repeats):
            for kind in kinds[turn % 3 :] + kinds[: turn % 3]:
                seconds[kind].append(timed_once(steps[kind], device))
        table = Table(title=f"{title}, {device} ({torch.get_num_threads()} CPU threads), {repeats} steps in turn")
        for column in (
            "adapter",
            "trained numbers",
            "median s a step",
            "times LoRA (median of turns)",
            "standing MiB",
            "peak MiB in a step",
            "times LoRA, all",
            "floor of its arithmetic",
        ):
            table.add_column(column, justify="left" if column == "adapter" else "right")
        standing = {
            k: sum(p.numel() * (p.element_size() + (12 if p.requires_grad else 0)) for p in m.parameters())
            for k, m in models.items()
        }
        peaks = {kind: peak_bytes(steps[kind], device) for kind in kinds}
        for kind in kinds:
            ratio = statistics.median(mine / lora for mine, lora in zip(seconds[kind], seconds["lora"], strict=True))
            # Multiply-adds a token: the frozen layer twice (forward, gradient of the input), thin factors of q columns three times each way.
            floor = "-"
            if width is not None:
                work = {"lora": 2 * width**2 + 3 * 32 * 2 * width, "abba": 2 * width**2 + 3 * 256 * 2 * width}
                floor = f"{work[kind] / work['lora']:.2f}" if kind in work else "-"
            table.add_row(
                kind,
                f"{sum(p.numel() for p in models[kind].parameters() if p.requires_grad):,}",
                f"{statistics.median(seconds[kind]):.4f}",
                f"{ratio:.2f}",
                f"{standing[kind] / 2**20:.1f}",
                f"{peaks[kind] / 2**20:.1f}",
                f"{(standing[kind] + peaks[kind]) / (standing['lora'] + peaks['lora']):.3f}",
                floor,
            )
        console.print(table)


# --- privacy ---------------------------------------------------------------------------------------------------


class Bare(TorchEngine):
    """A TorchEngine over a model that is not a run's."""

    def forward(self, inputs):
        return self.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits


def private(console: Console, repeats: int) -> None:
    """A DP-SGD step (per-sample gradients, clip, noise, optimizer) against the plain step on the same batch, in turn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    federation = from_dict({"federation": {"max_grad_norm": 1.0}}).federation
    batch = {
        "input_ids": torch.randint(0, 1000, (16, 64), device=device),
        "attention_mask": torch.ones(16, 64, dtype=torch.long, device=device),
        "labels": torch.zeros(16, dtype=torch.long, device=device),
    }
    key, mechanism = Key(bytes(32)), Mechanism(1.0, 1.0, 16.0)

    def losses(forward, inputs):
        return torch.nn.functional.cross_entropy(forward(inputs), inputs["labels"], reduction="none")

    table = Table(
        title=f"a step with DP-SGD, BERT of 6 layers of 384, all linear, rank 8, 16 x 64 tokens, {device} ({torch.get_num_threads()} CPU threads), {repeats} in turn"
    )
    for column in (
        "adapter",
        "trained numbers",
        "plain, median s",
        "DP-SGD, median s",
        "times plain (median of turns)",
        "plain, peak MiB",
        "DP-SGD, peak MiB",
        "times plain, all memory",
    ):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for kind in ("lora", "lora-sb", "abba", "ravan"):
        model, trains = encoder(kind, 8, 384, 6).to(device).train(), ADAPTERS[kind].trains
        for name, parameter in attach.factors(model).items():
            parameter.requires_grad_(name.rsplit(".", 1)[1] in trains)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        engine, seconds, turn = Bare(model, parameters, federation), {"plain": [], "private": []}, iter(range(10**9))

        def plain(engine=engine):
            engine.step([batch], lambda forward, inputs: losses(forward, inputs).mean(), 1e-4)

        plain()
        standing = sum(p.numel() * (p.element_size() + (12 if p.requires_grad else 0)) for p in model.parameters())
        peaks = {"plain": peak_bytes(plain, device)}
        hooks = SampleHooks(model)

        def noisy(engine=engine, hooks=hooks, turn=turn):
            private_step(engine, hooks, [batch], losses, 1e-4, mechanism, key.stream("noise", next(turn)), check=False)

        noisy()
        for i in range(repeats):
            for name, call in (
                (("plain", plain), ("private", noisy)) if i % 2 else (("private", noisy), ("plain", plain))
            ):
                seconds[name].append(timed_once(call, device))
        peaks["private"] = peak_bytes(noisy, device)
        ratio = statistics.median(
            mine / other for mine, other in zip(seconds["private"], seconds["plain"], strict=True)
        )
        table.add_row(
            kind,
            f"{sum(p.numel() for p in parameters.values()):,}",
            f"{statistics.median(seconds['plain']):.4f}",
            f"{statistics.median(seconds['private']):.4f}",
            f"{ratio:.3f}",
            f"{peaks['plain'] / 2**20:.1f}",
            f"{peaks['private'] / 2**20:.1f}",
            f"{(standing + peaks['private']) / (standing + peaks['plain']):.3f}",
        )
    console.print(table)


def secure(console: Console, repeats: int) -> None:
    """One client's work and bytes in a secure sum, against packing the same vector in the clear."""
    table = Table(title=f"a client in a secure sum ({torch.get_num_threads()} CPU threads, median of {repeats})")
    for column in (
        "clients",
        "numbers",
        "advertise and share, s",
        "mask, s",
        "reveal, s",
        "pack in the clear, s",
        "bytes up, times the clear",
        "coordinator, s (a third dropped)",
    ):
        table.add_column(column, justify="right")
    for members, numbers in ((10, 10_000), (10, 1_000_000), (31, 1_000_000)):
        names = [f"client {i}" for i in range(members)]
        keys = {name: Key(os.urandom(32)) for name in names}
        session = secure_sum.Session("bench", tuple(names), secure_sum.default_threshold(members))
        adverts = {name: secure_sum.advertise(keys[name], session) for name in names}
        values, mine = torch.randn(numbers, dtype=torch.float64), names[0]
        sharing, _ = timed(
            lambda: (secure_sum.advertise(keys[mine], session), secure_sum.share(keys[mine], mine, session, adverts)),
            repeats,
        )
        masking, _ = timed(
            lambda: secure_sum.mask(keys[mine], mine, session, adverts, secure_sum.encode(values.numpy(), members)),
            repeats,
        )
        sealed = {name: secure_sum.share(keys[name], name, session, adverts) for name in names}
        sent = names[: members - members // 3]
        told = {n: {o: sealed[o][n] for o in names} for n in sent}
        revealing, _ = timed(lambda: secure_sum.reveal(keys[mine], mine, session, adverts, told[mine], sent), repeats)  # noqa: B023
        revealed = {n: secure_sum.reveal(keys[n], n, session, adverts, told[n], sent) for n in sent}
        vectors = {
            n: secure_sum.mask(keys[n], n, session, adverts, secure_sum.encode(values.numpy(), members)) for n in sent
        }
        opening, total = timed(lambda: secure_sum.unmask(session, names, adverts, vectors, revealed), 1)  # noqa: B023
        assert abs(secure_sum.decode(total) - len(sent) * values.numpy()).max() < members * secure_sum.STEP
        packing, _ = timed(lambda: pack({"x": values}), repeats)  # noqa: B023
        up = (8 * numbers + secure_sum.overhead(members)[0]) / (4 * numbers)
        table.add_row(
            *(f"{v:,}" for v in (members, numbers)),
            *(f"{v:.4f}" for v in (sharing, masking, revealing, packing)),
            f"{up:.2f}",
            f"{opening:.3f}",
        )
    console.print(table)


def private_bytes() -> int:
    """Memory that is this process's alone and would have to be kept: written to, and no clean copy of a file's pages. Linux only."""
    with open("/proc/self/smaps_rollup") as file:
        return sum(1024 * int(line.split()[1]) for line in file if line.startswith("Private_Dirty:"))


def held(what: str, flags: list[str], folder: str) -> tuple[float, int, int]:
    """Seconds, growth of private memory, and (of weights) all bytes, of what a trial holds; to be called in a new process."""
    config = read_config(flags)
    data = load_data(config)
    task = TASKS[config.model.task](config, data, load_tokenizer(config))
    before, started, size = private_bytes(), time.perf_counter(), 0
    if what == "weights":
        kept = load_model(config, len(data.classes))
        size = sum(p.numel() * p.element_size() for p in kept.parameters())
        read = sum(p.sum().item() for p in kept.parameters())
    elif what == "lists":
        kept = [task.encode(rows) for rows in data.train.values()]
        read = None
    else:
        kept = [encode(task, rows, folder) for rows in data.train.values()]
        read = [packed.digest() for packed in kept]  # every page once
    seconds = time.perf_counter() - started
    grown = private_bytes() - before
    del kept, read
    return seconds, grown, size


def sharing(console: Console, flags: list[str]) -> None:
    """A trial's tokenised examples: made by it, or mapped from what another trial made; and the base weights, mapped from their own file.
    Each line in a new process."""
    config = read_config(flags)
    rows = sum(map(len, load_data(config).train.values()))
    table = Table(title=f"{rows:,} rows of {Path(config.data.source).name} for {Path(config.model.path).name}")
    for column in ("what a trial holds", "seconds", "private MiB", "of MiB"):
        table.add_column(column, justify="left" if column.startswith("what") else "right")
    lines = (
        ("its own examples, as lists", "lists"),
        ("examples, by the trial that leaves them", "file"),
        ("examples, mapped by every other trial", "file"),
        ("base weights, mapped", "weights"),
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, what in lines:
            with ProcessPoolExecutor(1, get_context("spawn")) as one:
                seconds, grown, size = one.submit(held, what, flags, folder).result()
            table.add_row(name, f"{seconds:.2f}", f"{grown / 2**20:.1f}", f"{size / 2**20:.1f}" if size else "")
    console.print(table)


def timed_once(call, device: str) -> float:
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


# --- a whole model ---------------------------------------------------------------------------------------------


def largest_allocation(call) -> int:
    """Bytes of the largest single tensor that a call makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return max((e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), default=0)


def whole_model(console: Console, shape: str, clients: int, rank: int) -> None:
    """One aggregation of every linear layer, as the coordinator does it: means, SVDs, base updates, and what was lost."""
    from fedray.config.build import make_spec
    from fedray.methods import Update
    from fedray.training.model import skeleton

    names = [f"client-{i}" for i in range(clients)]
    table = Table(
        title=f"{shape}, {clients} clients, rank {rank}, every linear layer ({torch.get_num_threads()} CPU threads)"
    )
    for column in (
        "method",
        "numbers a client",
        "aggregate s",
        "peak MiB",
        "over the updates' own",
        "largest tensor MiB",
        "largest m x n MiB",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name in ("fedit", "fedex", "fra", "flora", "fed-sb"):
        adapter = {"kind": "lora-sb" if name == "fed-sb" else "lora", "rank": rank}
        config = from_dict({"model": {"path": shape}, "adapter": adapter, "method": {"name": name}})
        from fedray.adapters import attach

        spec = make_spec(config, attach.layers(skeleton(config)), names)
        method, g = make_method(config), torch.Generator().manual_seed(0)
        start = {}
        for one in spec.layers if spec.adapter.started else ():
            start[f"{one.name}.sb_B"] = torch.linalg.qr(torch.randn(one.m, rank, generator=g)).Q
            start[f"{one.name}.sb_A"] = torch.linalg.qr(torch.randn(one.n, rank, generator=g)).Q.T.contiguous()
        state = method.init(spec, {}, start)
        view = method.view(spec, state, None)
        moved = [n for n in view.tensors if n.rsplit(".", 1)[1] in view.trained]
        updates = [
            Update(
                c, 1.0 + i, {n: view.tensors[n] + 0.01 * torch.randn(view.tensors[n].shape, generator=g) for n in moved}
            )
            for i, c in enumerate(names)
        ]
        own = sum(t.numel() * 4 for u in updates for t in u.tensors.values())
        seconds, _ = timed(lambda method=method, state=state, updates=updates: method.aggregate(state, updates), 3)
        peak = peak_bytes(lambda method=method, state=state, updates=updates: method.aggregate(state, updates), "cpu")
        largest = largest_allocation(
            lambda method=method, state=state, updates=updates: method.aggregate(state, updates)
        )
        dense = max(one.m * one.n * 4 for one in spec.layers)
        table.add_row(
            name,
            f"{own // 4 // clients:,}",
            f"{seconds:.2f}",
            f"{peak / 2**20:.0f}",
            f"{peak / own:.2f}",
            f"{largest / 2**20:.1f}",
            f"{dense / 2**20:.1f}",
        )
        assert largest < dense, f"{name} made a tensor of {largest} bytes: as large as m x n"
    console.print(table)
    mean_rate(console, clients, 11_272_192)


def mean_rate(console: Console, clients: int, numbers: int) -> None:
    """The weighted mean alone against copying the same updates in memory, in turn. Rates count the updates' own bytes."""
    from fedray.lowrank import weighted_sum

    vectors = [torch.randn(numbers) for _ in range(clients)]
    room, result, weights = (
        [torch.empty(numbers) for _ in range(clients)],
        torch.empty(numbers),
        [1 / clients] * clients,
    )

    def copy() -> None:
        for target, vector in zip(room, vectors, strict=True):
            target.copy_(vector)

    def mean() -> None:
        weighted_sum(vectors, weights, out=result)

    copy()
    mean()
    turns = [(timed_once(copy, "cpu"), timed_once(mean, "cpu")) for _ in range(9)]
    rates = [clients * numbers * 4 / statistics.median(seconds) / 1e9 for seconds in zip(*turns, strict=True)]
    table = Table(
        title=f"the mean of {clients} updates of {numbers:,} numbers, added in fp64 ({torch.get_num_threads()} CPU threads)"
    )
    for column in ("what", "GB/s", "share of the copy (median of turns)"):
        table.add_column(column, justify="left" if column == "what" else "right")
    table.add_row("copy in memory", f"{rates[0]:.1f}", "1")
    table.add_row("weighted mean", f"{rates[1]:.1f}", f"{statistics.median(c / m for c, m in turns):.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "part", nargs="?", choices=("all", "aggregation", "step", "abba", "privacy", "sharing", "model"), default="all"
    )
    parser.add_argument("--size", type=int, default=4096, help="m = n of the aggregation")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the step and abba benchmarks")
    parser.add_argument(
        "--shape", default="llama-3.2-1b", help="of the whole model: a shape that ships with fedray, or a model"
    )
    parser.add_argument("--clients", type=int, default=10, help="of the whole model")
    args, flags = parser.parse_known_args()
    if flags and args.part != "sharing":
        parser.error(f"unknown: {' '.join(flags)} (only `sharing` takes a run's own flags)")
    console = Console(width=150)
    if args.part in ("all", "aggregation"):
        aggregation(console, args.size, args.size, clients=10, rank=16)
    if args.part in ("all", "step"):
        step(console, args.rounds)
    if args.part in ("all", "abba"):
        abba(console, args.rounds)
    if args.part in ("all", "privacy"):
        private(console, args.rounds)
        secure(console, 5)
    if args.part in ("all", "sharing"):
        sharing(console, flags)
    if args.part in ("all", "model"):
        whole_model(console, args.shape, args.clients, 16)


if __name__ == "__main__":
    main()
