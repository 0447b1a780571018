"""Which examples a local step takes: a function of the step and the seed, so that nothing has to be kept of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedray import seeding

#: Batches of which the examples are put in order of their lengths together.
GROUPED = 32


def sample(examples: int, batch: int, step: int, *seed: str | int, lengths: Sequence[int] | None = None) -> list[int]:
    """Indices of the batch at a step counted over the whole run: a fresh permutation every epoch, and no state.
    `lengths`: of the examples, where those of a batch are to be of similar lengths. O(examples log examples)."""
    orders: dict[int, list[int]] = {}
    picked = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, offset = divmod(position, examples)
        if epoch not in orders:
            generator = seeding.generator(*seed, "epoch", epoch)
            order: list[int] = torch.randperm(examples, generator=generator).tolist()
            orders[epoch] = order if lengths is None else _alike(order, lengths, batch, epoch, generator)
        picked.append(orders[epoch][offset])
    return picked


def _alike(order: list[int], lengths: Sequence[int], batch: int, epoch: int, generator: torch.Generator) -> list[int]:
    """An epoch's order in which the examples of a batch are of similar lengths: those of `GROUPED` batches at a time
    are sorted, and all batches mixed. Batches that lie over two epochs stay as they were drawn."""
    head = min(-epoch * len(order) % batch, len(order))
    whole = (len(order) - head) // batch * batch
    middle, block = order[head : head + whole], GROUPED * batch
    by_length = [
        i for start in range(0, whole, block) for i in sorted(middle[start : start + block], key=lengths.__getitem__)
    ]
    batches = [by_length[start : start + batch] for start in range(0, whole, batch)]
    mixed = [i for b in torch.randperm(len(batches), generator=generator).tolist() for i in batches[b]]
    return order[:head] + mixed + order[head + whole :]
