"""What a round takes: its seconds by phase, and the CPU threads that it runs on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: CPU threads of the aggregation: a constant of the machine, so that both engines give the same bits.
AGGREGATION_THREADS = min(8, os.cpu_count() or 1)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note the seconds of what is inside, unless it raises."""
    started = time.monotonic()
    yield
    seconds[phase] = round(time.monotonic() - started, 4)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's CPU threads for a while: they are part of what fixes the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
