"""What workers tell the coordinator beside tensors. Apart from both, so that the coordinator need not import a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """What a client's round gives beside its update; no data, only sizes and means."""

    client: str
    examples: int
    train_loss: float
    base_lost: float
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A client's error as a value, so that it reaches the person as a sentence and not as a remote traceback."""

    client: str
    cause: str
    details: str
