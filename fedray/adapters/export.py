"""Writes what a run learned in formats that others read without fedray: PEFT adapters and merged models."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from fedray.adapters.attach import PREFIX
from fedray.adapters.base import Adapter, Layer
from fedray.errors import ConfigError
from fedray.lowrank import LowRank


@dataclass(frozen=True)
class Learned:
    """What a run learned: `tensors` holds factors and heads (fp32), `base` the base update of layers that have one."""

    adapter: Adapter
    layers: Sequence[Layer]
    tensors: Mapping[str, Tensor]
    base: Mapping[str, LowRank]
    heads: Sequence[str]

    def factors(self, layer: Layer) -> dict[str, Tensor]:
        return {name: self.tensors[f"{layer.name}.{name}"] for name in self.adapter.shapes(layer)}

    def change(self, layer: Layer) -> LowRank:
        """The whole change of the layer's weight: the adapter's delta and the base update."""
        delta = self.adapter.delta(layer, self.factors(layer))
        return (delta + self.base[layer.name] if layer.name in self.base else delta).bounded()


def write_lora(folder: Path, learned: Learned, peft_config: LoraConfig) -> None:
    """The adapter at the rank it trained with. Raises ConfigError when the base moved: alone it would be wrong."""
    if learned.base:
        raise ConfigError(
            f"this run's method moved the base, so its rank-{peft_config.r} adapter alone is wrong: "
            "--format peft carries the base update in the adapter, --format merged writes the whole model"
        )
    write_peft(folder, learned, peft_config)


def write_peft(folder: Path, learned: Learned, peft_config: LoraConfig) -> None:
    """A PEFT LoRA adapter that is right by itself and needs no fedray: lora-sb as (s B R, A), abba as its Khatri-Rao
    pair of rank r1 r2, a base update as further rank.

    `peft_config`: the one the run trained with. LoRA's own factors keep its rank and alpha; all else has alpha equal
    to the rank, so the scale is 1.
    """
    peft_config = copy.deepcopy(peft_config)
    tensors: dict[str, Tensor] = {f"{PREFIX}{name}": learned.tensors[name] for name in learned.heads}
    ranks, plain = {}, learned.adapter.kind == "lora" and not learned.base
    for layer in learned.layers:
        if plain:
            B_mr, A_rn = learned.factors(layer)["lora_B"], learned.factors(layer)["lora_A"]
        else:
            change = learned.change(layer)
            B_mr, A_rn = change.B, change.A
        ranks[layer.name] = A_rn.shape[0]
        tensors[f"{PREFIX}{layer.name}.lora_B.weight"] = B_mr
        tensors[f"{PREFIX}{layer.name}.lora_A.weight"] = A_rn
    if not plain:
        peft_config.r = max(ranks.values())
        peft_config.lora_alpha, peft_config.use_rslora = peft_config.r, False
        peft_config.rank_pattern = {n: k for n, k in ranks.items() if k != peft_config.r}
        peft_config.alpha_pattern = dict(peft_config.rank_pattern)
    peft_config.target_modules = sorted(layer.name for layer in learned.layers)
    peft_config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: t.float().contiguous() for n, t in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    peft_config.save_pretrained(str(folder))


@torch.no_grad()
def merge(model: nn.Module, learned: Learned) -> None:
    """Write everything into the weights of the plain base model, rounding once to its dtype."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for layer in learned.layers:
        module, change = modules[layer.name], learned.change(layer).dense()
        # transformers' Conv1D (GPT-2) keeps its weight as n x m
        module.weight.copy_(module.weight.float() + (change if isinstance(module, nn.Linear) else change.T))
    for name in learned.heads:
        parameters[name].copy_(learned.tensors[name])
