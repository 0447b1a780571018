"""Numbers as people read them, in terminals and pages alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB")


def title(metric: str) -> str:
    """A metric's name for a person."""
    return metric.replace("_", " ")


def size(count: float) -> str:
    """Bytes for a person: 1024-based, three digits."""
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    whole = power == 0 or count >= 1000
    return f"{count:{'.0f' if whole else '.3g'}} {_UNITS[power]}"


def number(count: int) -> str:
    """Parameters for a person."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count:,}"


def measured(record: Mapping[str, Any], name: str, form: str) -> str:
    """A round's relative error, with its standard error where it is an estimate."""
    deviation = record.get("standard_error", {}).get(name, 0.0)
    return share(record[name], form) + (f" ± {deviation:{form}}" if deviation else "")


def share(value: float | None, form: str) -> str:
    """A relative error, or a word where it cannot be known."""
    return "not known" if value is None else format(value, form)
