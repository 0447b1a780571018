"""Next-token prediction, of whole texts or of what follows a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from fedray.data.columns import require_column
from fedray.data.tasks.base import IGNORED, Batch, Example, Model, Statistics
from fedray.data.tasks.tokens import COMPLETION, TokenTask

if TYPE_CHECKING:
    from datasets import Dataset

    from fedray.config.sections import DataSection


class CausalLM(TokenTask):
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
        "completion": COMPLETION,
    }
    takes_builtin = True

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
        asked = self._ids(prompt)
        question = asked[-max(0, length - len(answer)) :] if len(answer) < length else []
        ids, labels = (question + answer)[:length], ([IGNORED] * len(question) + answer)[:length]
        kept = sum(y != IGNORED for y in labels) / len(answer) if answer else 0.0  # an answer that is too long is cut
        whole = len(ids) == len(asked) + len(answer)
        return [Example(ids, labels, kept * len(completion.encode()), group, cut=not whole)] if len(ids) > 1 else []

    def statistics(self, model: Model, examples: Sequence[Example], batch: Batch) -> list[Statistics]:
        found = super().statistics(model, examples, batch)
        return [{**s, "bytes": e.size} for e, s in zip(examples, found, strict=True)]

    def metrics(self, statistics: Sequence[Statistics]) -> dict[str, float]:
        nats = math.fsum(s["loss"] for s in statistics)
        in_bytes = math.fsum(s["bytes"] for s in statistics)
        return {"bits_per_byte": nats / math.log(2) / max(1.0, in_bytes), **super().metrics(statistics)}
