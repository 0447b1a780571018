"""Mathematical word problems (GSM8K, MATH): worked answers are learned, and what they come to is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from fedray.data.tasks.answers import result_of, same_result
from fedray.data.tasks.base import Example, Statistics
from fedray.data.tasks.generating import Generating
from fedray.data.tasks.instruction import COLUMNS, WORDS
from fedray.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset


class Math(Generating):
    """Problems with a worked answer. Metrics: share of the answers that the model says whose result is right (as a
    number; what is no number, as text), share from which a result can be told, mean loss."""

    name = "math"
    model = "causal-lm"
    metric = "accuracy"
    reported: ClassVar[dict[str, bool]] = {"accuracy": True, "answered": True, "loss": False}
    higher_is_better = True
    target = "completion"
    labelled = False
    options: ClassVar[dict[str, str]] = COLUMNS | WORDS
    takes_builtin = False

    def reference(self, examples: Dataset, i: int, answer: str) -> str:
        found = result_of(answer)
        if found is None:
            raise ConfigError(
                f"the answer of row {i + 1} of the held-out data comes to no result: mark it (#### 72, \\boxed{{72}})"
            )
        return found

    def judged(self, example: Example, said: str) -> Statistics:
        found = result_of(said)
        return {"right": float(same_result(found, example.about)), "answered": float(found is not None)}

    def metrics(self, statistics: Sequence[Statistics]) -> dict[str, float]:
        count = max(1, len(statistics))
        return {
            "accuracy": sum(s["right"] for s in statistics) / count,
            "answered": sum(s["answered"] for s in statistics) / count,
            **super().metrics(statistics),
        }
