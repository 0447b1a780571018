"""The PEFT layer that carries our products.

PEFT's extension points: its enum of tuners is closed to other packages (`register_peft_method` wants a member of `PeftType`), but
`LoraConfig._register_custom_module` lets a config bring its own layer class. So each of our adapters is a LoRA layer whose `lora_A`
entry is the whole product: PEFT finds the targets, saves, loads, merges and unmerges it; a loader must register the class first
(`attach.lora_config`), because PEFT does not write it into adapter_config.json. Exports need no fedray: they are plain LoRA.
"""

from __future__ import annotations

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fedray.adapters.base import Adapter, Layer


class FactoredLinear(LoraLinear):
    """PEFT's LoRA layer with `lora_A[NAME]` the whole product and no `lora_B`. Subclassed for an adapter by `peft_layer`."""

    adapter: Adapter

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config, **kwargs) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        weight = self.get_base_layer().weight
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)  # n x m; PEFT sets this for its own layers only
        self.scaling[adapter_name] = self.adapter.scaling(r, lora_alpha, config.use_rslora)
        layer = Layer("", self.out_features, self.in_features, r, self.scaling[adapter_name])
        self.lora_A[adapter_name] = self.adapter.module(layer).to(weight.device)
        del self.lora_B[adapter_name]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        delta = self.lora_A[adapter].dense() * self.scaling[adapter]
        return delta.T if self.fan_in_fan_out else delta

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters or self.merged:
            if self.merged and self.disable_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.lora_A:
                result = result + (self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]).to(result.dtype)
        return result


def peft_layer(adapter: Adapter) -> type[FactoredLinear]:
    """The layer class of an adapter, for `LoraConfig._register_custom_module`."""
    return type(f"{type(adapter).__name__}Linear", (FactoredLinear,), {"adapter": adapter})
