"""Adapters: how a layer's update is parametrised. One file a kind; this is their register."""

from fedray.adapters.base import Adapter, Layer
from fedray.adapters.lora import Lora

ADAPTERS: dict[str, Adapter] = {adapter.kind: adapter for adapter in (Lora(),)}

__all__ = ["ADAPTERS", "Adapter", "Layer"]
