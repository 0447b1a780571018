"""Instruction tuning: conversations in the words of the model's chat template. Only the answers are learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedray.data.columns import require_column
from fedray.data.tasks.base import IGNORED, Example, Statistics, Task
from fedray.data.tasks.chat import ALPACA_INPUT, TEMPLATES, Message, cut, end_of_turn, messages_of, pieces, tokens
from fedray.data.tasks.tokens import COMPLETION, TokenTask
from fedray.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

    from fedray.config.sections import Config, DataSection

#: Usual names of the column with the answer.
_ANSWERS = ("output", "completion", "response", "answer")

COLUMNS = {
    "completion": COMPLETION,
    "input": "Column with what an instruction is about; rows may leave it empty.",
}
WORDS = {
    "template": "How conversations are written: chat (default: the tokenizer's chat template), alpaca, or plain.",
    "system": "A system message before every conversation that has none.",
}


class Conversations(TokenTask, stated=False):
    """Tasks whose rows are an instruction and its answer, or in `data.text` a list of messages (several turns)."""

    @classmethod
    def check(cls, config: Config, tasks: Mapping[str, type[Task]]) -> None:
        super().check(config, tasks)
        template = config.data.template or "chat"
        if template not in TEMPLATES:
            raise ValueError(f"data.template is {template}: give one of {', '.join(TEMPLATES)}")
        if template == "alpaca" and config.data.system is not None:
            raise ValueError("data.system has no place in data.template alpaca: leave it out, or use chat or plain")

    @classmethod
    def columns(cls, data: DataSection) -> dict[str, str]:
        """An input may be empty, and answers of messages are among them: neither has to have a value in each row."""
        return {}

    def check_rows(self, examples: Dataset, held_out: bool) -> None:
        for messages in self._conversations(examples)[:1]:  # whether there is a template, and it tells answers apart
            pieces(self.tokenizer, self._template, messages)

    def encode(self, examples: Dataset) -> list[Example]:
        encoded = []
        for messages, group in zip(self._conversations(examples), self._groups(examples), strict=True):
            whole, all_labels = self._written(messages)
            ids, labels = cut(whole, all_labels, self._length)
            if any(y != IGNORED for y in labels[1:]):  # a token of an answer is left to be predicted
                encoded.append(Example(ids, labels, 1.0, group, cut=len(ids) < len(whole)))
        return encoded

    def _written(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Ids and labels of a whole conversation."""
        return tokens(self.tokenizer, pieces(self.tokenizer, self._template, messages))

    @property
    def ends(self) -> tuple[int, ...]:
        """The chat template's own end of a turn beside the tokenizer's end token."""
        own = end_of_turn(self.tokenizer) if self._template == "chat" else None
        return super().ends if own is None else (*super().ends, own)

    @property
    def _length(self) -> int:
        return self.config.data.max_length

    @property
    def _template(self) -> str:
        return self.config.data.template or "chat"

    def _conversations(self, examples: Dataset) -> list[list[Message]]:
        """Each row's messages."""
        texts, where = examples[self.data.text], f"data.text '{self.data.text}'"
        if len(texts) and isinstance(texts[0], (list, Mapping)):
            found = [self._with_system(messages_of(value, where)) for value in texts]
            silent = (i for i, one in enumerate(found) if all(m["role"] != "assistant" for m in one))
            if (row := next(silent, None)) is not None:
                raise ConfigError(f"{where} has no answer of the assistant in row {row + 1}: leave the row out")
            return found
        answers, inputs = self._answers(examples), self._inputs_of(examples)
        return [
            self._with_system([*self._asked(str(text), about), {"role": "assistant", "content": answer}])
            for text, about, answer in zip(texts, inputs, answers, strict=True)
        ]

    def _asked(self, instruction: str, about: str) -> list[Message]:
        """The instruction, and what it is about."""
        joined = ALPACA_INPUT if self._template == "alpaca" else "{}\n\n{}"
        return [{"role": "user", "content": joined.format(instruction, about) if about else instruction}]

    def _with_system(self, messages: list[Message]) -> list[Message]:
        system = self.config.data.system
        if system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": system}, *messages]

    def _answers(self, examples: Dataset) -> list[str]:
        """What is to be said after each row's instruction. Raises ConfigError where a row has no answer."""
        column = self.config.data.completion
        if column is None:
            usual = [c for c in _ANSWERS if c in examples.column_names and c != self.data.text]
            if not usual:
                raise ConfigError(
                    "data.completion is not given and no usual column of answers is there: choose one of "
                    f"{', '.join(examples.column_names)}"
                )
            column = usual[0]
        answers = [self._answer(value) for value in examples[require_column(examples, column, "data.completion")]]
        if (empty := next((i for i, answer in enumerate(answers) if not answer.strip()), None)) is not None:
            raise ConfigError(
                f"data.completion '{column}' has no answer in row {empty + 1}: fill it in or leave the row out"
            )
        return answers

    @staticmethod
    def _answer(value: Any) -> str:
        return "" if value is None else str(value)

    def _inputs_of(self, examples: Dataset) -> list[str]:
        column = self.config.data.input
        if column is None:
            usual = "input" if "input" in examples.column_names and self.data.text != "input" else None
            return [str(v or "") for v in examples[usual]] if usual else [""] * len(examples)
        return [str(v or "") for v in examples[require_column(examples, column, "data.input")]]


class Instruction(Conversations):
    """Answers to instructions. Metric: mean loss a token of the answers, and its exponential."""

    name = "instruction"
    model = "causal-lm"
    metric = "loss"
    reported: ClassVar[dict[str, bool]] = {"loss": False, "perplexity": False}
    higher_is_better = False
    target = "completion"
    labelled = False
    options: ClassVar[dict[str, str]] = COLUMNS | WORDS
    takes_builtin = False

    def metrics(self, statistics: Sequence[Statistics]) -> dict[str, float]:
        loss = super().metrics(statistics)["loss"]
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
