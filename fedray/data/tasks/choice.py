"""Multiple choice (BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC, OpenBookQA): the right answer is learned; which one
the model takes is judged by likelihood, or by what it says (LLM-Adapters, Hu et al., EMNLP 2023)."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedray.data.columns import require_column
from fedray.data.tasks.base import Batch, Example, Model, Statistics, Task
from fedray.data.tasks.chat import Message
from fedray.data.tasks.generating import Generating
from fedray.data.tasks.instruction import COLUMNS, WORDS
from fedray.data.tasks.tokens import TokenTask
from fedray.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

    from fedray.config.sections import Config, DataSection

#: Where LLM-Adapters' instructions say what may be answered.
_FORMAT = re.compile(r"Answer format:\s*(\S+/\S+)\s*$")
#: What a column of truth values means among answers in words.
_WORDS = {True: ("true", "yes"), False: ("false", "no")}
_JUDGES = ("likelihood", "generation")


class Choice(Generating):
    """One of some given answers. Metrics: accuracy, by the likelihood of each answer (`judge: likelihood`; beside it
    that of likelihood a byte) or by the first of them that the model says (`judge: generation`), and mean loss.

    The answers of a row are in `data.choices` (a column of lists, or of ARC's {text, label}; or several columns, or
    words for all rows), and the right one in the column `data.key`: itself, its label, its number from 0, or true and
    false. Without `data.choices` they are what the instruction gives after "Answer format:".
    """

    name = "choice"
    model = "causal-lm"
    metric = "accuracy"
    reported: ClassVar[dict[str, bool]] = {"accuracy": True, "accuracy_per_byte": True, "loss": False}
    higher_is_better = True
    target = "key"
    labelled = False
    options: ClassVar[dict[str, str]] = {
        **COLUMNS,
        **WORDS,
        "choices": "Column with the answers that a row may have (a list, or ARC's choices); several columns, "
        "comma-separated; or words for all rows, separated by / (yes/no).",
        "key": "Column with the right one of `choices` (default: answer, label or answerKey, whichever is there).",
        "judge": "What decides which answer the model takes (choice): likelihood (default) or generation.",
    }
    takes_builtin = False

    @classmethod
    def check(cls, config: Config, tasks: Mapping[str, type[Task]]) -> None:
        super().check(config, tasks)
        if config.data.judge not in (None, *_JUDGES):
            raise ValueError(f"data.judge is {config.data.judge}: give one of {', '.join(_JUDGES)}")
        if not cls.speaks(config.data) and config.worker.zero_stage == 3 and config.most_ranks > 1:
            raise ValueError(
                "data.judge likelihood takes as many passes as a batch has answers, in which the ranks of ZeRO-3 would "
                "wait for each other: use worker.zero_stage 2, or data.judge generation"
            )

    # --- what may be answered, and what is right ---

    @classmethod
    def speaks(cls, data: DataSection) -> bool:
        return data.judge == "generation"

    def _conversations(self, examples: Dataset) -> list[list[Message]]:
        if self.config.data.choices is None:
            return super()._conversations(examples)
        inputs = self._inputs_of(examples)
        return [
            self._with_system([*self._asked(str(text), about), {"role": "assistant", "content": choices[right]}])
            for text, about, (choices, right) in zip(
                examples[self.data.text], inputs, self._given(examples), strict=True
            )
        ]

    def _given(self, examples: Dataset) -> list[tuple[list[str], int]]:
        """Each row's answers and the place of the right one. Raises ConfigError for a row without."""
        choices, labels = self._choices(examples)
        keys = examples[self._key(examples)]
        first = _counts_from(keys, choices)
        return [
            (row, _place(key, row, names, f"row {i + 1}", first))
            for i, (key, row, names) in enumerate(zip(keys, choices, labels, strict=True))
        ]

    def _key(self, examples: Dataset) -> str:
        if (column := self.config.data.key) is not None:
            return require_column(examples, column, "data.key")
        usual = [c for c in ("answer", "label", "answerKey") if c in examples.column_names]
        if not usual:
            raise ConfigError(f"data.key is not given: choose one of {', '.join(examples.column_names)}")
        return usual[0]

    def _choices(self, examples: Dataset) -> tuple[list[list[str]], list[list[str]]]:
        """The answers of every row, and their labels where they have some."""
        given = self.config.data.choices or ""
        if "/" in given:
            words = given.split("/")
            return [words] * len(examples), [[]] * len(examples)
        names = [require_column(examples, name.strip(), "data.choices") for name in given.split(",")]
        if len(names) > 1:
            rows = zip(*(examples[name] for name in names), strict=True)
            return [[str(v) for v in row] for row in rows], [[]] * len(examples)
        lists = [_listed(value, f"data.choices '{names[0]}'") for value in examples[names[0]]]
        return [choices for choices, _ in lists], [labels for _, labels in lists]

    def reference(self, examples: Dataset, i: int, answer: str) -> str:
        raise NotImplementedError("the answers of all rows are read at once")

    def references(self, examples: Dataset, conversations: Sequence[list[Message]]) -> list[str]:
        found = []
        for i, (messages, (choices, right)) in enumerate(zip(conversations, self._offered(examples), strict=True)):
            before, held, after = messages[-1]["content"].rpartition(choices[right])
            if not held:
                raise ConfigError(f"the answer of row {i + 1} does not hold the right one, '{choices[right]}'")
            answers = [before + choice + after for choice in choices]
            found.append(json.dumps({"right": right, "choices": choices, "answers": answers}))
        return found

    def encode_held_out(self, examples: Dataset) -> list[Example]:
        found = []
        for example, messages in zip(super().encode_held_out(examples), self._conversations(examples), strict=True):
            about = json.loads(example.about)
            about["answers"] = [
                self._written([*messages[:-1], {"role": "assistant", "content": answer}]) for answer in about["answers"]
            ]
            if (longest := max(len(ids) for ids, _ in about["answers"])) > self._length:
                raise ConfigError(
                    f"a question of the held-out data has {longest} tokens with its longest answer, and "
                    f"data.max_length is {self._length}: raise it, or leave the row out"
                )
            found.append(dataclasses.replace(example, about=json.dumps(about)))
        return found

    def _offered(self, examples: Dataset) -> list[tuple[list[str], int]]:
        if self.config.data.choices is not None:
            return self._given(examples)
        found = []
        keys, texts = examples[self._key(examples)], examples[self.data.text]
        for i, (text, key) in enumerate(zip(texts, keys, strict=True)):
            if (match := _FORMAT.search(str(text))) is None:
                raise ConfigError(
                    f"row {i + 1} of the held-out data does not say 'Answer format: a/b': give data.choices"
                )
            choices = match.group(1).split("/")
            found.append((choices, _place(key, choices, [], f"row {i + 1}")))
        return found

    # --- which one the model takes ---

    def statistics(self, model: Model, examples: Sequence[Example], batch: Batch) -> list[Statistics]:
        if self.config.data.judge == "generation":
            return super().statistics(model, examples, batch)
        found = TokenTask.statistics(self, model, examples, batch)
        abouts = [json.loads(e.about) for e in examples]
        rows = [Example(ids, labels) for about in abouts for ids, labels in about["answers"]]
        scores = iter(self._scores(model, rows, len(examples), batch["input_ids"].device))
        taken = [self._taken(about, [next(scores) for _ in about["choices"]]) for about in abouts]
        return [s | one for s, one in zip(found, taken, strict=True)]

    def _scores(self, model: Model, rows: Sequence[Example], size: int, device: Any) -> list[float]:
        """The log-likelihood of each row's answer, so many at once."""
        found: list[float] = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = {name: t.to(device) for name, t in self.collate(part).items()}
            found += [-s["loss"] for s in TokenTask.statistics(self, model, part, batch)]
        return found

    @staticmethod
    def _taken(about: dict[str, Any], scores: Sequence[float]) -> Statistics:
        """Whether the likeliest answer is the right one, and the likeliest a byte; of equal ones the first."""
        each = [score / max(1, len(choice.encode())) for score, choice in zip(scores, about["choices"], strict=True)]
        right = about["right"]
        return {
            "right": float(scores.index(max(scores)) == right),
            "right_per_byte": float(each.index(max(each)) == right),
        }

    def judged(self, example: Example, said: str) -> Statistics:
        about = json.loads(example.about)
        right = float(_first_said(said, about["choices"]) == about["right"])
        return {"right": right, "right_per_byte": right}

    def metrics(self, statistics: Sequence[Statistics]) -> dict[str, float]:
        count = max(1, len(statistics))
        return {
            "accuracy": sum(s["right"] for s in statistics) / count,
            "accuracy_per_byte": sum(s["right_per_byte"] for s in statistics) / count,
            **super().metrics(statistics),
        }


