"""Tasks whose metrics are of what the model says after a prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedray.data.tasks.base import IGNORED, Batch, Example, Model, Statistics
from fedray.data.tasks.instruction import Conversations
from fedray.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset


def prompt_of(example: Example) -> list[int]:
    """What comes before the last answer: all that the model is shown when it is asked."""
    answer = len(example.labels)
    while answer > 0 and example.labels[answer - 1] == IGNORED:  # what a template writes after the answer
        answer -= 1
    while answer > 0 and example.labels[answer - 1] != IGNORED:
        answer -= 1
    return example.input_ids[:answer]


class Generating(Conversations, stated=False):
    """A held-out row is one question: the last answer of its conversation is what is asked for."""

    generates = True

    def encode_held_out(self, examples: Dataset) -> list[Example]:
        encoded = []
        for i, (messages, group) in enumerate(zip(self._conversations(examples), self._groups(examples), strict=True)):
            if messages[-1]["role"] != "assistant":
                raise ConfigError(f"row {i + 1} of the held-out data does not end with an answer: leave it out")
            example = self._example(messages, group, self.reference(examples, i, messages[-1]["content"]))
            if example is None or not prompt_of(example):
                raise ConfigError(
                    f"row {i + 1} of the held-out data has no room for a question beside its answer: raise "
                    "data.max_length"
                )
            encoded.append(example)
        return encoded

    def statistics(self, model: Model, examples: Sequence[Example], batch: Batch) -> list[Statistics]:
        found = super().statistics(model, examples, batch)
        said = model.generate([prompt_of(e) for e in examples])
        texts = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        return [s | self.judged(e, text.strip()) for s, e, text in zip(found, examples, texts, strict=True)]

    @abstractmethod
    def reference(self, examples: Dataset, i: int, answer: str) -> str:
        """What is kept of row i to hold an answer against. Raises ConfigError where there is nothing."""

    @abstractmethod
    def judged(self, example: Example, said: str) -> Statistics:
        """What is found of what the model said."""
