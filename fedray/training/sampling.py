"""Which examples a local step takes: a function of the step and the seed, so that nothing has to be kept of it."""

from __future__ import annotations

import numpy as np
import torch

from fedray import seeding

#: Batches of which the examples are put in order of their lengths together.
GROUPED = 32


def sample(examples: int, batch: int, step: int, *seed: str | int, lengths: np.ndarray | None = None) -> list[int]:
    """Indices of the batch at a step counted over the whole run: a fresh permutation every epoch, and no state.
    `lengths`: of the examples, where those of a batch are to be of similar lengths. O(examples), and with lengths
    O(examples log batch)."""
    orders: dict[int, np.ndarray] = {}
    picked = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, offset = divmod(position, examples)
        if epoch not in orders:
            generator = seeding.generator(*seed, "epoch", epoch)
            order = torch.randperm(examples, generator=generator).numpy()
            orders[epoch] = order if lengths is None else _alike(order, lengths, batch, epoch, generator)
        picked.append(int(orders[epoch][offset]))
    return picked


def _alike(order: np.ndarray, lengths: np.ndarray, batch: int, epoch: int, generator: torch.Generator) -> np.ndarray:
    """An epoch's order in which the examples of a batch are of similar lengths: those of `GROUPED` batches at a time
    are sorted, and all batches mixed. Batches that lie over two epochs stay as they were drawn."""
    head = min(-epoch * len(order) % batch, len(order))
    whole = (len(order) - head) // batch * batch
    middle = order[head : head + whole]
    blocks = np.arange(whole) // (GROUPED * batch)
    batches = middle[np.lexsort((lengths[middle], blocks))].reshape(-1, batch)  # by block first; equal ones as drawn
    mixed = batches[torch.randperm(len(batches), generator=generator).numpy()].reshape(-1)
    return np.concatenate([order[:head], mixed, order[head + whole :]])
