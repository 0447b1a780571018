"""Adapters: how a layer's update is parametrised. One file a kind; this is their register."""

from __future__ import annotations

from fedray.adapters.base import Adapter, Layer
from fedray.registers import load

#: Module and class of each adapter, in the order in which tables show them. A new one is its file and a line here.
_CLASSES = (
    "lora.Lora",
    "lora_sb.LoraSB",
    "abba.Abba",
    "ravan.Ravan",
)

ADAPTERS: dict[str, type[Adapter]] = {adapter.kind: adapter for adapter in load(__name__, _CLASSES)}

#: Those with a pair of factors in whose product the delta is linear, and those whose cores alone train.
PAIRED = tuple(kind for kind, adapter in ADAPTERS.items() if adapter.pair is not None)
CORED = tuple(kind for kind, adapter in ADAPTERS.items() if adapter.pair is None)

__all__ = ["ADAPTERS", "CORED", "PAIRED", "Adapter", "Layer"]
