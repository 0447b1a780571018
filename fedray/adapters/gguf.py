"""An adapter as llama.cpp loads it (`--lora`): GGUF of the kind that its own converter writes, by the package gguf."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedray.errors import ConfigError
from fedray.lowrank import LowRank

#: transformers' model types whose linear weights GGUF has in the same layout, but for the rows of q and k in those of
#: `_PERMUTED`; by what GGUF calls their architecture.
_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma": "GEMMA"}
#: Rotary halves lie interleaved there.
_PERMUTED = ("llama", "mistral")


def check_gguf(model_config: Any) -> None:
    """Raises ConfigError for an architecture that is not known here, and where the library is not there."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("--format gguf needs the package gguf: pip install fedray[gguf]")
    if model_config.model_type not in _ARCHITECTURES:
        raise ConfigError(
            f"--format gguf knows {', '.join(_ARCHITECTURES)}, and this is {model_config.model_type}: write --format "
            "peft --max-rank Q, and use llama.cpp's convert_lora_to_gguf.py"
        )


def write_gguf(path: Path, pairs: Mapping[str, LowRank], model_config: Any) -> None:
    """`pairs`: each layer's change (m x n), all of one rank, which is written as alpha, so that llama.cpp's scale is 1;
    fp32. `model_config`: transformers', of a model that `check_gguf` took."""
    import gguf

    kind, ranks = model_config.model_type, {pair.k for pair in pairs.values()}
    if len(ranks) > 1:
        raise ValueError(f"adapters of one rank, not of {sorted(ranks)}")
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[kind]]
    names = gguf.get_tensor_name_map(architecture, model_config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()))
    for name, pair in sorted(pairs.items()):
        B_mr, heads = pair.B, _heads(name, model_config) if kind in _PERMUTED else None
        place = f"{names.get_name(name)}.weight"
        writer.add_tensor(f"{place}.lora_a", _numbers(pair.A))
        writer.add_tensor(f"{place}.lora_b", _numbers(B_mr if heads is None else _interleaved(B_mr, heads)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _heads(name: str, model_config: Any) -> int | None:
    """Of a layer that makes queries or keys: how many heads its rows belong to."""
    of = {"q_proj": model_config.num_attention_heads, "k_proj": model_config.num_key_value_heads}
    return of.get(name.rsplit(".", 1)[-1])


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """A head's two rotary halves, row by row in turn."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.float().contiguous().cpu().numpy()