def _first_said(said: str, choices: Sequence[str]) -> int | None:
    """Which of the answers a text says first, as whole words; of those at one place the longest. Single letters in
    their own case: `a` is a word."""
    found = []
    for i, choice in enumerate(choices):
        case = re.NOFLAG if len(choice) == 1 else re.IGNORECASE
        if match := re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", said, case):
            found.append((match.start(), -len(choice), i))
    return min(found)[2] if found else None


def _listed(value: Any, where: str) -> tuple[list[str], list[str]]:
    """A row's answers and their labels, out of a list or of ARC's {text, label}."""
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        return [str(v) for v in value["text"]], [str(v) for v in value.get("label", [])]
    if isinstance(value, list) and value:
        return [str(v) for v in value], []
    raise ConfigError(f"{where} holds {value!r:.80}, which is no list of answers")


def _counts_from(keys: Sequence[Any], choices: Sequence[Sequence[str]]) -> int | None:
    """Whether digits that are written as text count from 0 or from 1 (WinoGrande, SIQA); None where these rows do not
    tell. Whole numbers count from 0, as classes do."""
    digits = {int(key) for key in keys if isinstance(key, str) and key.strip().isdigit()}
    if not digits or 0 in digits:
        return 0
    return 1 if max(digits) == max(map(len, choices)) else None


def _place(key: Any, choices: Sequence[str], labels: Sequence[str], where: str, first: int | None = 0) -> int:
    """Which of the answers a key means: by its label, as an answer, or by its number. Raises ConfigError."""
    words, lower = str(key).strip(), [c.lower() for c in choices]
    place: int | None = None
    if isinstance(key, bool):
        place = next((i for i, name in enumerate(lower) if name in _WORDS[key]), None)
    elif words in labels:
        place = list(labels).index(words)
    elif isinstance(key, str) and words.lower() in lower:
        place = choices.index(words) if words in choices else lower.index(words.lower())
    elif words.isdigit():
        if first is None:
            raise ConfigError(f"{where}: whether '{words}' counts from 0 or from 1 cannot be told: name the answers")
        place = int(words) - first
    if place is None or not 0 <= place < len(choices):
        raise ConfigError(f"{where} has {key!r} for its right answer, which is none of {', '.join(choices)}")
    return place
