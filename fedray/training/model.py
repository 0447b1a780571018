"""Loads base models, whole or as shapes on the meta device. The only place that reads model weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fedray import seeding
from fedray.adapters.attach import attach
from fedray.adapters.quantised import quantise
from fedray.config.sections import BUILTIN, Config
from fedray.data.builtin import BASE_MODEL
from fedray.data.tasks import TASKS
from fedray.errors import ConfigError
from fedray.training.chunked import chunk_losses, head_of
from fedray.training.outline import SHAPES

_CLASSES = {"classification": AutoModelForSequenceClassification, "causal-lm": AutoModelForCausalLM}


def resolve(path: str) -> str:
    """Where a `model.path` really lies, absolute where it is a folder. Raises ConfigError for one that does not
    exist."""
    if path == BUILTIN:
        return str(BASE_MODEL)
    if Path(path).exists():
        return str(Path(path).absolute())
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(f"model.path '{path}' does not exist: give a folder, a hub id, or 'builtin'")
    return path


def read_model_config(config: Config, classes: int = 0) -> PretrainedConfig:
    """The transformers config of the model (or of a shipped shape). Raises ConfigError when there is none."""
    path = config.model.path
    outputs = TASKS[config.model.task].outputs(classes)
    options = {} if outputs is None else {"num_labels": outputs}
    shape = SHAPES / f"{path}.json"
    try:
        read: PretrainedConfig = AutoConfig.from_pretrained(str(shape) if shape.is_file() else resolve(path), **options)
        if config.base_dropout is not None:
            for name in _dropouts(read):
                setattr(read, name, config.base_dropout)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path '{path}' cannot be read: {_reason(path, error)}") from error
    return read


def _reason(path: str, error: Exception) -> str:
    """An error of transformers in one line; of what should come from the hub with what else it may need."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError) and not Path(path).exists():
        return f"{reason}; if it is private or gated, set HF_TOKEN to a token that may read it"
    return reason


def _dropouts(model_config: PretrainedConfig) -> list[str]:
    """The fields that say how much is dropped out: every architecture has its own names for them."""
    numbers = [n for n, v in vars(model_config).items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return [name for name in numbers if "drop" in name]


def check_loadable(config: Config) -> None:
    """Weights and tokenizer are there, and positions reach. Raises ConfigError; reads no weights."""
    path = config.model.path
    if (SHAPES / f"{path}.json").is_file() and not Path(path).exists():
        raise ConfigError(
            f"model.path '{path}' is a shape for `fedray plan`, without weights: give a folder or a hub id"
        )
    folder = Path(resolve(path))
    if folder.is_dir() and not any([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        raise ConfigError(f"model.path '{path}' holds no weights (*.safetensors or pytorch_model*.bin)")
    positions = getattr(read_model_config(config), "max_position_embeddings", None)
    load_tokenizer(config)
    if positions is None:
        return
    if config.data.max_length > positions:
        raise ConfigError(
            f"data.max_length {config.data.max_length} is more than the model's {positions} positions: lower it"
        )
    said = config.generation.max_new_tokens if TASKS[config.model.task].speaks(config.data) else 0
    if config.data.max_length + said > positions:
        raise ConfigError(
            f"data.max_length {config.data.max_length} and generation.max_new_tokens {said} are more than the model's "
            f"{positions} positions: lower one"
        )


def skeleton(config: Config, classes: int = 2) -> PeftModel:
    """The model with its adapter on the meta device: every shape, no weights. Raises ConfigError as `attach` does."""
    model_config, kind = read_model_config(config, classes), TASKS[config.model.task].model
    try:
        with torch.device("meta"):
            model = _CLASSES[kind].from_config(model_config, dtype=getattr(torch, config.model.dtype))
            attached = attach(model, config.adapter, kind)
    except ValueError as error:
        raise ConfigError(
            f"model.path '{config.model.path}' does not fit model.task {config.model.task}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if config.model.loss_chunk is not None:
        head_of(attached)
    return attached


def load_base(config: Config, classes: int = 0) -> PreTrainedModel:
    """The real base model, in the bits of `model.quantise`. A head that the checkpoint lacks is drawn from the run's
    seed."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.manual_seed(seeding.derive(config.seed, "heads"))
    read = read_model_config(config, classes)
    try:
        model: PreTrainedModel = _CLASSES[TASKS[config.model.task].model].from_pretrained(
            resolve(config.model.path),
            config=read,
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=config.model.attention,
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ConfigError(
            f"model.path '{config.model.path}' has weights of other shapes than its config says or the task needs "
            f"(a head of {read.num_labels} outputs?): give the model before it was fine-tuned"
        ) from error
    # The head of a decoder reads the last token that is no padding: model and tokenizer must mean the same token.
    model.config.pad_token_id = load_tokenizer(config).pad_token_id
    if config.model.quantise is not None:
        quantise(model, config.model.quantise, config.adapter.heads)
    return model


def load_model(config: Config, classes: int = 0) -> PeftModel:
    """The base model with its adapter attached, and passes as `model.compute` and `model.checkpointing` have them."""
    model = load_base(config, classes)
    model.config.use_cache = False
    if config.model.loss_chunk is not None:
        chunk_losses(model, config.model.loss_chunk)
    if config.model.checkpointing:
        _checkpoint(config, model)
    if config.model.compute is not None:
        _autocast(model, getattr(torch, config.model.compute))
    return attach(model, config.adapter, TASKS[config.model.task].model)


def _checkpoint(config: Config, model: PreTrainedModel) -> None:
    """Blocks that are worked out once more in the backward pass. Opacus's hooks see a pass only where autograd is on:
    PyTorch's reentrant form runs the first one without, and the second, whose gradients are taken, with it."""
    reentrant = config.privacy.on and config.privacy.unit == "example"
    try:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    except ValueError as error:
        raise ConfigError(
            f"model.checkpointing: {model.config.model_type} has no blocks for it: leave it out"
        ) from error
    if reentrant:
        model.enable_input_require_grads()


def _autocast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Every pass through the base, whoever calls it, with matrices multiplied in this dtype."""
    forward = model.forward

    @functools.wraps(forward)
    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(model.parameters()).device.type, dtype=dtype):
            return forward(*args, **kwargs)

    model.forward = cast


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; a missing pad token becomes the end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(config.model.path))
    except (OSError, ValueError, TypeError, AttributeError) as error:  # AutoTokenizer's ways to say that there is none
        raise ConfigError(
            f"model.path '{config.model.path}' has no tokenizer that can be read: {_reason(config.model.path, error)}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
