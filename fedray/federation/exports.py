"""What a run's result is written as for others: adapters that PEFT, vLLM and llama.cpp's converter load, whole models,
each with a card; and how it goes to the hub."""

from __future__ import annotations

import json
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig

from fedray.adapters import attach
from fedray.adapters.export import Learned, Lost, capped, merge, write_capped, write_lora, write_peft
from fedray.adapters.gguf import check_gguf, write_gguf
from fedray.adapters.quantised import bounded, dequantise
from fedray.config.sections import Config
from fedray.errors import ConfigError
from fedray.federation import checkpoint as checkpoints
from fedray.federation.card import About, card, public_name
from fedray.federation.results import classes_of, load_checkpoint, read_rounds, read_run_config, views
from fedray.methods import State, View
from fedray.training.model import load_base, load_tokenizer, read_model_config, resolve, skeleton

FORMATS = ("lora", "peft", "merged", "gguf")


@dataclass(frozen=True)
class Form:
    """How a result is written: `lora` (the trained factors), `peft` (with the base update), `merged` (a whole model),
    `gguf` (an adapter for llama.cpp). `max_rank` (peft, gguf): as the best adapter of at most that rank, the same in
    all layers. `public`: for others to read, with no path of this machine."""

    format: str = "peft"
    max_rank: int | None = None
    public: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for what is no form."""
        if self.format not in FORMATS:
            raise ConfigError(f"--format '{self.format}' is not known: choose {', '.join(FORMATS)}")
        if self.max_rank is not None and self.format not in ("peft", "gguf"):
            raise ConfigError(f"--max-rank cuts an adapter to a rank: write --format peft or gguf, not {self.format}")
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
    path, said = run / "privacy.json", []
    if config.privacy.on and not path.is_file():
        raise ConfigError(f"'{run}' lacks the privacy.json of a private run: nothing could be said of its guarantee")
    statement: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    about = About(config, read_rounds(run), checkpoint.state.round, statement, form.format, classes)
    for client, view in views(config, checkpoint).items():
        place = out if client is None else out / folder_name(client)
        lost = _write_view(config, checkpoint.state, view, place, form, classes)
        said += [lost.sentence if client is None else f"{client}: {lost.sentence}"] if lost else []
        (place / "README.md").write_text(card(about, lost), encoding="utf-8")
    return said


def folder_name(client: str) -> str:
    """A client's name as one folder's name: names come from data, and must not lead out of the place that is written
    to."""
    quoted = urllib.parse.quote(client, safe=" ")
    return quoted.replace(".", "%2E") if not quoted.strip(".") else quoted


def _write_view(config: Config, state: State, view: View, out: Path, form: Form, classes: int) -> Lost | None:
    base = view.base
    if config.model.quantise is not None:  # what was measured has no more of the update than is kept beside the bits
        base = {name: bounded(view.base[name], config.model.base_rank) for name in view.base}
    learned = Learned(state.spec.adapter, state.spec.layers, view.tensors, base, state.heads)
    if form.format == "merged":
        model = load_base(config, classes)
        dequantise(model)  # what it learned belongs to the weights that the bits mean
        merge(model, learned)
        model.save_pretrained(out)
        load_tokenizer(config).save_pretrained(out)
        return None
    if form.format == "gguf":
        model_config = read_model_config(config)
        check_gguf(model_config)
        pairs, lost = capped(learned, form.max_rank)
        out.mkdir(parents=True, exist_ok=True)
        write_gguf(out / "adapter.gguf", pairs, model_config)
        return lost if form.max_rank is not None else None
    peft_config = skeleton(config, classes or 2).peft_config[attach.ADAPTER]
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"adapter '{config.adapter.kind}' is no LoRA to PEFT, but {type(peft_config).__name__}")
    path = config.model.path
    peft_config.base_model_name_or_path = public_name(path) if form.public else resolve(path)
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

    Raises ConfigError for several models at once, where the hub refuses or is not there, and for a repository that is
    there and public where it is to be private.
    """
    if not any((out / name).is_file() for name in ("adapter_config.json", "config.json", "adapter.gguf")):
        raise ConfigError(
            f"'{out}' holds a model for each client: push each by itself: hf upload OWNER/NAME {out}/CLIENT"
        )
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:  # `private` is not heard for one that was there
            raise ConfigError(
                f"'{out}' is written and was not sent: {repository} is there and public; make it private, or push "
                "without --private"
            )
        api.upload_folder(folder_path=out, repo_id=repository, commit_message="An export of a fedray run")
    except HFValidationError as error:
        raise ConfigError(f"--push '{repository}' is no name of a repository: write OWNER/NAME") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(
            f"'{out}' is written, but {api.endpoint} did not take it: {words}; set HF_TOKEN to a token that may write "
            f"to {repository}, and go on by: hf upload {repository} {out}"
        ) from error
    return f"{api.endpoint}/{repository}"
