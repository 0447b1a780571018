"""The card that an exported adapter or model carries (README.md, as the hub shows it): what it is, what it learned
from, how well, and what its privacy is. It may be published: of data it names no row, and of paths only the last part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import fedray
from fedray.adapters.export import Lost
from fedray.config.build import make_method
from fedray.config.sections import BUILTIN, Config
from fedray.data.tasks import TASKS

_PACKAGES = ("torch", "transformers", "peft")


def card(
    config: Config,
    records: Sequence[Mapping[str, Any]],
    result: int,
    statement: Mapping[str, Any] | None,
    format: str,
    lost: Lost | None = None,
) -> str:
    """In Markdown, with the hub's own header. `records`: of the run's rounds (`rounds.jsonl`); `result`: the round
    that is exported; `statement`: `privacy.json`; `lost`: by a smaller rank."""
    base, labelled = public_name(config.model.path), TASKS[config.model.task].model == "classification"
    data = ModelCardData(
        base_model=base if is_hub_id(config.model.path) else None,
        library_name="transformers" if format == "merged" else "peft",
        pipeline_tag="text-classification" if labelled else "text-generation",
        tags=["fedray", "federated-learning", "lora", *(["differential-privacy"] if statement else [])],
    )
    kind = "model" if format == "merged" else "adapter"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {base}, a federated {kind}",
        (
            f"Fine-tuned by fedray {fedray.__version__} on the data of several clients, which stayed with them: "
            f"`{config.adapter.kind}` adapters, aggregated by `{config.method.name}`."
        ),
        _table(_facts(config, result)),
        "## How well",
        _table(_measured(config, records, result)) if records else "No round has been measured.",
        "## Privacy",
        *(_private(statement) if statement else [_NOT_PRIVATE]),
        "## To load it",
        _code(base, f"AutoModelFor{'SequenceClassification' if labelled else 'CausalLM'}", format),
        *([f"This adapter was cut to serve: {lost.sentence}."] if lost else []),
        f"Versions: fedray {fedray.__version__}, " + ", ".join(f"{p} {version(p)}" for p in _PACKAGES) + ".",
    ]
    return "\n\n".join(parts) + "\n"


_NOT_PRIVATE = (
    "None is guaranteed: no differential privacy was asked for (`privacy.epsilon`), and what a model has learned of "
    "its training data can be found out from its weights."
)


def is_hub_id(path: str) -> bool:
    """Whether a model or data set is named as on the hub, and not by its place here."""
    return path != BUILTIN and path.count("/") < 2 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def public_name(path: str) -> str:
    """A hub id whole; of a place on this machine its last part."""
    return path if is_hub_id(path) else Path(path).name or path


def _facts(config: Config, result: int) -> Iterable[tuple[str, str]]:
    data, federation = config.data, config.federation
    split = f"{data.partition}" + (f", alpha {data.alpha:g}" if data.partition in ("dirichlet", "quantity") else "")
    bits = f", quantised to {config.model.quantise}" if config.model.quantise else ""
    yield "base model", f"`{public_name(config.model.path)}`, {config.model.dtype}{bits}"
    yield "task", config.model.task
    yield "data", f"`{public_name(data.source)}`" + (f", {data.subset}" if data.subset else "")
    yield "clients", f"{len(config.clients) if config.siloed else federation.clients}, data by {split}"
    yield "rounds", f"{result} of {federation.rounds}, {federation.local_steps} steps of {federation.batch_size} each"
    yield "sequences", f"at most {data.max_length} tokens"
    yield "adapter", f"{config.adapter.kind}, rank {config.adapter.rank}"
    yield "method", f"{config.method.name}; exact: {make_method(config).exact}"
    yield "learning rate", f"{federation.lr:g}"
    yield "seed", str(config.seed)


def _measured(config: Config, records: Sequence[Mapping[str, Any]], result: int) -> Iterable[tuple[str, str]]:
    metric, ended = TASKS[config.model.task].metric, next((r for r in records if r["round"] == result), records[-1])
    yield f"{metric} on held-out examples", f"{ended['metrics'][metric]:.4g}"
    for name in sorted(ended["metrics"].keys() - {metric}):
        yield name, f"{ended['metrics'][name]:.4g}"
    for name in ("aggregation_error", "exactness"):
        if (most := max((r[name] for r in records if r.get(name) is not None), default=None)) is not None:
            yield f"{name}, largest of all rounds", f"{most:.3g}"


def _private(statement: Mapping[str, Any]) -> Iterable[str]:
    guarantee = statement["guarantee"]
    facts = [
        ("epsilon", "none" if guarantee["epsilon"] is None else f"{guarantee['epsilon']:.4g}"),
        ("delta", f"{guarantee['delta']:.3g}"),
        ("a unit", f"{guarantee['unit']}: {guarantee['what_a_unit_is']}"),
        ("relation", guarantee["relation"]),
        ("trust", guarantee["trust"]),
        ("accountant", guarantee["accountant"]),
        *((name, guarantee[name]) for name in ("void", "weak") if guarantee[name]),
    ]
    yield _table(facts)
    yield "Not guaranteed (of much weight; the run's `privacy.json` has all):"
    yield "\n".join(f"- {line['what']}" for line in statement["not_guaranteed"] if line["severity"] == "high")


def _code(base: str, auto: str, format: str) -> str:
    if format == "merged":
        return f'```python\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("PATH")\n```'
    return (
        f"```python\nfrom peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "PATH")\n```'
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *cells])


def _cell(text: str) -> str:
    """Words of others (a column's, a file's name) stay inside their cell."""
    return " ".join(text.replace("|", "\\|").split())
