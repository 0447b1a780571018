"""Next-token prediction, of whole texts or of what follows a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedray.data.columns import require_column
from fedray.data.tasks.base import IGNORED, Batch, Example, Forward, Statistics, Task, padded

if TYPE_CHECKING:
    from datasets import Dataset

    from fedray.config.sections import DataSection


class CausalLM(Task):
    """Next-token prediction. A text is cut into sequences of `data.max_length`; with `data.completion` an example is
    one sequence and only the completion is scored. Metrics: bits per byte of scored text, mean loss a token.

    The bytes of a sequence are its share, by tokens, of its document's bytes: exact for byte-level tokens.
    """

    name = "causal-lm"
    model = "causal-lm"
    metric = "bits_per_byte"
    reported: ClassVar[dict[str, bool]] = {"bits_per_byte": False, "loss": False}
    higher_is_better = False
    target = "completion"
    labelled = False
    options: ClassVar[dict[str, str]] = {
        "completion": "Column whose text is to be produced after `text` (causal-lm); the loss covers it alone.",
    }
    takes_builtin = True

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @classmethod
    def cuts(cls, data: DataSection) -> bool:
        return data.completion is None

    def encode(self, examples: Dataset) -> list[Example]:
        completion = self.config.data.completion
        if completion is not None:
            require_column(examples, completion, "data.completion")
        encoded = []
        for row, group in zip(examples, self._groups(examples), strict=True):
            text = str(row[self.data.text])
            if completion is None:
                encoded += self._chunks(text, group)
            else:
                encoded += self._completion(text, str(row[completion]), group)
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
        return self._inputs(examples) | {"labels": padded([e.labels for e in examples], IGNORED)}

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

    def counted(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        losses, mask = self._tokens(forward, batch)
        return losses.sum(1) / mask.sum(1).clamp_min(1)

    def statistics(self, forward: Forward, examples: Sequence[Example], batch: Batch) -> list[Statistics]:
        losses, mask = self._tokens(forward, batch)
        sums, counts = losses.double().sum(1).tolist(), mask.sum(1).tolist()
        return [
            {"group": e.group, "loss": loss, "tokens": count, "bytes": e.size}
            for e, loss, count in zip(examples, sums, counts, strict=True)
        ]

    def metrics(self, statistics: Sequence[Statistics]) -> dict[str, float]:
        nats = math.fsum(s["loss"] for s in statistics)
        return {
            "bits_per_byte": nats / math.log(2) / max(1.0, math.fsum(s["bytes"] for s in statistics)),
            "loss": nats / max(1, sum(s["tokens"] for s in statistics)),
        }
