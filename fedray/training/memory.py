"""A client whose steps do not fit into a device's memory: what would, found by trying, in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fedray.config.sections import FederationSection

if TYPE_CHECKING:
    from fedray.ranks import Ranks
    from fedray.training.engine import StepEngine
    from fedray.training.local import LocalTrainer


class OutOfMemory(ValueError):
    """The sentence that a person reads."""


def out_of_memory(trainer: LocalTrainer, engine: StepEngine, config: FederationSection, client: str) -> OutOfMemory:
    """The error of a client whose step ran out of the device's memory. Takes steps of the client's longest sequences at
    rate 0 to see how many fit: the engine is to be thrown away."""
    examples = sorted(trainer.examples("train", client), key=lambda e: -len(e.input_ids))
    longest = len(examples[0].input_ids)

    def fits(sequences: int) -> bool:
        batch = trainer.batch([examples[i % len(examples)] for i in range(sequences)])
        try:
            engine.step([batch] * config.accumulate, trainer.task.loss, 0.0)
        except torch.OutOfMemoryError:
            return False
        finally:
            _let_go()
        return True

    _let_go()
    most = largest_that_fits(fits, config.micro_batch)
    rank = trainer.config.adapter.largest_rank
    had = f"{config.micro_batch} sequences of {longest} tokens at once and rank {rank} do not fit on {trainer.device}"
    if most:
        parts = -(-config.batch_size // most)
        accumulate = next(n for n in range(parts, config.batch_size + 1) if config.batch_size % n == 0)
        return OutOfMemory(f"{had}; {most} do: set federation.accumulate to {accumulate}, the batch stays the same")
    return OutOfMemory(
        f"{had}, nor does 1: lower adapter.rank or data.max_length, or use model.dtype bfloat16 or worker.zero_stage 3"
    )


def out_of_memory_on(ranks: Ranks, device: torch.device, config: FederationSection) -> OutOfMemory:
    """As `out_of_memory`, of a client of several ranks, without a try."""
    return OutOfMemory(
        f"{config.micro_batch} sequences at once over {ranks.world} ranks do not fit on {device}: raise "
        "federation.accumulate, lower adapter.rank or data.max_length, or use worker.zero_stage 3 or worker.offload"
    )


def largest_that_fits(fits: Callable[[int], bool], too_many: int) -> int:
    """The largest number below `too_many` that fits, 0 where none does; by bisection: log2(too_many) tries."""
    low, high = 0, too_many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _let_go() -> None:
    """What a step that failed still holds is given back, so that the next one finds what it would find."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
