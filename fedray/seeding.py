"""One way to derive seeds, so that nothing random depends on processes, order or Python's hash."""

from __future__ import annotations

import hashlib

import torch


def derive(*parts: str | int) -> int:
    """A 63-bit seed from the words and numbers that name what is drawn, e.g. `derive(seed, "cohort", round)`."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: str | int) -> torch.Generator:
    """A CPU generator seeded with `derive(*parts)`: the same numbers on every machine and device."""
    return torch.Generator().manual_seed(derive(*parts))
