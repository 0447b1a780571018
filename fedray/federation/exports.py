"""What a run's result is written as for others: adapters that PEFT, vLLM and llama.cpp's converter load, whole models,
each with a card; and how it goes to the hub."""

from __future__ import annotations

import json
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig

from fedray.adapters import attach
from fedray.adapters.export import Learned, Lost, merge, write_capped, write_lora, write_peft
from fedray.adapters.quantised import dequantise, quantise
from fedray.config.sections import Config
from fedray.errors import ConfigError
from fedray.federation import checkpoint as checkpoints
from fedray.federation.card import card
from fedray.federation.results import classes_of, load_checkpoint, read_rounds, read_run_config, views
from fedray.methods import State, View
from fedray.training.model import load_base, load_tokenizer, resolve, skeleton

FORMATS = ("lora", "peft", "merged")


@dataclass(frozen=True)
class Form:
    """How a result is written: `lora` (the trained factors), `peft` (with the base update), `merged` (a whole model);
    `max_rank` (peft): as the best adapter of at most that rank, the same in all layers."""

    format: str = "peft"
    max_rank: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for what is no form."""
        if self.format not in FORMATS:
            raise ConfigError(f"--format '{self.format}' is not known: choose {', '.join(FORMATS)}")
        if self.max_rank is not None and self.format != "peft":
            raise ConfigError(f"--max-rank cuts an adapter to a rank: write --format peft, not {self.format}")
        if self.max_rank is not None and self.max_rank < 1:
            raise ConfigError(f"--max-rank {self.max_rank} is no rank: give 1 or more")


def export(folder: Path, out: Path, form: Form) -> list[str]:
    """Write a run's result to `out`, with a card; what was lost on the way, in sentences.

    Raises ConfigError for a target that is not empty, or an adapter that alone would be wrong.
    """
    config = read_run_config(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"'{out}' is not empty: choose another place")
    classes = classes_of(config)
    return write(config, load_checkpoint(folder, config, classes), folder, out, form, classes)


def write(
    config: Config, checkpoint: checkpoints.Checkpoint, run: Path, out: Path, form: Form, classes: int
) -> list[str]:
    """`export` for a checkpoint at hand of the run directory `run`; a folder for each client where clients have models
    of their own."""
    rounds, said = read_rounds(run), []
    path = run / "privacy.json"
    statement: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    for client, view in views(config, checkpoint).items():
        place = out if client is None else out / folder_name(client)
        lost = _write_view(config, checkpoint.state, view, place, form, classes)
        said += [lost.sentence] if lost else []
        text = card(config, rounds, checkpoint.state.round, statement, form.format, lost)
        (place / "README.md").write_text(text, encoding="utf-8")
    return said


def folder_name(client: str) -> str:
    """A client's name as one folder's name: names come from data, and must not lead out of the place that is written
    to."""
    quoted = urllib.parse.quote(client, safe=" ")
    return quoted.replace(".", "%2E") if not quoted.strip(".") else quoted


def _write_view(config: Config, state: State, view: View, out: Path, form: Form, classes: int) -> Lost | None:
    learned = Learned(state.spec.adapter, state.spec.layers, view.tensors, view.base, state.heads)
    if form.format == "merged":
        model = load_base(config, classes)
        if config.model.quantise is not None:  # what it learned belongs to the weights that the bits mean
            quantise(model, config.model.quantise)
            dequantise(model)
        merge(model, learned)
        model.save_pretrained(out)
        load_tokenizer(config).save_pretrained(out)
        return None
    peft_config = skeleton(config, classes or 2).peft_config[attach.ADAPTER]
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"adapter '{config.adapter.kind}' is no LoRA to PEFT, but {type(peft_config).__name__}")
    peft_config.base_model_name_or_path = resolve(config.model.path)
    if form.format == "lora":
        write_lora(out, learned, peft_config)
        return None
    if form.max_rank is None:
        write_peft(out, learned, peft_config)
        return None
    return write_capped(out, learned, peft_config, form.max_rank)


def push(out: Path, repository: str, private: bool) -> str:
    """Send an export to a repository of the hub (of `HF_ENDPOINT`, with the token of `HF_TOKEN` or of `hf auth login`),
    which is made where it is not there. The address of its page.

    Raises ConfigError where the hub refuses or is not there.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(folder_path=out, repo_id=repository, commit_message="An export of a fedray run")
    except HFValidationError as error:
        raise ConfigError(f"--push '{repository}' is no name of a repository: write OWNER/NAME") from error
    except (HfHubHTTPError, OSError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(
            f"'{out}' is written, but {api.endpoint} did not take it: {words}; set HF_TOKEN to a token that may write "
            f"to {repository}"
        ) from error
    return f"{api.endpoint}/{repository}"
