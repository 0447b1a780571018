"""Ties an adapter to a real model through PEFT: attach, find the layers, name the tensors, write the base.

PEFT has its own parameter names; everywhere else a factor is `LAYER.lora_A` and a head is `MODULE.weight`, with the
names the base model itself gives its modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedray.adapters import ADAPTERS
from fedray.adapters.base import Adapter, Layer, check_width
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
    """PEFT's config of an adapter, with our layer class registered in it: what PeftModel.from_pretrained needs as its
    `config` to read an adapter that is not plain LoRA back. `task`: the kind of model, `classification` or
    `causal-lm`."""
    adapter, rank = _adapter(section), section.largest_rank
    alpha = section.alpha if section.alpha is not None else adapter.alpha(rank)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT calls it a whole number, and takes any
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        target_modules=_targets(section),
        modules_to_save=list(section.heads) or None,
        # PEFT trains a classifier whole; what is trained whole has no adapter inside.
        exclude_modules=r"(.*\.)?[^.]*(classifier|score)(\..*)?" if task == "classification" else None,
        task_type=_TASKS[task],
    )
    if section.kind != "lora":
        config._register_custom_module(dict.fromkeys((nn.Linear, Conv1D), peft_layer(adapter)))
    return config


def _targets(section: AdapterSection) -> str | list[str]:
    """`adapter.targets` as PEFT takes it: names, or a regular expression, or all-linear."""
    if isinstance(section.targets, tuple):
        return list(section.targets)
    if section.targets == "all-linear":
        return section.targets
    if section.targets.isidentifier():
        return [section.targets]  # one name; any other string is a regular expression
    try:
        re.compile(section.targets)
    except re.error as error:
        raise ConfigError(f"adapter.targets '{section.targets}' is no regular expression: {error}") from None
    return section.targets


def attach(model: nn.Module, section: AdapterSection, task: str) -> PeftModel:
    """The model with frozen base and fp32 adapters. `task`: as `lora_config` takes it. Raises ConfigError for targets
    or ranks that do not fit it."""
    config = lora_config(section, task)
    linear = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        if "target modules" in str(error).lower():
            raise ConfigError(
                f"adapter.targets {section.targets} match no layer that can be adapted: "
                f"this model has {', '.join(linear)}"
            ) from None
        raise
    except TypeError as error:
        raise ConfigError(f"adapter.targets and adapter.heads overlap: {error}") from None
    _check_heads(wrapped, section.heads)
    for layer in layers(wrapped):
        check_width(_adapter(section), layer)
    _refuse_tied(wrapped)
    _heads_in_fp32(wrapped)
    return wrapped


def _check_heads(model: PeftModel, heads: Sequence[str]) -> None:
    whole = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    for name in heads:
        if name.split(".")[-1] not in whole:
            raise ConfigError(f"adapter.heads '{name}' is no module of this model")


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
                f"{name.removeprefix(PREFIX)} shares its weight with another layer (tied embeddings): "
                "leave it out of targets and heads"
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


def adapted(model: PeftModel) -> list[tuple[str, LoraLayer]]:
    """The modules that carry the adapters, by the names of their layers, sorted."""
    return sorted((name.removeprefix(PREFIX), m) for name, m in model.named_modules() if isinstance(m, LoraLayer))


def layers(model: PeftModel) -> tuple[Layer, ...]:
    """The adapted layers by name, rank and scale read from the adapter itself. Works on the meta device."""
    return tuple(shape_of(name, module) for name, module in adapted(model))


def shape_of(name: str, module: LoraLayer) -> Layer:
    """What the adapted layer of that name is. Raises ConfigError for one that is not linear."""
    m, n = module.out_features, module.in_features
    linear = ADAPTER in module.lora_A and isinstance(module.get_base_layer(), (nn.Linear, Conv1D))
    if not linear or m is None or n is None:
        raise ConfigError(
            f"adapter.targets match {name}, which is no linear layer: leave embeddings and convolutions out"
        )
    return Layer(name, m, n, module.r[ADAPTER], module.scaling[ADAPTER])


def factors(model: PeftModel) -> dict[str, nn.Parameter]:
    """`LAYER.FACTOR` of every layer, sorted by name: `lora_A` (r x n) and `lora_B` (m x r), or what the adapter calls
    its own."""
    named: dict[str, nn.Parameter] = {}
    for name, module in adapted(model):
        if isinstance(module, FactoredLinear):
            named |= {f"{name}.{factor}": parameter for factor, parameter in module.lora_A[ADAPTER].named_parameters()}
        else:
            named |= {f"{name}.{factor}": getattr(module, factor)[ADAPTER].weight for factor in ("lora_A", "lora_B")}
    return dict(sorted(named.items()))


def base_layers(model: PeftModel) -> dict[str, nn.Module]:
    """The frozen layer under each adapter, by name."""
    return {name: module.get_base_layer() for name, module in adapted(model)}


def head_modules(model: PeftModel) -> list[tuple[str, nn.Module]]:
    """The modules trained whole, by the base model's names."""
    wrappers = ((name, m) for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper))
    return [(name.removeprefix(PREFIX), m.modules_to_save[ADAPTER]) for name, m in wrappers]


def heads(model: PeftModel) -> dict[str, nn.Parameter]:
    """Parameters of the modules trained whole, by the base model's names, sorted."""
    named: dict[str, nn.Parameter] = {}
    for name, module in head_modules(model):
        named |= {f"{name}.{part}": parameter for part, parameter in module.named_parameters()}
    return dict(sorted(named.items()))


class BaseWeights:
    """Writes W0 + base update into the adapted layers, always from the original W0, so error never accumulates.

    Keeps a copy of W0 on the CPU from the first write on (methods that never move the base cost nothing).
    `gathered(parameters)`: a context manager in which the weights are whole (ZeRO-3 partitions them).
    """

    def __init__(self, model: PeftModel, gathered: Callable[[list[nn.Parameter]], AbstractContextManager[None]]):
        self._modules = dict(adapted(model))
        self._gathered = gathered
        self._originals: dict[str, Tensor] = {}
        self._written: frozenset[str] = frozenset()

    @torch.no_grad()
    def write(self, totals: Mapping[str, LowRank]) -> float:
        """Set each layer to its original plus `totals[layer]`; layers not named go back to the original.

        Returns the Frobenius norm, over all layers, of what the weights' dtype could not hold.
        """
        lost, touched = 0.0, self._written | totals.keys()
        self._written = frozenset(touched)  # whatever fails below, the next write puts all of them right
        for name in sorted(touched):
            module = self._modules[name]
            weight = module.get_base_layer().get_parameter("weight")
            with self._gathered([weight]):
                original = self._originals.setdefault(name, weight.detach().to("cpu", copy=True))
                original = original.to(weight.device)
                if name not in totals:
                    weight.copy_(original)
                    continue
                update = totals[name].to(weight.device, torch.float32).dense()
                wanted = original.float() + (update.T if getattr(module, "fan_in_fan_out", False) else update)
                weight.copy_(wanted)
                lost += (weight.float() - wanted).double().square().sum().item()
        self._written = frozenset(totals)
        return lost**0.5
