"""Write the tables of the shapes that ship, from which `fedray plan` reads their layers.

    python jobs/outline_shapes.py

For each `fedray/assets/shapes/NAME.json` (a model's own config) it builds the model on the meta device and writes
`NAME.linear.json`: how many parameters there are, how many blocks, and the linear layers of a block with their sizes
(out x in).
"""

import json
import re

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fedray.training.outline import SHAPES, shape_names

IN_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def table_of(name: str) -> dict:
    """Raises ValueError for a model whose blocks differ: a table has no room for that."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(SHAPES / f"{name}.json")))
    blocks: dict[int, dict[str, tuple[int, int]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            number, part = IN_BLOCK.fullmatch(path).groups()
            blocks.setdefault(int(number), {})[part] = (module.out_features, module.in_features)
    if any(block != blocks[0] for block in blocks.values()):
        raise ValueError(f"the blocks of {name} differ")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "blocks": len(blocks),
        "block": dict(sorted(blocks[0].items())),
    }


if __name__ == "__main__":
    for name in shape_names():
        (SHAPES / f"{name}.linear.json").write_text(json.dumps(table_of(name), indent=1) + "\n")
