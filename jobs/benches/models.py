"""Models of random weights that the benchmarks step on."""

from __future__ import annotations

import torch
from torch import nn

from fedray.adapters import attach
from fedray.config.read import from_dict


def encoder(kind: str, rank: int, hidden: int, layers: int) -> nn.Module:
    """A BERT of random weights with adapters on all linear layers of its encoder; LoHa is PEFT's own."""
    from peft import LoHaConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        intermediate_size=4 * hidden,
        vocab_size=1000,
    )
    model = BertForSequenceClassification(shape)
    targets = ("query", "key", "value", "dense")
    if kind == "loha":
        return get_peft_model(
            model, LoHaConfig(r=rank // 2, alpha=rank, target_modules=list(targets), exclude_modules="classifier")
        )
    method = {"lora-sb": "fed-sb", "ravan": "ravan"}.get(kind, "fedex")
    config = from_dict({"adapter": {"kind": kind, "rank": rank, "targets": targets}, "method": {"name": method}})
    return attach.attach(model, config.adapter, "classification")


def layer(kind: str, rank: int, width: int) -> nn.Module:
    """One width x width layer."""
    from peft import LoHaConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    if kind == "loha":
        return get_peft_model(model, LoHaConfig(r=rank // 2, alpha=rank, target_modules=["0"]))
    section = from_dict({"adapter": {"kind": kind, "rank": rank}}).adapter
    config = attach.lora_config(section.model_copy(update={"targets": ("0",)}), "causal-lm")
    config.task_type = None
    return get_peft_model(model, config)
