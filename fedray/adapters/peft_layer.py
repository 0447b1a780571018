"""The PEFT layer that carries our products.

PEFT's extension points: its enum of tuners is closed to other packages (`register_peft_method` wants a member of
`PeftType`), but `LoraConfig._register_custom_module` lets a config bring its own layer class. So each of our adapters
is a LoRA layer whose `lora_A` entry is the whole product: PEFT finds the targets, saves, loads, merges and unmerges
it; a loader must register the class first (`attach.lora_config`), because PEFT does not write it into
adapter_config.json. Exports need no fedray: they are plain LoRA.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fedray.adapters.base import Adapter, Layer
from fedray.adapters.modules import Product


class FactoredLinear(LoraLinear):
    """PEFT's LoRA layer with `lora_A[NAME]` the whole product and no `lora_B`. Subclassed for an adapter by
    `peft_layer`."""

    adapter: Adapter

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        base = self.get_base_layer()
        self.fan_in_fan_out = isinstance(base, Conv1D)  # n x m; PEFT sets this for its own layers only
        self.scaling[adapter_name] = self.adapter.scaling(r, lora_alpha, config.use_rslora)
        m, n = self.out_features, self.in_features
        product = (
            None if m is None or n is None else self.adapter.module(Layer("", m, n, r, self.scaling[adapter_name]))
        )
        if product is None:
            raise TypeError(f"{self.adapter.kind} has no product for a layer of {m} x {n}")
        self.lora_A[adapter_name] = product.to(base.get_parameter("weight").device)
        del self.lora_B[adapter_name]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _product(self, adapter: str) -> Product:
        product = self.lora_A[adapter]
        if not isinstance(product, Product):
            raise TypeError(f"adapter '{adapter}' is {type(product).__name__}, and no product of factors")
        return product

    def get_delta_weight(self, adapter: str) -> Tensor:
        delta = self._product(adapter).dense() * self.scaling[adapter]
        return delta.T if self.fan_in_fan_out else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged and self.disable_adapters:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                result = result + (self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]).to(result.dtype)
        return result


def peft_layer(adapter: Adapter) -> type[FactoredLinear]:
    """The layer class of an adapter, for `LoraConfig._register_custom_module`."""
    return type(f"{type(adapter).__name__}Linear", (FactoredLinear,), {"adapter": adapter})
