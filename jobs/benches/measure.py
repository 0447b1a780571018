"""Times, memory and tables that the benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from rich.table import Table
from torch import nn

Result = TypeVar("Result")
MIB = 2**20


def table(title: str, columns: Iterable[str]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=title)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    return made


def threads() -> str:
    """What a title says of the machine."""
    return f"{torch.get_num_threads()} CPU threads"


def device_here() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def timed(call: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """Median seconds of a call, and its last result."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def timed_once(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, until the device is done."""
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """The median of the turns' ratios: drift of the machine hits both sides of each alike."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most bytes that PyTorch holds at one moment during a call, beyond what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return allocated(call)[0]


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes of a call on the CPU: the most at one moment beyond what was held before, and of its largest tensor."""
    held = most = largest = 0
    for _, size in sorted(_allocations(call), key=lambda event: event[0]):
        held += size
        most, largest = max(most, held), max(largest, size)
    return most, largest


def _allocations(call: Callable[[], object]) -> list[tuple[int, int]]:
    """(time in ns, bytes; negative where they are freed) of what a call allocates on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]


def standing_bytes(model: nn.Module) -> int:
    """Bytes of a model between steps: its parameters, and of those that train the gradient and AdamW's two moments
    (fp32)."""
    return sum(p.numel() * (p.element_size() + (12 if p.requires_grad else 0)) for p in model.parameters())
