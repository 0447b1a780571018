"""What is written down of a round: one object of `rounds.jsonl`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

Metrics = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Metrics on held-out examples: over all, by group of examples where there are groups, by client where clients are
    measured. `store_error`: Frobenius norm of what the base's dtype could not hold of the base update."""

    metrics: Metrics
    store_error: float
    groups: dict[str, Metrics] = field(default_factory=dict)
    client_metrics: dict[str, Metrics] | None = None

    def to_json(self) -> dict[str, Any]:
        """Groups and clients only where there are any."""
        values: dict[str, Any] = {"metrics": self.metrics, "store_error": self.store_error}
        if self.groups:
            values["groups"] = self.groups
        if self.client_metrics is not None:
            values["client_metrics"] = self.client_metrics
        return values


@dataclass(frozen=True)
class RoundRecord:
    """A finished round (`round` from 1). Errors are relative Frobenius norms, None where they cannot be known; bytes
    are of all clients together; `ideal_norm` is the errors' denominator.

    `cohort` is None where it is a secret. `standard_error`: of `aggregation_error` and `exactness`, where they are
    estimates. `wire_error`: what rounding took from the updates on their way; where it is None, nothing. `shortened`:
    by client, rows that `data.max_length` cut. `arrivals`: each update's client and the version that it started from,
    of rounds that wait for nobody in particular. `clip`: the round's and the next one's, of client-level privacy.
    `stopped`: why no round may follow.
    """

    round: int
    cohort: list[str] | None
    dropped: list[dict[str, str]]
    train_loss: float | None
    bytes_up: int
    bytes_down: int
    aggregation_error: float | None
    exactness: float | None
    ideal_norm: float | None
    evaluation: Evaluation | None = None
    epsilon: dict[str, float] | None = None
    standard_error: tuple[float, float] | None = None
    wire_error: float | None = None
    shortened: dict[str, int] = field(default_factory=dict)
    arrivals: list[tuple[str, int]] | None = None
    clip: tuple[float, float] | None = None
    stopped: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def replace(self, **changes: Any) -> RoundRecord:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `store_error` relative to `ideal_norm`. What most runs do not have is left out where it is
        None."""
        values: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _APART
        }
        values |= {"metrics": None, "store_error": None}
        if self.standard_error is not None:
            values["standard_error"] = dict(zip(("aggregation_error", "exactness"), self.standard_error, strict=True))
        if self.wire_error is not None:
            values["wire_error"] = self.wire_error
        if self.shortened:
            values["shortened"] = self.shortened
        if self.arrivals is not None:
            values["arrivals"] = [list(arrival) for arrival in self.arrivals]
        if self.clip is not None:
            values |= {"clip": self.clip[0], "next_clip": self.clip[1]}
        if self.stopped is not None:
            values["stopped"] = self.stopped
        if self.evaluation is not None:
            values |= self.evaluation.to_json()
            if values["store_error"]:
                values["store_error"] /= self.ideal_norm or 1.0
        return values | {"seconds": dict(self.seconds)}


_APART = {"evaluation", "standard_error", "wire_error", "shortened", "arrivals", "clip", "stopped", "seconds"}
