"""A number for each text, or pair of texts (GLUE's STS-B)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedray.data.columns import require_column
from fedray.data.tasks.base import Batch, Example, Forward, Model, Statistics
from fedray.data.tasks.classification import TEXT_PAIR, SequenceTask
from fedray.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset


class Regression(SequenceTask):
    """The number in the column `data.label`, by squared error. Metrics: Pearson's and Spearman's correlation (0 where
    either side is constant), mean squared error (`loss`). An example keeps its number in `about`."""

    name = "regression"
    model = "classification"
    metric = "pearson"
    reported: ClassVar[dict[str, bool]] = {"pearson": True, "spearman": True, "loss": False}
    higher_is_better = True
    target = "label"
    labelled = False
    options: ClassVar[dict[str, str]] = {"text_pair": TEXT_PAIR}
    takes_builtin = False

    @classmethod
    def outputs(cls, classes: int) -> int | None:
        return 1

    def check_rows(self, examples: Dataset, held_out: bool) -> None:
        self._numbers(examples)

    def _numbers(self, examples: Dataset) -> list[float]:
        """Raises ConfigError for a row without a finite number."""
        column, numbers = require_column(examples, self.config.data.label, "data.label"), []
        for i, value in enumerate(examples[column]):
            try:
                numbers.append(float(value))
            except (TypeError, ValueError):
                numbers.append(math.nan)
            if not math.isfinite(numbers[-1]):
                raise ConfigError(
                    f"row {i + 1}: {value!r} in column '{column}' is no number: leave the row out, or give data.label "
                    "another column"
                )
        return numbers

    def encode(self, examples: Dataset) -> list[Example]:
        rows = zip(self._texts(examples), self._numbers(examples), self._groups(examples), strict=True)
        return [Example(ids, [], 1.0, group, repr(number), cut) for (ids, cut), number, group in rows]

    def collate(self, examples: Sequence[Example]) -> Batch:
        return self._inputs(examples) | {"labels": torch.tensor([float(e.about) for e in examples])}

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        return (forward(batch)[:, 0].float() - batch["labels"]).square()

    def statistics(self, model: Model, examples: Sequence[Example], batch: Batch) -> list[Statistics]:
        guesses = model.forward(batch)[:, 0].double().tolist()
        return [
            {"group": e.group, "guess": guess, "label": float(e.about)}
            for e, guess in zip(examples, guesses, strict=True)
        ]

    def metrics(self, statistics: Sequence[Statistics]) -> dict[str, float]:
        from scipy.stats import pearsonr, spearmanr  # a slow import that only this needs

        labels, guesses = [s["label"] for s in statistics], [s["guess"] for s in statistics]
        constant = len(set(labels)) < 2 or len(set(guesses)) < 2
        return {
            "pearson": 0.0 if constant else float(pearsonr(labels, guesses).statistic),
            "spearman": 0.0 if constant else float(spearmanr(labels, guesses).statistic),
            "loss": math.fsum((y - g) ** 2 for y, g in zip(labels, guesses, strict=True)) / len(labels),
        }
