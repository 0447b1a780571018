"""Registers of classes by name: methods, adapters and tasks each list theirs as `module.Class`, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any


def load(package: str, classes: Sequence[str]) -> Iterator[Any]:
    """The classes of a package, in their order. Raises TypeError for one that goes by another's name, which it would
    replace."""
    met: dict[str, str] = {}
    for path in classes:
        module, name = path.split(".")
        found = getattr(import_module(f"{package}.{module}"), name)
        label = str(getattr(found, "name", None) or getattr(found, "kind", path))
        if label in met:
            raise TypeError(f"{path} and {met[label]} go by one name, '{label}': state another in its own body")
        met[label] = path
        yield found
