"""What a sweep's trials on one machine share: tokenised data and base weights."""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from benches.measure import MIB, table
from fedray.config.read import read_config
from fedray.data.encoded import encode
from fedray.data.partition import load_data
from fedray.data.tasks import TASKS
from fedray.training.model import load_model, load_tokenizer

LINES = (
    ("its own examples, as lists", "lists"),
    ("examples, by the trial that leaves them", "file"),
    ("examples, mapped by every other trial", "file"),
    ("base weights, mapped", "weights"),
)


def sharing(console: Console, flags: list[str]) -> None:
    """A trial's tokenised examples: made by it, or mapped from what another trial made; and the base weights, mapped
    from their own file. Each line in a new process."""
    config = read_config(flags)
    rows = sum(map(len, load_data(config).train.values()))
    shown = table(
        f"{rows:,} rows of {Path(config.data.source).name} for {Path(config.model.path).name}",
        ("what a trial holds", "seconds", "private MiB", "of MiB"),
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, what in LINES:
            with ProcessPoolExecutor(1, get_context("spawn")) as one:
                seconds, grown, size = one.submit(held, what, flags, folder).result()
            shown.add_row(name, f"{seconds:.2f}", f"{grown / MIB:.1f}", f"{size / MIB:.1f}" if size else "")
    console.print(shown)


def held(what: str, flags: list[str], folder: str) -> tuple[float, int, int]:
    """Seconds, growth of private memory, and (of weights) all bytes, of what a trial holds; to be called in a new
    process."""
    config = read_config(flags)
    data = load_data(config)
    task = TASKS[config.model.task](config, data, load_tokenizer(config))
    before, started, size = private_bytes(), time.perf_counter(), 0
    kept: Any
    read: Any = None
    if what == "weights":
        kept = load_model(config, len(data.classes))
        size = sum(p.numel() * p.element_size() for p in kept.parameters())
        read = sum(p.sum().item() for p in kept.parameters())
    elif what == "lists":
        kept = [task.encode(rows) for rows in data.train.values()]
    else:
        kept = [encode(task, rows, folder) for rows in data.train.values()]
        read = [packed.digest() for packed in kept]  # every page once
    seconds = time.perf_counter() - started
    grown = private_bytes() - before
    del kept, read
    return seconds, grown, size


def private_bytes() -> int:
    """Memory that is this process's alone and would have to be kept: written to, and no clean copy of a file's pages.
    Linux only."""
    with open("/proc/self/smaps_rollup") as file:
        return sum(1024 * int(line.split()[1]) for line in file if line.startswith("Private_Dirty:"))
