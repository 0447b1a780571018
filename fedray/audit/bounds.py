"""What noise is drawn for, measured: how far one example, or one client that says what it likes, moves a sum before its
noise; and whether a run's records tell the size of a cohort that is a secret."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedray.federation.wire import Packet, pack
from fedray.privacy import client_level
from fedray.training.local import LocalTrainer

#: How many examples are left out of a sum, one after the other.
EXAMPLES = 8
#: How much of a clip fp32 may add to it.
ROUNDING = 1e-3
#: Of a record's numbers, what anyone knows before the run.
KNOWN_BEFORE = ("round",)
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


def hostile(reference: Mapping[str, Tensor], says: bool) -> Packet:
    """The packet of a client that clips nothing and, where it is asked, says any number of the clip."""
    update = {name: torch.full(t.shape, HOSTILE) for name, t in reference.items()}
    return pack(update | ({client_level.WITHIN: torch.tensor([HOSTILE])} if says else {}))


def tells_of(records: Sequence[Mapping[str, Any]], drawn: Sequence[Sequence[str]]) -> list[str]:
    """The records' fields that name who was drawn in a round, or are in each a multiple of how many were."""
    if not records:
        return []
    lists = [dict(_leaves(record, list)) for record in records]
    numbers = [dict(_leaves(record, (int, float))) for record in records]
    named = [path for path in lists[0] if _names([fields.get(path, []) for fields in lists], drawn)]
    sizes = [len(who) for who in drawn]
    if len(set(sizes)) < 2:  # then a field that never changes is a multiple, too
        return named
    paths = [path for path in numbers[0] if path not in KNOWN_BEFORE]
    return named + [path for path in paths if _follows([fields.get(path) or 0.0 for fields in numbers], sizes)]


def _names(lists: Sequence[list], drawn: Sequence[Sequence[str]]) -> bool:
    """Whether one of the lists is of those who were drawn in its round."""
    return any(names and sorted(map(str, names)) == sorted(who) for names, who in zip(lists, drawn, strict=True))


def _follows(values: Sequence[float], sizes: Sequence[int]) -> bool:
    """Whether each value is the same multiple, other than 0, of its round's size."""
    share = max(values) / max(sizes)
    same = (math.isclose(value, share * size, rel_tol=1e-9) for value, size in zip(values, sizes, strict=True))
    return share != 0 and all(same)


def _leaves(record: Mapping[str, Any], kind: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of that kind, with the path of each."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, kind, f"{path}{name}.")
        elif isinstance(value, kind) and not isinstance(value, bool):
            yield f"{path}{name}", value
