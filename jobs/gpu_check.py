"""All that needs a GPU, in one call: is it right there, how fast, in how much memory.

    python jobs/gpu_check.py              # at the shape of Llama-3.2-1B, bf16, sequences of 512; under nine minutes
    python jobs/gpu_check.py --tiny       # the same at a tiny size, on whatever is here: a rehearsal

First the checks, each a number and its bound (exit code 1 where one is beyond it), then one table: tokens a second and
peak memory of a client's step against a plain PEFT loop in the same setting. What cannot be checked here is said.
"""

import argparse
import importlib.util
import logging
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benches.measure import MIB, device_here, median_ratio, table
from benches.passes import Shape, Step, config_of, costs, ours, peft_loop, trainer_of, write_model
from rich.console import Console
from torch import Tensor

from fedray.adapters.quantised import QuantisedLinear
from fedray.config.build import make_method
from fedray.config.sections import Config
from fedray.lowrank import LowRank
from fedray.methods import Update
from fedray.ranks import Group, open_meeting
from fedray.report.terminal import make_console
from fedray.training.local import LocalTrainer
from fedray.training.together import train_together

LLAMA_1B = Shape(2048, 8192, 16, 32, 128_256, length=512, batch=8, dtype="bfloat16", config={"head_dim": 64})
TINY = Shape(hidden=64, inner=128, blocks=2, heads=2, vocabulary=400, length=32, batch=2, rank=4)
#: What is measured: sections of the config, and the setting of PEFT's loop that each is held against.
MEASURED: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "lora": ({}, "plain"),
    "lora-sb": ({"adapter": {"kind": "lora-sb", "alpha": None}, "method": {"name": "fed-sb"}}, "plain"),
    "abba": ({"adapter": {"kind": "abba", "alpha": None}}, "plain"),
    "lora, compute bfloat16": ({"model": {"compute": "bfloat16"}}, "bfloat16"),
    "lora, checkpointing": ({"model": {"checkpointing": True}}, "checkpointing"),
    "lora, loss_chunk 1024": ({"model": {"loss_chunk": 1024}}, "plain"),
    "lora, checkpointing, loss_chunk 1024": ({"model": {"checkpointing": True, "loss_chunk": 1024}}, "checkpointing"),
    "lora over nf4": ({"model": {"quantise": "nf4"}}, "nf4"),
}
DP = {"noise": 1.0, "delta": 1e-5, "clip": 1.0}
CLIENTS_TOGETHER = 4

Check = tuple[str, float, float]  # what, the number measured, its bound


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    tiny = parser.parse_args().tiny
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    console, device = make_console(width=150), device_here()
    if not tiny and device != "cuda":
        console.print("no GPU is here: --tiny rehearses all of it on the CPU")
        return 2
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    console.print(f"{card}, torch {torch.__version__}, {date.today().isoformat()}")
    with tempfile.TemporaryDirectory() as folder:
        failed = correctness(console, Path(folder) / "small", device)
        speed(console, Path(folder) / "large", device, TINY if tiny else LLAMA_1B, card, turns=1 if tiny else 5)
    return 1 if failed else 0


# --- is it right -------------------------------------------------------------------------------------------------


def correctness(console: Console, root: Path, device: str) -> int:
    """Every check with its number; how many are beyond their bounds."""
    root.mkdir()
    write_model(root, TINY)
    failed = 0
    for make in (_steps, _in_bf16, _aggregate, _base_in_bf16, _settings, _quantised, _together, _clipped, _ranks):
        for what, found, bound in make(root, device):
            failed += not found <= bound
            console.print(f"{'right' if found <= bound else 'WRONG'}: {what}: {found:.2g} (at most {bound:g})")
    if device == "cuda" and torch.cuda.device_count() < 2:
        console.print("not checked: two ranks over NCCL, one GPU is here")
    return failed


