"""Numbers as people read them, in terminals and pages alike."""

from __future__ import annotations

TITLES = {"bits_per_byte": "bits per byte", "accuracy": "accuracy"}


def size(count: float) -> str:
    """Bytes for a person: 1024-based, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return (
                f"{count:.0f} {unit}"
                if unit == "B"
                else f"{count:.3g} {unit}"
                if count < 1000
                else f"{count:.0f} {unit}"
            )
        count /= 1024
    raise AssertionError("unreachable")


def number(count: int) -> str:
    """Parameters for a person."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count:,}"


def share(value: float | None, form: str) -> str:
    """A relative error, or a word where it cannot be known."""
    return "not known" if value is None else format(value, form)
