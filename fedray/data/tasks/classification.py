"""Classification of texts, or of pairs of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedray.data.columns import require_column
from fedray.data.tasks.base import Batch, Example, Forward, Model, Statistics, Task

if TYPE_CHECKING:
    from datasets import Dataset


class Classification(Task):
    """One class a text (or pair of texts). Metrics: accuracy, macro F1, Matthews correlation, mean loss."""

    name = "classification"
    model = "classification"
    metric = "accuracy"
    reported: ClassVar[dict[str, bool]] = {"accuracy": True, "f1": True, "mcc": True, "loss": False}
    higher_is_better = True
    target = "label"
    labelled = True
    options: ClassVar[dict[str, str]] = {"text_pair": "Column with a second text (classification of pairs)."}
    takes_builtin = False

    def encode(self, examples: Dataset) -> list[Example]:
        config, data = self.config.data, self.data
        index = {value: i for i, value in enumerate(data.classes)}
        texts = [list(examples[data.text])]
        if config.text_pair:
            texts.append(list(examples[require_column(examples, config.text_pair, "data.text_pair")]))
        encoded = self.tokenizer(*texts, truncation=True, max_length=config.max_length)
        labels, groups = list(examples[config.label]), self._groups(examples)
        return [
            Example(ids, [index[y]], 1.0, g) for ids, y, g in zip(encoded["input_ids"], labels, groups, strict=True)
        ]

    def collate(self, examples: Sequence[Example]) -> Batch:
        return self._inputs(examples) | {"labels": torch.tensor([e.labels[0] for e in examples])}

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        return self.losses(forward, batch).mean()

    def counted(self, batch: Batch) -> int:
        return len(batch["labels"])

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        return torch.nn.functional.cross_entropy(forward(batch).float(), batch["labels"], reduction="none")

    def statistics(self, model: Model, examples: Sequence[Example], batch: Batch) -> list[Statistics]:
        logits = model.forward(batch).float()
        losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none").double().tolist()
        guesses = logits.argmax(-1).tolist()
        return [
            {"group": e.group, "loss": loss, "guess": guess, "label": e.labels[0]}
            for e, loss, guess in zip(examples, losses, guesses, strict=True)
        ]

    def metrics(self, statistics: Sequence[Statistics]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef  # a slow import that only this needs

        labels, guesses = [s["label"] for s in statistics], [s["guess"] for s in statistics]
        return {
            "accuracy": float(accuracy_score(labels, guesses)),
            "f1": float(
                f1_score(labels, guesses, average="macro", labels=range(len(self.data.classes)), zero_division=0)
            ),
            "mcc": float(matthews_corrcoef(labels, guesses)),
            "loss": math.fsum(s["loss"] for s in statistics) / len(statistics),
        }