def _trained(config: Config, device: str) -> dict[str, Tensor]:
    trainer, view = trainer_of(config, device)
    return trainer.train(view, "client-0", 0).tensors


def _gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[n].double() - other[n].double()).abs().max().item() for n in one)


def _steps(root: Path, device: str) -> Iterator[Check]:
    for kind, sections in (("lora", {}), ("lora-sb", MEASURED["lora-sb"][0]), ("abba", MEASURED["abba"][0])):
        config = config_of(root, TINY, federation={"local_steps": 2, "lr": 1e-3}, **sections)
        yield (
            f"two steps of {kind} in fp32 against the CPU's",
            _gap(_trained(config, device), _trained(config, "cpu")),
            2e-4,
        )


def _in_bf16(root: Path, device: str) -> Iterator[Check]:
    """Two steps over a base in bf16 and of products in bf16, against fp32 on the CPU: how far the trained factors are
    from those, relative to how far these moved."""
    common = {"federation": {"local_steps": 2, "lr": 1e-3}}
    plain = config_of(root, TINY, **common)
    exact, start = _trained(plain, "cpu"), trainer_of(plain, "cpu")[1].tensors
    moved = sum((exact[n] - start[n]).square().sum().item() for n in exact) ** 0.5
    for name, keys in (("dtype", {"dtype": "bfloat16"}), ("compute", {"compute": "bfloat16"})):
        got = _trained(config_of(root, TINY, model=keys, **common), device)
        gone = sum((exact[n] - got[n]).square().sum().item() for n in exact) ** 0.5
        yield f"two steps with {name} bfloat16 against fp32's, relative to the way they went", gone / moved, 0.5


def _aggregate(root: Path, device: str) -> Iterator[Check]:
    """Means and base updates of factors that lie on the device, against dense ones in fp64."""
    config = config_of(root, TINY, method={"name": "fedex"})
    trainer, view = trainer_of(config, "cpu")
    method, generator = make_method(config), torch.Generator().manual_seed(0)
    state = method.init(_spec(config, trainer), trainer.describe()[1])
    updates, shares = [], (0.2, 0.3, 0.5)
    for i, share in enumerate(shares):
        drawn = {n: t + torch.randn(t.shape, generator=generator) for n, t in view.tensors.items()}
        updates.append(Update(f"client-{i}", share, {n: t.to(device) for n, t in drawn.items()}))
    after = method.view(state.spec, method.aggregate(state, updates)[0], None)
    worst = 0.0
    for layer in state.spec.layers:
        deltas = [state.spec.adapter.delta(layer, _exact(state.spec, layer, u.tensors)).dense() for u in updates]
        ideal = sum(share * delta for share, delta in zip(shares, deltas, strict=True))
        got = state.spec.adapter.delta(layer, _exact(state.spec, layer, after.tensors)).dense()
        got = got + after.base[layer.name].to(got.device, torch.float64).dense()
        worst = max(worst, ((got - ideal.to(got.device)).norm() / ideal.norm()).item())
    yield "fedex on the device against the dense fp64 mean, relative", worst, 1e-6


def _spec(config: Config, trainer: LocalTrainer) -> Any:
    from fedray.config.build import make_spec

    return make_spec(config, trainer.layers, trainer.data.clients)


def _exact(spec: Any, layer: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in spec.factors(layer, tensors).items()}


def _base_in_bf16(root: Path, device: str) -> Iterator[Check]:
    """What a base of bf16 is said to have lost of an update is what is missing in it."""
    trainer, _ = trainer_of(config_of(root, replace(TINY, dtype="bfloat16"), model={"dtype": "bfloat16"}), device)
    generator, missing, size = torch.Generator().manual_seed(0), 0.0, 0.0
    totals = {
        layer.name: LowRank(
            0.01 * torch.randn(layer.m, 4, generator=generator), torch.randn(4, layer.n, generator=generator)
        )
        for layer in trainer.layers
    }
    modules = dict(trainer.model.named_modules())
    before = {n: modules[f"base_model.model.{n}"].base_layer.weight.detach().float().cpu() for n in totals}
    lost = trainer._base.write(totals)
    for name, total in totals.items():
        after = modules[f"base_model.model.{name}"].base_layer.weight.detach().float().cpu()
        missing += (after - before[name] - total.dense()).double().square().sum().item()
        size += total.norm() ** 2
    yield "a bf16 base's loss, said against seen, relative to the update", abs(lost - missing**0.5) / size**0.5, 1e-5


