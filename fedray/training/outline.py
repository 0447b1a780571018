"""The outline of a model: all that its costs follow from. The shapes that ship have theirs in a table, so that a plan
for them does without the libraries that build models; of any other it is read from the model built on the meta device.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.adapters.base import Layer, check_width
from fedray.config.build import make_adapter
from fedray.data.tasks import TASKS

if TYPE_CHECKING:
    from fedray.config.sections import AdapterSection, Config

#: `NAME.json`: the model's own config; `NAME.linear.json`: its linear layers (`jobs/outline_shapes.py` wrote them).
SHAPES = Path(__file__).parent.parent / "assets" / "shapes"
_TABLE = ".linear.json"


@dataclass(frozen=True)
class Outline:
    """`base`, `heads`: numbers of parameters, frozen and trained whole. `layers`: the adapted ones. `blocks`, `hidden`,
    `inner`, `vocabulary`: of a transformer, 0 where the model's config does not say."""

    base: int
    heads: int
    layers: tuple[Layer, ...]
    blocks: int
    hidden: int
    inner: int
    vocabulary: int


def shape_names() -> list[str]:
    """Names of the model shapes that ship with the package, for `fedray plan`."""
    return sorted(path.stem for path in SHAPES.glob("*.json") if not path.name.endswith(_TABLE))


def make_outline(config: Config, classes: int = 2) -> Outline:
    """The outline of the config's model with its adapter. Raises ConfigError as `skeleton` does."""
    return _from_table(config) or from_skeleton(config, classes)


def from_skeleton(config: Config, classes: int = 2) -> Outline:
    """Of any model. Raises ConfigError as `skeleton` does."""
    from fedray.adapters import attach
    from fedray.training.model import read_model_config, skeleton

    model = skeleton(config, classes)
    heads = sum(p.numel() for p in attach.heads(model).values())
    adapters = sum(p.numel() for p in attach.factors(model).values())
    base = sum(p.numel() for p in model.parameters()) - adapters - heads
    return _outline(base, heads, attach.layers(model), vars(read_model_config(config)))


def _outline(base: int, heads: int, layers: tuple[Layer, ...], shape: dict[str, Any]) -> Outline:
    hidden = shape.get("hidden_size") or 0
    return Outline(
        base,
        heads,
        layers,
        blocks=shape.get("num_hidden_layers") or 0,
        hidden=hidden,
        inner=shape.get("intermediate_size") or 4 * hidden,
        vocabulary=shape.get("vocab_size") or 0,
    )


def _from_table(config: Config) -> Outline | None:
    """None for what the table does not hold: another model, other heads, layers named by an expression or not at
    all."""
    path, section = config.model.path, config.adapter
    known = path in shape_names() and TASKS[config.model.task].model == "causal-lm" and not section.heads
    table = _table(path) if known else None
    names = _adapted(table["linear"], section) if table else []
    if not table or not names:
        return None
    adapter, rank = make_adapter(section), section.largest_rank
    scale = adapter.scaling(rank, adapter.alpha(rank) if section.alpha is None else section.alpha, section.rslora)
    layers = tuple(Layer(name, m, n, rank, scale) for name, (m, n) in ((name, table["linear"][name]) for name in names))
    for layer in layers:
        check_width(adapter, layer)
    return _outline(table["parameters"], 0, layers, json.loads((SHAPES / f"{path}.json").read_text()))


@cache
def _table(name: str) -> dict[str, Any]:
    """`parameters`: all of the model's. `linear`: (m, n) of its linear layers by name, but for the output's."""
    table: dict[str, Any] = json.loads((SHAPES / f"{name}{_TABLE}").read_text())
    blocks = {
        f"model.layers.{i}.{part}": shape for part, shape in table["block"].items() for i in range(table["blocks"])
    }
    return {"parameters": table["parameters"], "linear": blocks}


def _adapted(linear: dict[str, Any], section: AdapterSection) -> list[str]:
    """The layers that `adapter.targets` means, sorted; none where one of the targets is no layer of the table."""
    if section.targets == "all-linear":
        return sorted(linear)
    if isinstance(section.targets, str) and not section.targets.isidentifier():
        return []  # a regular expression
    targets = (section.targets,) if isinstance(section.targets, str) else section.targets
    by_target = [[name for name in linear if name.endswith(f".{target}")] for target in targets]
    return sorted({name for names in by_target for name in names}) if all(by_target) else []
