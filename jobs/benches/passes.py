"""One client step's memory and time in each of the model's settings, against the same step of a plain PEFT loop."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benches.measure import MIB, device_here, median_ratio, peak_bytes, standing_bytes, table, threads, timed_once
from fedray.config.build import make_method, make_spec
from fedray.config.read import from_dict
from fedray.config.sections import Config
from fedray.training.local import LocalTrainer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: What each setting of `model.*` is, and which of PEFT's it is held against.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "plain"),
    "checkpointing": ({"checkpointing": True}, "checkpointing"),
    "loss_chunk 128": ({"loss_chunk": 128}, "plain"),
    "checkpointing, loss_chunk 128": ({"checkpointing": True, "loss_chunk": 128}, "checkpointing"),
    "compute bfloat16": ({"compute": "bfloat16"}, "bfloat16"),
    "quantise nf4": ({"quantise": "nf4"}, "nf4"),
}
#: PEFT's loop as people write it: whole; with gradient checkpointing; under autocast; over transformers' 4 bits.
PEFT = ("plain", "checkpointing", "bfloat16", "nf4")


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights and what it steps on. `dtype`: of the frozen base."""

    hidden: int = 256
    inner: int = 1024
    blocks: int = 6
    heads: int = 8
    vocabulary: int = 32_000
    length: int = 256
    batch: int = 4
    rank: int = 16
    dtype: str = "float32"
    config: Mapping[str, Any] = field(default_factory=dict)


def write_model(root: Path, shape: Shape) -> None:
    """The model with a byte tokenizer, and a text that is longer than a sequence."""
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.blocks,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=shape.length,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            dtype=getattr(torch, shape.dtype),
            **shape.config,
        )
    )
    model.to(getattr(torch, shape.dtype)).save_pretrained(root / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(root / "model")
    texts = [{"text": f"{i} " + "a cat sat on a mat " * (shape.length // 10)} for i in range(4 * shape.batch)]
    (root / "data.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))


def config_of(root: Path, shape: Shape, **sections: Mapping[str, Any]) -> Config:
    """A config of that model; `sections` on top."""
    values: dict[str, dict[str, Any]] = {
        "model": {"path": str(root / "model"), "dtype": shape.dtype},
        "adapter": {"rank": shape.rank, "alpha": 2 * shape.rank, "targets": TARGETS},
        "data": {"source": str(root / "data.jsonl"), "max_length": shape.length},
        "federation": {"clients": 2, "batch_size": shape.batch, "lr": 1e-3},
        "worker": {"backend": "torch", "cpus": torch.get_num_threads()},
    }
    for name, keys in sections.items():
        values.setdefault(name, {}).update(keys)
    return from_dict({"engine": "inline", **values})


def trainer_of(config: Config, device: str) -> tuple[LocalTrainer, Any]:
    """A trainer and what it trains from."""
    trainer = LocalTrainer(config, device, torch.get_num_threads())
    method = make_method(config)
    spec = make_spec(config, trainer.layers, trainer.data.clients)
    state = method.init(spec, trainer.describe()[1], trainer.start_from_weights(spec.adapter))
    return trainer, method.view(state.spec, state, None)


def ours(config: Config, device: str) -> Step:
    """One step of a client, its batch at hand."""
    trainer, view = trainer_of(config, device)
    engine = trainer._load(view, config.federation, None, None)
    trainer.set_mode(training=True)
    examples = trainer.examples("train", "client-0")
    batch = trainer.batch([examples[i] for i in range(config.federation.batch_size)])
    return Step(lambda: engine.step([batch], trainer.task.loss, 1e-3), trainer.model)


@dataclass(frozen=True)
class Step:
    """A step, and the model that it steps on."""

    take: Callable[[], object]
    model: torch.nn.Module

    def __call__(self) -> None:
        self.take()

    @property
    def standing(self) -> int:
        """Bytes between steps: parameters, and gradient and moments of those that train."""
        return standing_bytes(self.model)


def peft_loop(config: Config, device: str, setting: str = "plain") -> Step:
    """One step of what people write with PEFT and PyTorch: the same adapters, batch, optimizer and dtypes."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": getattr(torch, config.model.dtype)}
    if setting == "nf4":
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        bits.bnb_4bit_compute_dtype = options["dtype"]
        options |= {"quantization_config": bits, "device_map": device}
    base = AutoModelForCausalLM.from_pretrained(config.model.path, **options)
    base.config.use_cache = False
    if setting == "checkpointing":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    section = config.adapter
    lora = LoraConfig(r=section.rank, lora_alpha=section.alpha, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    trainer, _ = trainer_of(config, device)
    examples = trainer.examples("train", "client-0")
    batch = trainer.batch([examples[i] for i in range(config.federation.batch_size)])

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=setting == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Step(step, model)


def saved_bytes(step: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward pass of a step, each storage once, parameters among them not counted
    twice."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not tensor.is_leaf:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


@dataclass(frozen=True)
class Cost:
    """What a step takes: MiB kept for the backward pass, MiB at the peak beyond what stands between steps, seconds of
    each turn."""

    saved: float
    peak: float
    seconds: list[float]


def costs(steps: Mapping[str, Callable[[], object]], device: str, turns: int) -> dict[str, Cost]:
    """Of each step, its turns among the others' so that drift of the machine hits all alike."""
    for step in steps.values():
        step()
    peaks = {name: peak_bytes(step, device) / MIB for name, step in steps.items()}
    saved = {name: saved_bytes(step) / MIB for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        for name in list(steps) if turn % 2 else list(steps)[::-1]:
            seconds[name].append(timed_once(steps[name], device))
    return {name: Cost(saved[name], peaks[name], seconds[name]) for name in steps}


def memory(
    console: Console, turns: int = 7, shape: Shape | None = None, names: Iterable[str] = tuple(SETTINGS)
) -> None:
    """The table: each setting's memory and time, as they are and against PEFT's loop in the same setting."""
    shape, device = shape or Shape(), device_here()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_model(root, shape)
        plain = config_of(root, shape)
        steps = {f"PEFT, {name}": peft_loop(plain, device, name) for name in PEFT}
        steps |= {name: ours(config_of(root, shape, model=SETTINGS[name][0]), device) for name in names}
        standing = {name: step.standing / MIB for name, step in steps.items()}
        found = costs(steps, device, turns)
    shown = table(
        f"a step of {shape.batch} x {shape.length} tokens, vocabulary {shape.vocabulary:,}, {shape.blocks} blocks of "
        f"{shape.hidden}, {shape.dtype} ({threads()}, {turns} turns)",
        ("setting", "MiB standing", "saved", "at the peak", "s", "against", "peak", "time"),
    )
    for name, cost in found.items():
        other = f"PEFT, {SETTINGS[name][1]}" if name in SETTINGS else "PEFT, plain"
        ratios = cost.peak / found[other].peak, median_ratio(cost.seconds, found[other].seconds)
        numbers = (
            f"{standing[name]:.1f}",
            f"{cost.saved:.1f}",
            f"{cost.peak:.1f}",
            f"{statistics.median(cost.seconds):.3f}",
        )
        shown.add_row(name, *numbers, other, *(f"{ratio:.3f}" for ratio in ratios))
    console.print(shown)