def _settings(root: Path, device: str) -> Iterator[Check]:
    common = {"federation": {"local_steps": 2, "lr": 1e-3}}
    plain = _trained(config_of(root, TINY, **common), device)
    for name, keys in (("checkpointing", {"checkpointing": True}), ("loss_chunk 7", {"loss_chunk": 7})):
        yield (
            f"{name} against without",
            _gap(plain, _trained(config_of(root, TINY, model=keys, **common), device)),
            1e-5,
        )


def _quantised(root: Path, device: str) -> Iterator[Check]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    for kind in ("nf4", "int8"):
        torch.manual_seed(0)
        plain = torch.nn.Linear(256, 128, bias=False)
        layer = QuantisedLinear(plain, kind).to(device)
        x = torch.randn(16, 256, device=device)
        gap = (layer(x) - x @ layer.dense().T).abs().max().item()
        yield f"a layer of {kind} against its dense meaning", gap, 1e-4
        here, there = layer.dense().cpu(), QuantisedLinear(plain, kind).dense()
        yield f"the bits of {kind} against the CPU's", (here - there).abs().max().item(), 1e-6


def _together(root: Path, device: str) -> Iterator[Check]:
    config = config_of(root, TINY, federation={"local_steps": 2, "clients": 2})
    trainer, view = trainer_of(config, device)
    alone = {c: trainer.train(view, c, 0).tensors for c in ("client-0", "client-1")}
    found = train_together(trainer, dict.fromkeys(alone, view), 0, None)
    gaps = [
        _gap(alone[client], result.tensors) for client, result in found.items() if not isinstance(result, Exception)
    ]
    yield "clients together against one after the other", max(gaps) if len(gaps) == 2 else float("inf"), 1e-5


def _clipped(root: Path, device: str) -> Iterator[Check]:
    """A private step's sum of clipped gradients, on the device and on the CPU."""
    sums = []
    for where in (device, "cpu"):
        trainer, view = trainer_of(config_of(root, TINY, privacy=DP), where)
        trainer._load(view, trainer.config.federation, None, None)
        sums.append(trainer.clipped_sum([trainer.examples("train", "client-0")[i] for i in range(2)], 1.0))
    yield "the sum of clipped gradients against the CPU's", (sums[0].cpu() - sums[1]).abs().max().item(), 1e-4


def _ranks(root: Path, device: str) -> Iterator[Check]:
    if importlib.util.find_spec("deepspeed") is None:
        return
    world = min(2, torch.cuda.device_count()) if device == "cuda" else 2
    sections = {"federation": {"local_steps": 2}, "worker": {"backend": "deepspeed", "zero_stage": 1}}
    config = config_of(root, TINY, **sections)
    meeting, store = open_meeting("127.0.0.1", world)
    torch.multiprocessing.spawn(_on_a_rank, (world, device, meeting, config, str(root / "found")), world)
    del store
    with open(root / "found", "rb") as file:
        found = pickle.load(file)
    backend = "NCCL" if device == "cuda" else "gloo"
    yield (
        f"{world} rank(s) over {backend}, ZeRO 1, against one",
        _gap(found, _trained(config_of(root, TINY, federation=sections["federation"]), device)),
        2e-4,
    )


