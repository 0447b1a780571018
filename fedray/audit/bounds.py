"""What noise is drawn for, measured: how far one example, or one client that says what it likes, moves a sum before its
noise; and whether a run's records tell the size of a cohort that is a secret."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedray.federation.wire import pack
from fedray.privacy import client_level
from fedray.training.local import LocalTrainer

#: How many examples are left out of a sum, one after the other.
EXAMPLES = 8
#: How much of a clip fp32 may add to it.
ROUNDING = 1e-3
#: What a client that keeps to nothing says.
HOSTILE = 1e6


def example_moves(trainer: LocalTrainer, client: str, clip: float) -> float:
    """The furthest that one of a client's first examples moves the sum of their clipped gradients, in clips. The model
    is that of the last round; costs EXAMPLES + 1 passes over as many examples."""
    every = trainer.examples("train", client)
    examples = [every[i] for i in range(min(EXAMPLES, len(every)))]
    whole = trainer.clipped_sum(examples, clip)
    sums = (trainer.clipped_sum(examples[:i] + examples[i + 1 :], clip) for i in range(len(examples)))
    return max(torch.linalg.vector_norm(whole - without).item() for without in sums) / clip


def hostile(reference: Mapping[str, Tensor], says: bool) -> Any:
    """The packet of a client that clips nothing and, where it is asked, says any number of the clip."""
    update = {name: torch.full(t.shape, HOSTILE) for name, t in reference.items()}
    return pack(update | ({client_level.WITHIN: torch.tensor([HOSTILE])} if says else {}))


def tells_of(records: Sequence[Mapping[str, Any]], drawn: Sequence[Sequence[str]]) -> list[str]:
    """The records' fields that name who was drawn in a round, or are in each a multiple of how many were."""
    told = []
    for path in dict(_leaves(records[0], list)):
        named = [dict(_leaves(record, list)).get(path, []) for record in records]
        if any(names and sorted(map(str, names)) == sorted(who) for names, who in zip(named, drawn, strict=True)):
            told.append(path)
    sizes = [len(who) for who in drawn]
    if len(set(sizes)) < 2:  # then a field that never changes is a multiple, too
        return told
    numbers = [dict(_leaves(record, (int, float))) for record in records]
    for path in numbers[0]:
        values = [float(n.get(path) or 0.0) for n in numbers]
        share = max(values) / max(sizes)
        if share and all(math.isclose(v, share * size, rel_tol=1e-9) for v, size in zip(values, sizes, strict=True)):
            told.append(path)
    return told


def _leaves(record: Mapping[str, Any], kind: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of that kind, with the path of each."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, kind, f"{path}{name}.")
        elif isinstance(value, kind) and not isinstance(value, bool):
            yield f"{path}{name}", value
