"""Ties an adapter to a real model through PEFT: attach, find the layers, name the tensors, write the base.

PEFT has its own parameter names; everywhere else a factor is `LAYER.lora_A` and a head is `MODULE.weight`, with the names
the base model itself gives its modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedray.adapters import ADAPTERS
from fedray.adapters.base import Adapter, Layer
from fedray.adapters.peft_layer import FactoredLinear, peft_layer
from fedray.errors import ConfigError
from fedray.lowrank import LowRank

if TYPE_CHECKING:  # config stands above the adapters; here it is only the shape of an argument
    from fedray.config.sections import AdapterSection

ADAPTER = "default"
PREFIX = "base_model.model."
_TASKS = {"classification": TaskType.SEQ_CLS, "causal-lm": TaskType.CAUSAL_LM}


def _adapter(section: AdapterSection) -> Adapter:
    """The adapter value that a section means; its checks have been made when the config was read."""
    return ADAPTERS[section.kind].configured(section.options, section.rslora)


def lora_config(section: AdapterSection, task: str) -> LoraConfig:
    """PEFT's config of an adapter, our layer class registered in it: what `PeftModel.from_pretrained(..., config=...)` needs to
    read an adapter that is not plain LoRA back."""
    targets = list(section.targets) if isinstance(section.targets, tuple) else section.targets
    if isinstance(targets, str) and targets != "all-linear" and targets.isidentifier():
        targets = [targets]  # one name; any other string is a regular expression
    elif isinstance(targets, str) and targets != "all-linear":
        try:
            re.compile(targets)
        except re.error as error:
            raise ConfigError(f"adapter.targets '{targets}' is no regular expression: {error}") from None
    adapter, rank = _adapter(section), section.largest_rank
    config = LoraConfig(
        r=rank,
        lora_alpha=section.alpha if section.alpha is not None else adapter.alpha(rank),
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        target_modules=targets,
        modules_to_save=list(section.heads) or None,
        # PEFT trains a classifier whole; what is trained whole has no adapter inside.
        exclude_modules=r"(.*\.)?[^.]*(classifier|score)(\..*)?" if task == "classification" else None,
        task_type=_TASKS[task],
    )
    if section.kind != "lora":
        config._register_custom_module(dict.fromkeys((nn.Linear, Conv1D), peft_layer(adapter)))
    return config


def attach(model: nn.Module, section: AdapterSection, task: str) -> PeftModel:
    """The model with frozen base and fp32 adapters. Raises ConfigError for targets or ranks that do not fit it."""
    config, adapter = lora_config(section, task), _adapter(section)
    linear = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        if "target modules" in str(error).lower():
            raise ConfigError(
                f"adapter.targets {section.targets} match no layer that can be adapted: this model has {', '.join(linear)}"
            ) from None
        raise
    except TypeError as error:
        raise ConfigError(f"adapter.targets and adapter.heads overlap: {error}") from None
    for name in section.heads:
        if not any(
            isinstance(m, ModulesToSaveWrapper) and n.split(".")[-1] == name.split(".")[-1]
            for n, m in wrapped.named_modules()
        ):
            raise ConfigError(f"adapter.heads '{name}' is no module of this model")
    for layer in layers(wrapped):
        width, room = adapter.width(layer.rank), min(layer.m, layer.n)
        if width > room:
            bases = f" ({width} columns in all)" if width > layer.rank else ""
            raise ConfigError(
                f"adapter.rank {layer.rank}{bases} is above the size of layer {layer.name} ({layer.m} x {layer.n}): at most {room * layer.rank // width}"
            )
    _refuse_tied(wrapped)
    _heads_in_fp32(wrapped)
    return wrapped


def _refuse_tied(model: PeftModel) -> None:
    """A weight that two modules share cannot take one's update without moving the other."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    tied = {name for names in owners.values() if len(names) > 1 for name in names}
    for name, module in model.named_modules():
        inner = "base_layer.weight" if isinstance(module, LoraLayer) else "original_module.weight"
        if isinstance(module, (LoraLayer, ModulesToSaveWrapper)) and f"{name}.{inner}" in tied:
            raise ConfigError(
                f"{name.removeprefix(PREFIX)} shares its weight with another layer (tied embeddings): leave it out of targets and heads"
            )


