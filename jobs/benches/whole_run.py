"""A whole run against the same steps in a plain PyTorch loop over PEFT: what a federation costs beside its training."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benches.measure import median_ratio, table
from fedray.config.read import read_config
from fedray.config.sections import Config
from fedray.data.tasks import TASKS
from fedray.errors import ConfigError
from fedray.federation.listening import Silent
from fedray.federation.prepare import prepare
from fedray.federation.run import execute
from fedray.training.local import LocalTrainer, learning_rate
from fedray.training.model import resolve

#: On one thread, by one worker: the plain loop has as much.
ENGINES = {"one process": ("inline", {}), "Ray, one worker": ("ray", {"count": 1})}


def whole_run(console: Console, flags: Sequence[str], turns: int = 3) -> None:
    """`flags`: of the run, of LoRA. Medians over `turns` runs of each in turn. Raises ConfigError for a run that the
    plain loop does not know."""
    config = read_config(flags)
    if config.adapter.kind != "lora" or config.privacy.on or config.federation.optimizer != "adamw":
        raise ConfigError("bench.py run compares runs of adapter.kind lora and optimizer adamw, without privacy")
    plain, trained, beside, evaluated = [], {n: [] for n in ENGINES}, {n: [] for n in ENGINES}, {n: [] for n in ENGINES}
    for _ in range(turns):
        plain.append(plain_seconds(config))
        for name, (engine, worker) in ENGINES.items():
            for record in records_of(config, engine, worker):
                times = record["seconds"]
                trained[name].append(times["train"])
                evaluated[name].append(times.get("evaluate", 0.0))
                beside[name].append(sum(times.values()) - times["train"] - times.get("evaluate", 0.0))
    rounds = config.federation.rounds
    title = f"{rounds} rounds of {config.federation.local_steps} steps ({config.method.name}), {turns} runs of each"
    shown = table(title, ("what", "seconds a run", "of it beside training", "evaluation", "plain loop's rate, times"))
    shown.add_row("plain PyTorch and PEFT", f"{statistics.median(plain):.1f}", "-", "-", "1")
    for name in ENGINES:
        runs = [slice(i * rounds, (i + 1) * rounds) for i in range(turns)]
        whole = [sum(trained[name][run]) + sum(beside[name][run]) for run in runs]
        share = statistics.median(sum(beside[name][run]) / one for run, one in zip(runs, whole, strict=True))
        tests = statistics.median(sum(evaluated[name][run]) / one for run, one in zip(runs, whole, strict=True))
        rate = median_ratio(plain, whole)
        shown.add_row(name, f"{statistics.median(whole):.1f}", f"{share:.2%}", f"{tests:.1%}", f"{rate:.3f}")
    console.print(shown)


def records_of(config: Config, engine: str, worker: dict[str, int]) -> list[dict]:
    """The rounds of one run on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        worker_section = config.worker.model_copy(update={"cpus": 1, **worker})
        output = config.output.model_copy(update={"dir": f"{folder}/run", "track": ()})
        one = config.model_copy(update={"engine": engine, "worker": worker_section, "output": output})
        execute(prepare(one), Silent())
        return [json.loads(line) for line in Path(f"{folder}/run/rounds.jsonl").read_text().splitlines()]


def plain_seconds(config: Config) -> float:
    """Seconds of all clients' steps, one after the other on one thread, on a model that is there."""
    trainer = LocalTrainer(config, "cpu", 1)  # for the same batches in the same order, tokenised beforehand
    clients, model = list(trainer.data.clients), _model(config, len(trainer.data.classes))
    for client in clients:
        trainer.examples("train", client)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    began = time.perf_counter()
    for round in range(config.federation.rounds):
        for client in clients:
            optimizer = torch.optim.AdamW(trained, weight_decay=config.federation.weight_decay)
            for step in range(config.federation.local_steps):
                optimizer.param_groups[0]["lr"] = learning_rate(config.federation, round, step)
                _step(model, optimizer, trained, trainer, config, client, round, step)
    return time.perf_counter() - began


def _step(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    trainer: LocalTrainer,
    config: Config,
    client: str,
    round: int,
    step: int,
) -> None:
    section = config.federation
    batches = trainer.micro_batches(section, client, round, step)
    total = 0.0
    for examples in batches:
        batch = trainer.task.collate(examples)
        loss = trainer.task.loss(lambda b: model(**{k: v for k, v in b.items() if k != "labels"}).logits, batch)
        (loss / len(batches)).backward()
        total += loss.item()
    if not math.isfinite(total):
        raise FloatingPointError("the plain loop's loss is not finite: lower federation.lr")
    if section.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(trained, section.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def _model(config: Config, classes: int) -> PeftModel:
    speaks = TASKS[config.model.task].model == "causal-lm"
    make = AutoModelForCausalLM if speaks else AutoModelForSequenceClassification
    dropout = config.model.dropout
    options = {} if speaks else {"num_labels": classes}
    base = make.from_pretrained(resolve(config.model.path), dtype=getattr(torch, config.model.dtype), **options)
    for module in base.modules():
        if isinstance(module, nn.Dropout) and dropout is not None:
            module.p = dropout
    targets = config.adapter.targets
    lora = LoraConfig(
        r=config.adapter.largest_rank,
        lora_alpha=config.adapter.alpha or 2 * config.adapter.largest_rank,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=None if speaks else ["classifier"],
    )
    return get_peft_model(base, lora)
