"""What a round takes: its seconds by phase, and the CPU threads that it runs on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fedray.adapters.base import Layer

#: Of the largest layer, from how many numbers on a second thread is worth waiting for: below, its wake-up takes longer
#: than the work, many times so where a worker has the core.
WORTH_THREADS = 1 << 20


def aggregation_threads(layers: Sequence[Layer]) -> int:
    """CPU threads of the aggregation: a function of the model and the machine, so that both engines give the same
    bits."""
    largest = max(layer.m * layer.n for layer in layers)
    return min(8, os.cpu_count() or 1) if largest >= WORTH_THREADS else 1


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
