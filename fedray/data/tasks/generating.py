"""Tasks whose metrics are of what the model says after a prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedray.data.tasks.base import IGNORED, Batch, Example, Model, Statistics
from fedray.data.tasks.chat import Message
from fedray.data.tasks.instruction import Conversations
from fedray.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

    from fedray.config.sections import DataSection


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

    @classmethod
    def speaks(cls, data: DataSection) -> bool:
        return True

    def check_rows(self, examples: Dataset, held_out: bool) -> None:
        super().check_rows(examples, held_out)
        if held_out:
            self.references(examples, self._conversations(examples))

    def references(self, examples: Dataset, conversations: Sequence[list[Message]]) -> list[str]:
        """What is kept of each row to hold an answer against. Raises ConfigError for a row without."""
        for i, messages in enumerate(conversations):
            if messages[-1]["role"] != "assistant":
                raise ConfigError(f"row {i + 1} of the held-out data does not end with an answer: leave it out")
        return [self.reference(examples, i, messages[-1]["content"]) for i, messages in enumerate(conversations)]

    def encode_held_out(self, examples: Dataset) -> list[Example]:
        encoded, conversations = [], self._conversations(examples)
        rows = zip(conversations, self._groups(examples), self.references(examples, conversations), strict=True)
        for i, (messages, group, reference) in enumerate(rows):
            ids, labels = self._written(messages)
            asked = len(prompt_of(Example(ids, labels)))
            if not 0 < asked < self._length:  # what is asked is never cut: it would be another question
                raise ConfigError(
                    f"row {i + 1} of the held-out data asks in {asked} tokens, and data.max_length is {self._length}: "
                    "raise it, or leave the row out"
                )
            encoded.append(
                Example(ids[: self._length], labels[: self._length], 1.0, group, reference, len(ids) > self._length)
            )
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
