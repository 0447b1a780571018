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


#: What `data.text_pair` is.
TEXT_PAIR = "Column with a second text (classification and regression of pairs)."


class SequenceTask(Task, stated=False):
    """Something about a text, or a pair of texts, as a whole; a step's loss is the mean over these."""

    def _texts(self, examples: Dataset) -> list[tuple[list[int], bool]]:
        """Their tokens, cut to `data.max_length`, and whether that left some out."""
        config = self.config.data
        texts = [list(examples[self.data.text])]
        if config.text_pair:
            texts.append(list(examples[require_column(examples, config.text_pair, "data.text_pair")]))
        rows = [(ids, False) for ids in self.tokenizer(*texts)["input_ids"]]
        if long := [i for i, (ids, _) in enumerate(rows) if len(ids) > config.max_length]:
            parts = [[text[i] for i in long] for text in texts]
            short = self.tokenizer(*parts, truncation=True, max_length=config.max_length)["input_ids"]
            for i, ids in zip(long, short, strict=True):
                rows[i] = ids, True
        return rows

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        return self.losses(forward, batch).mean()

    def counted(self, batch: Batch) -> int:
        return len(batch["labels"])


class Classification(SequenceTask):
    """One class a text (or pair of texts). Metrics: accuracy, macro F1, F1 of the second of two classes (GLUE's of MRPC
    and QQP; 0 where there are more), Matthews correlation, mean loss."""

    name = "classification"
    model = "classification"
    metric = "accuracy"
    reported: ClassVar[dict[str, bool]] = {
        "accuracy": True,
        "f1": True,
        "f1_binary": True,
        "mcc": True,
        "loss": False,
    }
    higher_is_better = True
    target = "label"
    labelled = True
    options: ClassVar[dict[str, str]] = {"text_pair": TEXT_PAIR}
    takes_builtin = False

    def encode(self, examples: Dataset) -> list[Example]:
        index = {value: i for i, value in enumerate(self.data.classes)}
        rows = zip(self._texts(examples), examples[self.config.data.label], self._groups(examples), strict=True)
        return [Example(ids, [index[label]], 1.0, group, cut=cut) for (ids, cut), label, group in rows]

    def collate(self, examples: Sequence[Example]) -> Batch:
        return self._inputs(examples) | {"labels": torch.tensor([e.labels[0] for e in examples])}

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
            "f1_binary": float(f1_score(labels, guesses, zero_division=0)) if len(self.data.classes) == 2 else 0.0,
            "mcc": float(matthews_corrcoef(labels, guesses)),
            "loss": math.fsum(s["loss"] for s in statistics) / len(statistics),
        }
