"""The config as a JSON schema, for editors that complete and check YAML."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedray.adapters import ADAPTERS
from fedray.config.sections import Config
from fedray.data.tasks import TASKS
from fedray.methods import METHODS

#: Names that are looked up in a register, which the types alone do not say.
_NAMES: dict[tuple[str, str], Iterable[str]] = {
    ("MethodSection", "name"): METHODS,
    ("AdapterSection", "kind"): ADAPTERS,
    ("ModelSection", "task"): TASKS,
}


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config's YAML: every key with its doc, type, default and bounds. What it takes
    may still be refused for what does not go together."""
    found = Config.model_json_schema()
    for (section, field), register in _NAMES.items():
        found["$defs"][section]["properties"][field]["enum"] = sorted(register)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "fedray"}