def _heads_in_fp32(model: PeftModel) -> None:
    """Heads train in fp32 whatever the base's dtype; their inputs are cast on the way in."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            head = module.modules_to_save[ADAPTER]
            if any(p.dtype != torch.float32 for p in head.parameters()):
                head.float()
                head.register_forward_pre_hook(
                    lambda _, inputs: tuple(x.float() if torch.is_floating_point(x) else x for x in inputs)
                )


def _lora_layers(model: PeftModel) -> list[tuple[str, LoraLayer]]:
    found = [(name.removeprefix(PREFIX), m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    return sorted(found)


def layers(model: PeftModel) -> tuple[Layer, ...]:
    """The adapted layers by name, rank and scale read from the adapter itself. Works on the meta device."""
    result = []
    for name, module in _lora_layers(model):
        if ADAPTER not in module.lora_A or not isinstance(module.get_base_layer(), (nn.Linear, Conv1D)):
            raise ConfigError(
                f"adapter.targets match {name}, which is no linear layer: leave embeddings and convolutions out"
            )
        result.append(Layer(name, module.out_features, module.in_features, module.r[ADAPTER], module.scaling[ADAPTER]))
    return tuple(result)


def factors(model: PeftModel) -> dict[str, nn.Parameter]:
    """`LAYER.FACTOR` of every layer, sorted by name: `lora_A` (r x n) and `lora_B` (m x r), or what the adapter calls its own."""
    named = {}
    for name, module in _lora_layers(model):
        if isinstance(module, FactoredLinear):
            named |= {f"{name}.{factor}": parameter for factor, parameter in module.lora_A[ADAPTER].named_parameters()}
        else:
            named |= {f"{name}.{factor}": getattr(module, factor)[ADAPTER].weight for factor in ("lora_A", "lora_B")}
    return dict(sorted(named.items()))


def base_layers(model: PeftModel) -> dict[str, nn.Module]:
    """The frozen layer under each adapter, by name."""
    return {name: module.get_base_layer() for name, module in _lora_layers(model)}


def heads(model: PeftModel) -> dict[str, nn.Parameter]:
    """Parameters of the modules trained whole, by the base model's names, sorted."""
    named = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for part, parameter in module.modules_to_save[ADAPTER].named_parameters():
                named[f"{name.removeprefix(PREFIX)}.{part}"] = parameter
    return dict(sorted(named.items()))


class BaseWeights:
    """Writes W0 + base update into the adapted layers, always from the original W0, so error never accumulates.

    Keeps a copy of W0 on the CPU from the first write on (methods that never move the base cost nothing).
    `gathered(parameters)`: a context manager in which the weights are whole (ZeRO-3 partitions them).
    """

    def __init__(self, model: PeftModel, gathered: Callable):
        self._modules = dict(_lora_layers(model))
        self._gathered = gathered
        self._originals: dict[str, Tensor] = {}
        self._written: frozenset[str] = frozenset()

    @torch.no_grad()
    def write(self, totals: dict[str, LowRank]) -> float:
        """Set each layer to its original plus `totals[layer]`; layers not named go back to the original.

        Returns the Frobenius norm, over all layers, of what the weights' dtype could not hold.
        """
        lost = 0.0
        for name in sorted(self._written | totals.keys()):
            module = self._modules[name]
            weight = module.get_base_layer().weight
            with self._gathered([weight]):
                original = self._originals.setdefault(name, weight.detach().to("cpu", copy=True))
                original = original.to(weight.device)
                if name not in totals:
                    weight.copy_(original)
                    continue
                update = totals[name].to(weight.device, torch.float32).dense()
                wanted = original.float() + (update.T if module.fan_in_fan_out else update)
                weight.copy_(wanted)
                lost += (weight.float() - wanted).double().square().sum().item()
        self._written = frozenset(totals)
        return lost**0.5
