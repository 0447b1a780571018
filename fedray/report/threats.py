"""Who learns what, on the terminal."""

from __future__ import annotations

from rich.console import Console

from fedray.federation.channels.threats import MODES, THREATS


def print_threats(console: Console) -> None:
    """A line for each mode; one where all are the same."""
    for who, learns in THREATS.items():
        console.print(who)
        same = len(set(learns.values())) == 1
        for mode in [next(iter(MODES))] if same else MODES:
            console.print(f"  {'in every mode' if same else MODES[mode].replace('`', '')}: {learns[mode]}")
