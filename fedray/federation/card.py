"""The card that an exported adapter or model carries (README.md, as the hub shows it): what it is, what it learned
from, how well, and what its privacy is. It may be published: of data it names no row, and of paths only the last part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import fedray
from fedray.adapters.export import Lost
from fedray.config.build import make_method
from fedray.config.sections import BUILTIN, Config
from fedray.data.partition import DEFAULT_CLIENTS
from fedray.data.tasks import TASKS

_PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class About:
    """What an export is of. `records`: of the run's rounds (`rounds.jsonl`); `result`: the round that is exported;
    `statement`: `privacy.json`; `classes`: of a classifier."""

    config: Config
    records: Sequence[Mapping[str, Any]]
    result: int
    statement: Mapping[str, Any] | None
    format: str
    classes: int = 0


def card(about: About, lost: Lost | None = None) -> str:
    """In Markdown, with the hub's own header. `lost`: by a smaller rank."""
    config, statement = about.config, about.statement
    base, sequences = public_name(config.model.path), TASKS[config.model.task].model == "classification"
    merged = about.format == "merged"
    data = ModelCardData(
        base_model=base if is_hub_id(config.model.path) else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-classification" if sequences else "text-generation",
        tags=["fedray", "federated-learning", "lora", *(["differential-privacy"] if statement else [])],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {base}, a federated {'model' if merged else 'adapter'}",
        (
            f"Fine-tuned by fedray {fedray.__version__} on the data of several clients, which stayed with them: "
            f"`{config.adapter.kind}` adapters, aggregated by `{config.method.name}`."
        ),
        _table(_facts(config, about.result)),
        "## How well",
        _measured(about),
        "## Privacy",
        *(_private(statement) if statement else [_NOT_PRIVATE]),
        "## To load it",
        f"```{'bash' if about.format == 'gguf' else 'python'}\n{loading(about)}\n```",
        *([f"This adapter was cut to serve: {lost.sentence}."] if lost else []),
        f"Versions: fedray {fedray.__version__}, " + ", ".join(f"{p} {version(p)}" for p in _PACKAGES) + ".",
    ]
    return "\n\n".join(parts) + "\n"


_NOT_PRIVATE = (
    "None is guaranteed: no differential privacy was asked for (`privacy.epsilon`), and what a model has learned of "
    "its training data can be found out from its weights."
)


def is_hub_id(path: str) -> bool:
    """Whether a model or data set is named as on the hub, and not by its place on a machine, this one or another."""
    local = path == BUILTIN or path.startswith((".", "/", "~")) or Path(path).exists()
    return not local and path.count("/") < 2 and Path(path).suffix not in _FILES


#: How data that are files end.
_FILES = {".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt"}


def public_name(path: str) -> str:
    """A hub id whole; of a place on a machine its last part."""
    return path if is_hub_id(path) else Path(path).name or path


def _facts(config: Config, result: int) -> Iterable[tuple[str, str]]:
    data, federation = config.data, config.federation
    split = f"{data.partition}" + (f", alpha {data.alpha:g}" if data.partition in ("dirichlet", "quantity") else "")
    bits = f", quantised to {config.model.quantise}" if config.model.quantise else ""
    ranks = config.adapter.rank
    own = " (some clients have their own settings)" if config.clients else ""
    yield "base model", f"`{public_name(config.model.path)}`, {config.model.dtype}{bits}"
    yield "task", config.model.task
    yield "data", f"`{public_name(data.source)}`" + (f", {data.subset}" if data.subset else "")
    yield "clients", f"{_clients(config)}, data by {split}"
    yield (
        "rounds",
        f"{result} of {federation.rounds}, {federation.local_steps} steps of {federation.batch_size} each{own}",
    )
    yield "sequences", f"at most {data.max_length} tokens"
    # Names of clients stay at home.
    shown = ranks.values() if isinstance(ranks, dict) else [ranks] if isinstance(ranks, int) else ranks
    yield "adapter", f"{config.adapter.kind}, rank {', '.join(map(str, sorted(shown)))}"
    yield "method", f"{config.method.name}; exact: {make_method(config).exact}"
    yield "learning rate", f"{federation.lr:g}"
    yield "seed", str(config.seed)


