"""How lists and mappings are written on a command line: text into plain values; what YAML gave stays as it is."""

from __future__ import annotations

import re
from typing import Any


def ranks(value: Any) -> Any:
    """`8`, `8,4,4` or `{ward: 4, icu: 8}` (on the command line: ward=4,icu=8)."""
    if isinstance(value, str) and "=" in value:
        pairs = [part.split("=", 1) for part in value.split(",")]
        if bad := next((pair for pair in pairs if len(pair) != 2 or not pair[0] or not pair[1].isdigit()), None):
            raise ValueError(f"'{'='.join(bad)}' is no NAME=RANK: write client-0=8,client-1=4")
        return dict(pairs)
    return names(value)


def labels(value: Any) -> Any:
    """`{silo: a, zone: in(x,y)}`; on the command line silo=a,zone=in(x,y)."""
    if not isinstance(value, str):
        return value
    pairs = [part.split("=", 1) for part in re.split(r",(?![^()]*\))", value)]
    if bad := next((pair for pair in pairs if len(pair) != 2 or not all(pair)), None):
        raise ValueError(f"'{'='.join(bad)}' is no KEY=VALUE: write silo=a,zone=b")
    return dict(pairs)


def names(value: Any) -> Any:
    """One word, or several with commas between."""
    return tuple(v.strip() for v in value.split(",")) if isinstance(value, str) and "," in value else value


def heads(value: Any) -> Any:
    """Comma-separated, none at all where the text is empty."""
    return tuple(name for name in value.split(",") if name) if isinstance(value, str) else value


def trackers(value: Any) -> Any:
    """As `names`, always several; null: none."""
    if value is None:
        return ()
    several = names(value)
    return (several,) if isinstance(several, str) else several
