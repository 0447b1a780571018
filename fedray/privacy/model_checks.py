"""Models whose per-sample gradients would not be each sample's own, told by their parts before they train, and by their
passes while they do.

A clip bounds what one example changes only where every other example's gradient stays what it was. Statistics over the
batch, random numbers (one example more shifts those of all others), and rows that are not samples break that, in
modules that do not train as much as in those that do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fedray.errors import PrivacyError

_SHIFTS = "one example more would shift the random numbers of all others, so that no clip bounds what it changes"
#: Attributes of modules and keys of configs that say how much noise a router adds in training, and how many tokens an
#: expert takes at most. Every architecture has its own.
_JITTER, _CAPACITY = re.compile("jitter|noisy_gate"), re.compile("capacity|token_dropout")


def check_model(model: nn.Module) -> None:
    """Raises PrivacyError, with the reason, for a model whose per-sample gradients would be missing or wrong."""
    _check_config(model)
    for name, module in model.named_modules():
        _check_passes(name, module)
        if isinstance(module, LoraLayer):
            _check_lora(name, module)
        if getattr(module, "gradient_checkpointing", False):
            _check_checkpointing(name, module)
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            _check_trained(name, module)
        if _routes(module):
            _check_routed(name, module)


# --- what a pass mixes, whether or not it trains ------------------------------------------------------------------


def _check_passes(name: str, module: nn.Module) -> None:
    if getattr(module, "p", 0) and "Dropout" in type(module).__name__:
        raise PrivacyError(
            f"{name} drops out {module.p:g}: one example more would shift the masks of all others, "
            "so that no clip bounds what it changes; set it to 0"
        )
    for key, value in _given(vars(module), _JITTER):
        raise PrivacyError(f"{name} draws random numbers as it trains ({key} {value}): {_SHIFTS}; set it to 0")
    if isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.track_running_stats):
        raise PrivacyError(
            f"{name} ({type(module).__name__}) takes statistics over the batch as it trains, so that every example "
            "changes the gradients of all others and no clip bounds it, trained or not: choose a model without it"
        )


def _check_config(model: nn.Module) -> None:
    """Some modules read the config in their pass."""
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    for key, value in _given(values, _JITTER):
        raise PrivacyError(
            f"the model draws random numbers as it trains ({key} {value} in its config): {_SHIFTS}; set it to 0"
        )


def _given(values: dict[str, Any], keys: re.Pattern[str]) -> Iterator[tuple[str, Any]]:
    """The numbers and words under such keys that are neither zero nor empty."""
    for key, value in values.items():
        if keys.search(key) and isinstance(value, (int, float, str)) and value:
            yield key, value


# --- rows that are no samples -------------------------------------------------------------------------------------


def _routes(module: nn.Module) -> bool:
    """Whether it sends rows to experts: it holds some, or a router."""
    return any("expert" in name or name == "router" for name, _ in module.named_children())


def _check_routed(name: str, block: nn.Module) -> None:
    """Raises PrivacyError where something trains in a block of experts, or the experts' capacity is limited."""
    for part, module in block.named_modules(prefix=name):
        for key, value in _given(vars(module), _CAPACITY):
            raise PrivacyError(
                f"{part} leaves tokens out beyond a limit ({key} {value}): which of an example's are left out depends "
                "on the others, so that no clip bounds what it changes; choose a model without it"
            )
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            raise PrivacyError(
                f"{part} trains inside {name} ({type(block).__name__}), whose rows are tokens on their way to experts "
                "and may be several of one example, each with a clip of its own: leave it out of adapter.targets and "
                "adapter.heads"
            )


# --- per-sample gradients that would be missing -------------------------------------------------------------------


def _check_lora(name: str, module: LoraLayer) -> None:
    if any(getattr(module, "use_dora", {}).values()):
        raise PrivacyError(
            f"{name} is a DoRA layer: its norm mixes samples, and it has no per-sample gradient; use plain LoRA"
        )
    if len(module.lora_embedding_A):
        raise PrivacyError(
            f"{name} adapts an embedding, which has no per-sample gradient in opacus: leave it out of adapter.targets"
        )


def _check_checkpointing(name: str, module: nn.Module) -> None:
    options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    if not options.get("use_reentrant", False):
        raise PrivacyError(
            f"{name} checkpoints with use_reentrant=False, which runs the forward pass where opacus's "
            "hooks do not see it: set it to True"
        )


def _check_trained(name: str, module: nn.Module) -> None:
    if any(True for _ in module.buffers(recurse=False)):
        raise PrivacyError(
            f"{name} trains and keeps statistics over the batch ({type(module).__name__}), which are not "
            "private: leave it out of adapter.heads"
        )
    if type(module) not in GradSampleHooks.GRAD_SAMPLERS:
        raise PrivacyError(
            f"{name} ({type(module).__name__}) trains and has no per-sample gradient: leave it out of adapter.heads"
        )


# --- what only a pass shows ---------------------------------------------------------------------------------------


@contextmanager
def each_alone(model: nn.Module) -> Iterator[None]:
    """A training pass, after which it is seen that it drew no random numbers and changed nothing that the model
    remembers, whatever its parts are called. Raises PrivacyError where it did."""
    buffers, drawn = _buffers(model), _generators(model)
    yield
    if any(not torch.equal(before, after) for before, after in zip(drawn, _generators(model), strict=True)):
        raise PrivacyError(
            f"the model draws random numbers as it trains: {_SHIFTS}; set its dropout and its noise to 0, or choose "
            "another"
        )
    now = _buffers(model)
    if changed := [name for name, before in buffers.items() if not _same(before, now.get(name))]:
        raise PrivacyError(
            f"{changed[0]} changed in a training pass: what a model remembers of its examples passes from one to "
            "others without a clip; choose a model without it"
        )


def _buffers(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Which tensor each buffer is, and how often it was written to."""
    return {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}


def _same(before: tuple[Tensor, int], after: tuple[Tensor, int] | None) -> bool:
    return after is not None and before[0] is after[0] and before[1] == after[1]


def _generators(model: nn.Module) -> list[Tensor]:
    """The states of the generators that its modules draw from by default."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
