"""Registers of classes by name: methods, adapters and tasks each list theirs as `module.Class`, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any


def load(package: str, classes: Sequence[str]) -> Iterator[Any]:
    """The classes of a package, in their order."""
    for path in classes:
        module, name = path.split(".")
        yield getattr(import_module(f"{package}.{module}"), name)