def _clients(config: Config) -> str:
    """How many, without a look at the data."""
    if with_sources := sum(client.source is not None for client in config.clients.values()):
        return str(with_sources)
    if config.federation.clients is None and config.data.partition == "column":
        return "one for each value of a column"
    return str(config.federation.clients or DEFAULT_CLIENTS)


def _measured(about: About) -> str:
    """The metrics of the round that is exported, and the losses of all."""
    metric = TASKS[about.config.model.task].metric
    found = next((r["metrics"] for r in about.records if r["round"] == about.result and r.get("metrics")), None)
    rows = []
    if found:
        rows = [(f"{metric} on held-out examples", f"{found[metric]:.4g}")]
        rows += [(name, f"{found[name]:.4g}") for name in sorted(found.keys() - {metric})]
    for name in ("aggregation_error", "exactness", "store_error"):
        if (most := max((r[name] for r in about.records if r.get(name) is not None), default=None)) is not None:
            rows.append((f"{name}, largest of all rounds", f"{most:.3g}"))
    unmeasured = "" if found else "The round that is exported was not measured on held-out examples.\n\n"
    return unmeasured + (_table(rows) if rows else "")


def _private(statement: Mapping[str, Any]) -> Iterable[str]:
    guarantee = statement["guarantee"]
    liar = guarantee.get("epsilon_against_a_lying_coordinator")
    facts = [
        ("epsilon", "none" if guarantee["epsilon"] is None else _at_most(guarantee["epsilon"])),
        *([("epsilon against a lying coordinator", _at_most(liar))] if isinstance(liar, (int, float)) else []),
        ("delta", _at_most(guarantee["delta"])),
        ("a unit", f"{guarantee['unit']}: {guarantee['what_a_unit_is']}"),
        ("relation", guarantee["relation"]),
        ("trust", guarantee["trust"]),
        ("accountant", guarantee["accountant"]),
        *((name, guarantee[name]) for name in ("void", "weak") if guarantee[name]),
    ]
    yield _table(facts)
    yield "Not guaranteed (of some weight; the run's `privacy.json` has all):"
    limits = [line["what"] for line in statement["not_guaranteed"] if line["severity"] in ("high", "medium")]
    yield "\n".join(f"- {what}" for what in limits)


def _at_most(number: float) -> str:
    """Four digits, rounded up: a guarantee is never stated smaller than it is."""
    if not 0 < number < math.inf:
        return str(number)
    step = 10.0 ** (math.floor(math.log10(number)) - 3)
    return f"{math.ceil(number / step * (1 - 1e-12)) * step:.4g}"


def loading(about: About) -> str:
    """What loads the export, from the folder `PATH`, over the base that it was trained on: Python, or a command."""
    config, merged = about.config, about.format == "merged"
    if about.format == "gguf":
        converted = "# llama.cpp, with the base model converted by its own convert_hf_to_gguf.py"
        return f"{converted}\nllama-cli -m BASE.gguf --lora PATH/adapter.gguf"
    sequences = TASKS[config.model.task].model == "classification"
    auto = f"AutoModelFor{'SequenceClassification' if sequences else 'CausalLM'}"
    if merged:
        return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("PATH")'
    outputs = TASKS[config.model.task].outputs(about.classes)
    options = [f'"{public_name(config.model.path)}"', f'dtype="{config.model.dtype}"']
    options += [f"num_labels={outputs}"] if outputs is not None else []
    names, lines = [auto], ["from peft import PeftModel"]
    if config.model.quantise == "nf4":
        bits = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'
        bits += f', bnb_4bit_compute_dtype="{config.model.compute or config.model.dtype}"'
    else:
        bits = "load_in_8bit=True, llm_int8_threshold=0.0"
    if config.model.quantise:
        names, options = [auto, "BitsAndBytesConfig"], [*options, "quantization_config=bits"]
    lines += [f"from transformers import {', '.join(names)}", ""]
    lines += [f"bits = BitsAndBytesConfig({bits})"] if config.model.quantise else []
    lines += [f"base = {auto}.from_pretrained({', '.join(options)})", 'model = PeftModel.from_pretrained(base, "PATH")']
    return "\n".join(lines)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *cells])


def _cell(text: str) -> str:
    """Words of others (a column's, a file's name) stay inside their cell."""
    return " ".join(text.replace("|", "\\|").split())
