"""Adapters: how a layer's update is parametrised. One file a kind; this is their register."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedray.adapters.abba import Abba
from fedray.adapters.base import Adapter, Layer
from fedray.adapters.lora import Lora
from fedray.adapters.lora_sb import LoraSB
from fedray.adapters.ravan import Ravan

if TYPE_CHECKING:  # config stands above the adapters
    from fedray.config import AdapterSection

ADAPTERS: dict[str, type[Adapter]] = {adapter.kind: adapter for adapter in (Lora, LoraSB, Abba, Ravan)}


def make_adapter(section: AdapterSection) -> Adapter:
    """The adapter value that a config's section means. The section has been validated."""
    options = {"abba": {"scale": section.scale or "paper"}, "ravan": {"cores": section.cores or 4}}
    return ADAPTERS[section.kind](**options.get(section.kind, {}))


__all__ = ["ADAPTERS", "Adapter", "Layer", "make_adapter"]
