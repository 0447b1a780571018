"""Tasks: how examples become tensors, what the loss is, and which metrics are reported.

A batch is a dict of int64 tensors `input_ids`, `attention_mask` (batch x length) and `labels`.
Statistics of a batch are plain numbers and lists that add up, so evaluation can be split over workers and put together
in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from datasets import Dataset
from torch import Tensor

from fedray.config.sections import Config
from fedray.data.partition import FederatedData
from fedray.data.sources import require_column

Batch = dict[str, Tensor]
Forward = Callable[[Batch], Tensor]  # inputs without labels -> logits
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One training or test sequence. `size`: what a mean is taken over (bytes, or 1). `group`: reported apart."""

    input_ids: list[int]
    labels: list[int]
    size: float = 1.0
    group: str | None = None


class Task(Protocol):
    """What differs between kinds of training."""

    metric: ClassVar[str]
    """The metric that `summary.json` calls `metric`."""
    higher_is_better: ClassVar[bool]
    reported: ClassVar[tuple[str, ...]]
    """The names of all metrics."""

    def encode(self, examples: Dataset) -> list[Example]: ...
    def collate(self, examples: Sequence[Example]) -> Batch: ...
    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """What a step without privacy minimises: the batch's mean."""

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        """One loss a sequence, each a function of that sequence alone: what DP-SGD clips the gradients of."""

    def statistics(self, forward: Forward, examples: Sequence[Example], batch: Batch) -> list[dict[str, Any]]: ...
    def metrics(self, statistics: Sequence[dict[str, Any]]) -> dict[str, float]: ...


def _pad(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


@dataclass(frozen=True)
class _Base:
    config: Config
    data: FederatedData
    tokenizer: Any

    def _inputs(self, examples: Sequence[Example]) -> Batch:
        rows = [e.input_ids for e in examples]
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": _pad(rows, pad if pad is not None else self.tokenizer.eos_token_id),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0),
        }

    def _groups(self, examples: Dataset) -> list[str | None]:
        group = self.data.group
        return [str(g) for g in examples[group]] if group in examples.column_names else [None] * len(examples)


class Classification(_Base):
    """One class a text (or pair of texts). Metrics: accuracy, macro F1, Matthews correlation, mean loss."""

    metric = "accuracy"
    reported = ("accuracy", "f1", "mcc", "loss")
    higher_is_better = True

    def encode(self, examples: Dataset) -> list[Example]:
        config, data = self.config.data, self.data
        index = {value: i for i, value in enumerate(data.classes)}
        second = (
            [list(examples[require_column(examples, config.text_pair, "data.text_pair")])] if config.text_pair else []
        )
        encoded = self.tokenizer(list(examples[data.text]), *second, truncation=True, max_length=config.max_length)
        labels, groups = list(examples[config.label]), self._groups(examples)
        return [
            Example(ids, [index[y]], 1.0, g) for ids, y, g in zip(encoded["input_ids"], labels, groups, strict=True)
        ]

    def collate(self, examples: Sequence[Example]) -> Batch:
        return self._inputs(examples) | {"labels": torch.tensor([e.labels[0] for e in examples])}

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        return self.losses(forward, batch).mean()

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        return torch.nn.functional.cross_entropy(forward(batch).float(), batch["labels"], reduction="none")

    def statistics(self, forward: Forward, examples: Sequence[Example], batch: Batch) -> list[dict[str, Any]]:
        logits = forward(batch).float()
        losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none").double().tolist()
        guesses = logits.argmax(-1).tolist()
        return [
            {"group": e.group, "loss": loss, "guess": guess, "label": e.labels[0]}
            for e, loss, guess in zip(examples, losses, guesses, strict=True)
        ]

    def metrics(self, statistics: Sequence[dict[str, Any]]) -> dict[str, float]:
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


class CausalLM(_Base):
    """Next-token prediction. A text is cut into sequences of `data.max_length`; with `data.completion` an example is one
    sequence and only the completion is scored. Metrics: bits per byte of scored text, mean loss a token.

    The bytes of a sequence are its share, by tokens, of its document's bytes: exact for byte-level tokens.
    """

    metric = "bits_per_byte"
    reported = ("bits_per_byte", "loss")
    higher_is_better = False

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, examples: Dataset) -> list[Example]:
        completion = self.config.data.completion
        if completion is not None:
            require_column(examples, completion, "data.completion")
        encoded = []
        for row, group in zip(examples, self._groups(examples), strict=True):
            text = str(row[self.data.text])
            encoded += (
                self._chunks(text, group) if completion is None else self._completion(text, str(row[completion]), group)
            )
        return encoded

    def _chunks(self, text: str, group: str | None) -> list[Example]:
        ids, length = self._ids(text), self.config.data.max_length
        per_token = len(text.encode()) / len(ids) if ids else 0.0
        pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
        return [Example(p, p, per_token * (len(p) - 1), group) for p in pieces if len(p) > 1]

    def _completion(self, prompt: str, completion: str, group: str | None) -> list[Example]:
        length, end = self.config.data.max_length, self.tokenizer.eos_token_id
        answer = self._ids(completion) + ([end] if end is not None else [])
        # A prompt that is too long loses its beginning, never the answer.
        question = self._ids(prompt)[-max(0, length - len(answer)) :] if len(answer) < length else []
        ids, labels = (question + answer)[:length], ([IGNORED] * len(question) + answer)[:length]
        kept = sum(y != IGNORED for y in labels) / len(answer) if answer else 0.0  # an answer that is too long is cut
        return [Example(ids, labels, kept * len(completion.encode()), group)] if len(ids) > 1 else []

    def collate(self, examples: Sequence[Example]) -> Batch:
        return self._inputs(examples) | {"labels": _pad([e.labels for e in examples], IGNORED)}

    @staticmethod
    def _tokens(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Token losses and their mask, both batch x (length - 1)."""
        logits, targets = forward(batch)[:, :-1].float(), batch["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED
        )
        return losses, targets != IGNORED

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        losses, mask = self._tokens(forward, batch)
        return losses.sum() / mask.sum().clamp_min(1)

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        losses, mask = self._tokens(forward, batch)
        return losses.sum(1) / mask.sum(1).clamp_min(1)

    def statistics(self, forward: Forward, examples: Sequence[Example], batch: Batch) -> list[dict[str, Any]]:
        losses, mask = self._tokens(forward, batch)
        sums, counts = losses.double().sum(1).tolist(), mask.sum(1).tolist()
        return [
            {"group": e.group, "loss": loss, "tokens": count, "bytes": e.size}
            for e, loss, count in zip(examples, sums, counts, strict=True)
        ]

    def metrics(self, statistics: Sequence[dict[str, Any]]) -> dict[str, float]:
        nats = math.fsum(s["loss"] for s in statistics)
        return {
            "bits_per_byte": nats / math.log(2) / max(1.0, math.fsum(s["bytes"] for s in statistics)),
            "loss": nats / max(1, sum(s["tokens"] for s in statistics)),
        }


TASKS: dict[str, type[_Base]] = {"classification": Classification, "causal-lm": CausalLM}


def grouped(task: Task, statistics: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Metrics by group, in order of name; empty where the held-out examples have none."""
    groups: dict[str, list] = {}
    for s in statistics:
        if s["group"] is not None:
            groups.setdefault(s["group"], []).append(s)
    return {name: task.metrics(groups[name]) for name in sorted(groups)}
