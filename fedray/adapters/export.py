"""Writes what a run learned in formats that others read without fedray: PEFT adapters and merged models."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from fedray.adapters.attach import PREFIX
from fedray.adapters.base import Adapter, Layer, pad_to
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


@dataclass(frozen=True)
class Lost:
    """What an adapter of a smaller rank leaves out: Frobenius norms relative to the change's, of all layers together
    and of the layer that loses most."""

    rank: int
    whole: float
    worst_layer: str
    worst: float

    @property
    def sentence(self) -> str:
        """For a person."""
        return (
            f"rank {self.rank} in every layer leaves out {self.whole:.2g} of the change of the weights (Frobenius "
            f"norm, relative), at most {self.worst:.2g} of a layer's, {self.worst_layer}"
        )


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
    if learned.adapter.kind == "lora" and not learned.base:
        factors = {layer.name: learned.factors(layer) for layer in learned.layers}
        pairs = {name: LowRank(of["lora_B"], of["lora_A"]) for name, of in factors.items()}
        _write(folder, learned, pairs, copy.deepcopy(peft_config))
    else:
        changes = {layer.name: learned.change(layer) for layer in learned.layers}
        _write(folder, learned, changes, _at_scale_one(peft_config, changes))


def write_capped(folder: Path, learned: Learned, peft_config: LoraConfig, rank: int) -> Lost:
    """`capped` as an adapter of PEFT's, as vLLM and llama.cpp's converter take it; what it leaves out. Raises
    ConfigError as `capped`."""
    pairs, lost = capped(learned, rank)
    _write(folder, learned, pairs, _at_scale_one(peft_config, pairs))
    return lost


def capped(learned: Learned, rank: int | None) -> tuple[dict[str, LowRank], Lost]:
    """The best plain LoRA of at most `rank` (Eckart-Young, layer by layer; None: of the rank it has), of one rank in
    all layers and nothing beside it, in fp64; and what it leaves out. Raises ConfigError for trained heads, which such
    an adapter has no place for. O((m + n) k^2) a layer."""
    if learned.heads:
        raise ConfigError(
            f"this run trained {', '.join(learned.heads)} beside the adapter, which an adapter of one rank has no "
            "place for: write --format merged, or --format peft without --max-rank"
        )
    changes = {layer.name: learned.change(layer).to(torch.float64) for layer in learned.layers}
    best = {name: change.compress(rank) for name, change in changes.items()}
    norms = {name: change.norm() for name, change in changes.items()}
    lost = {name: (changes[name] - matrix).norm() for name, matrix in best.items()}
    one = max(matrix.k for matrix in best.values())
    padded = {n: LowRank(pad_to(m.B, (m.shape[0], one)), pad_to(m.A, (one, m.shape[1]))) for n, m in best.items()}
    relative = {name: lost[name] / (norms[name] or 1.0) for name in lost}
    worst = max(relative, key=relative.__getitem__)
    whole = math.hypot(*lost.values()) / (math.hypot(*norms.values()) or 1.0)
    return padded, Lost(one, whole, worst, relative[worst])


def _at_scale_one(peft_config: LoraConfig, pairs: Mapping[str, LowRank]) -> LoraConfig:
    """The config of these pairs: alpha equal to the rank, in every layer."""
    ranks = {name: pair.k for name, pair in pairs.items()}
    peft_config = copy.deepcopy(peft_config)
    peft_config.r = max(ranks.values())
    peft_config.lora_alpha, peft_config.use_rslora = peft_config.r, False
    peft_config.rank_pattern = {n: k for n, k in ranks.items() if k != peft_config.r}
    peft_config.alpha_pattern = dict(peft_config.rank_pattern)
    return peft_config


def _write(folder: Path, learned: Learned, pairs: Mapping[str, LowRank], peft_config: LoraConfig) -> None:
    """The files of an adapter; `peft_config` is changed."""
    tensors = {f"{PREFIX}{name}": learned.tensors[name] for name in learned.heads}
    for name, pair in pairs.items():
        tensors |= {f"{PREFIX}{name}.lora_B.weight": pair.B, f"{PREFIX}{name}.lora_A.weight": pair.A}
    peft_config.target_modules = sorted(pairs)
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