def _on_a_rank(rank: int, world: int, device: str, meeting: Any, config: Config, file: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    trainer = LocalTrainer(config, device, 1, ranks=Group(rank, world, device, meeting))
    method = make_method(config)
    state = method.init(_spec(config, trainer), trainer.describe()[1])
    result = trainer.train(method.view(state.spec, state, None), "client-0", 0)
    if rank == 0:
        with open(file, "wb") as out:
            pickle.dump(result.tensors, out)


# --- how fast, in how much memory ---------------------------------------------------------------------------------


def speed(console: Console, root: Path, device: str, shape: Shape, card: str, turns: int) -> None:
    """The table. Each row is built, measured and let go, with PEFT's loop beside it in turns."""
    root.mkdir()
    write_model(root, shape)
    tokens, base = shape.batch * shape.length, config_of(root, shape)
    shown = table(
        f"{card}: a step of {shape.batch} x {shape.length} tokens, {shape.blocks} blocks of {shape.hidden}, "
        f"vocabulary {shape.vocabulary:,}, {shape.dtype}",
        ("what", "tokens a second", "times PEFT's", "GiB standing", "and at the peak", "times PEFT's"),
    )
    rows: dict[str, tuple[Callable[[], Step], str, int]] = {}
    for name, (sections, setting) in MEASURED.items():
        if "nf4" in name and importlib.util.find_spec("bitsandbytes") is None:
            continue
        config = config_of(root, shape, **sections)
        rows[name] = lambda config=config: ours(config, device), setting, tokens
    rows["lora, DP's passes"] = lambda: private(config_of(root, shape, privacy=DP), device), "plain", tokens
    many = f"lora, {CLIENTS_TOGETHER} clients together"
    rows[many] = lambda: together(base, device), "plain", CLIENTS_TOGETHER * tokens
    for name, (make, setting, count) in rows.items():
        steps = {"ours": make(), "PEFT": peft_loop(base, device, setting)}
        found = costs(steps, device, turns)
        own, peft = found["ours"], found["PEFT"]
        ratio = median_ratio(peft.seconds, own.seconds) * count / tokens
        shown.add_row(
            name,
            f"{count / statistics.median(own.seconds):,.0f}",
            f"{ratio:.3f}",
            f"{steps['ours'].standing / MIB / 1024:.2f}",
            f"{own.peak / 1024:.2f}",
            f"{own.peak / peft.peak:.3f}",
        )
        del steps
        if device == "cuda":
            torch.cuda.empty_cache()
    console.print(shown)


def private(config: Config, device: str) -> Step:
    """The passes of a private step, which are nearly all of it: gradients by sequence, clipped and summed; no noise, no
    optimizer."""
    trainer, view = trainer_of(config, device)
    trainer._load(view, config.federation, None, None)
    examples = trainer.examples("train", "client-0")
    batch = [examples[i] for i in range(config.federation.batch_size)]

    def step() -> None:
        from fedray.privacy.dpsgd import clipped_sum

        clipped_sum(trainer._engine, trainer._hooks, [trainer.batch(batch)], trainer.task.losses, 1.0)

    trainer.set_mode(training=True)
    return Step(step, trainer.model)


def together(config: Config, device: str) -> Step:
    """A step of several clients in one pass."""
    from fedray.training.together import Together

    trainer, view = trainer_of(config, device)
    trainer._load(view, config.federation, None, None)
    trainer.set_mode(training=True)
    names = trainer.trained(view)
    clients = Together(
        trainer,
        config.federation,
        [{n: view.tensors[n] for n in names}] * CLIENTS_TOGETHER,
        [{n: view.tensors[n] for n in trainer.factors if n not in names}] * CLIENTS_TOGETHER,
        list(range(CLIENTS_TOGETHER)),
    )
    examples = trainer.examples("train", "client-0")
    batch = [examples[i] for i in range(config.federation.batch_size)]

    def step() -> None:
        with clients.attached():
            clients.step([[batch] * CLIENTS_TOGETHER], 1e-3)

    return Step(step, trainer.model)


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(code)
