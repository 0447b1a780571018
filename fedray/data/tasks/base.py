"""What a task is: how examples become tensors, what the loss is, which metrics are reported, and what it takes of the
config.

A batch is a dict of int64 tensors `input_ids`, `attention_mask` (batch x length) and `labels`.
Statistics of a batch are plain numbers and lists that add up, so evaluation can be split over workers and put together
in a fixed order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fedray.data.builtin import BUILTIN

if TYPE_CHECKING:  # a config is checked against its task, so this module can be imported before any config is there
    from datasets import Dataset

    from fedray.config.sections import Config, DataSection
    from fedray.data.partition import FederatedData

Batch = dict[str, Tensor]
Forward = Callable[[Batch], Tensor]  # inputs without labels -> logits
Statistics = dict[str, Any]
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One training or test sequence. `size`: what a mean is taken over (bytes, or 1). `group`: reported apart.
    `about`: what its metrics need beside the tokens, as the task writes it. `cut`: `data.max_length` left some of it
    out."""

    input_ids: list[int]
    labels: list[int]
    size: float = 1.0
    group: str | None = None
    about: str = ""
    cut: bool = False


class Model(Protocol):
    """The model that is evaluated."""

    def forward(self, batch: Batch) -> Tensor:
        """Logits, as of a `Forward`."""

    def generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """What it says after each prompt, as `generation` has it, without the token that ends it."""


@dataclass(frozen=True)
class Task(ABC):
    """One kind of training. A subclass states everything in `_STATED` itself, which is checked when it is imported."""

    config: Config
    data: FederatedData
    tokenizer: Any

    name: ClassVar[str]
    """The word in `model.task`."""
    model: ClassVar[Literal["causal-lm", "classification"]]
    """The kind of model that it trains: next-token logits, or a classifier over whole sequences."""
    metric: ClassVar[str]
    """The metric that `summary.json` calls `metric`."""
    higher_is_better: ClassVar[bool]
    reported: ClassVar[Mapping[str, bool]]
    """Every metric, and whether higher is better."""
    target: ClassVar[str]
    """The key of the data section that names the column to be learned."""
    labelled: ClassVar[bool]
    """Whether every example has one of a fixed set of classes, the values of the column `data.label`."""
    options: ClassVar[Mapping[str, str]]
    """Optional columns: keys of the data section that other tasks refuse, each with its doc."""
    takes_builtin: ClassVar[bool]
    """Whether it runs on the built-in model and corpus."""

    _STATED: ClassVar[tuple[str, ...]] = (
        *("name", "model", "metric", "higher_is_better", "reported"),
        *("target", "labelled", "options", "takes_builtin"),
    )

    def __init_subclass__(cls, stated: bool = True) -> None:
        """`stated`: whether it is a task, and not what several share."""
        missing = [name for name in Task._STATED if name not in vars(cls) and stated]
        if missing:
            raise TypeError(f"task {cls.__name__} does not state {', '.join(missing)}")

    @classmethod
    def check(cls, config: Config, tasks: Mapping[str, type[Task]]) -> None:
        """Raises ValueError, with what to give instead, for a config that the task cannot take: the built-in corpus
        or model, or an option that only others of `tasks` have. A task with further limits adds them here."""
        builtins = " and ".join(task.name for task in tasks.values() if task.takes_builtin)
        if config.data.source == BUILTIN and not cls.takes_builtin:
            raise ValueError(f"the built-in corpus is for {builtins}: give data.source for {cls.name}")
        cls._check_options(config, tasks)
        if config.model.path == BUILTIN and not cls.takes_builtin:
            raise ValueError(f"the built-in model is for {builtins}: give model.path for {cls.name}")

    @classmethod
    def _check_options(cls, config: Config, tasks: Mapping[str, type[Task]]) -> None:
        for option, owners in _owners(tasks).items():
            if cls.name not in owners and getattr(config.data, option) is not None:
                known = " and ".join(", ".join(owners).rsplit(", ", 1))
                raise ValueError(f"data.{option} belongs to {known}; for {cls.name} give data.{cls.target}")

    @classmethod
    def outputs(cls, classes: int) -> int | None:
        """How many numbers the model's head gives, of a run with so many classes (0: not known); None: as the model's
        own config says."""
        return classes if cls.labelled and classes else None

    @classmethod
    def speaks(cls, data: DataSection) -> bool:
        """Whether its metrics are of what the model says (`generation`)."""
        return False

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end what the model says."""
        return () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)

    @classmethod
    def questions(cls, data: DataSection, examples: Dataset, text: str) -> list[str] | None:
        """What each held-out row asks, where rows that ask the same are one example (several references); None: each
        row is its own. `text`: the column of texts."""
        return None

    @classmethod
    def cuts(cls, data: DataSection) -> bool:
        """Whether a row of a long text becomes several sequences."""
        return False

    @classmethod
    def columns(cls, data: DataSection) -> dict[str, str]:
        """The columns that it reads beside the text, by the config key that names each."""
        keys = [*cls.options, *(["label"] if cls.labelled else [])]
        return {f"data.{key}": getattr(data, key) for key in keys if getattr(data, key) is not None}

    def check_rows(self, examples: Dataset, held_out: bool) -> None:  # noqa: B027 - most take any text
        """Raises ConfigError, with the row, for what could not be encoded; tokenises nothing. Called before a run
        begins where the rows may be read, for those that train and those that metrics are taken of (`held_out`)."""

    @abstractmethod
    def encode(self, examples: Dataset) -> list[Example]:
        """The sequences that rows become; a row may become none or several."""

    def encode_held_out(self, examples: Dataset) -> list[Example]:
        """The same of rows that metrics are taken of."""
        return self.encode(examples)

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """A batch, padded to the longest sequence."""

    @abstractmethod
    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """What a step without privacy minimises: the batch's mean."""

    @abstractmethod
    def counted(self, batch: Batch) -> int:
        """How many tokens or sequences `loss` is the mean over."""

    @abstractmethod
    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        """One loss a sequence, each a function of that sequence alone: what DP-SGD clips the gradients of."""

    @abstractmethod
    def statistics(self, model: Model, examples: Sequence[Example], batch: Batch) -> list[Statistics]:
        """One entry an example, with its `group`."""

    @abstractmethod
    def metrics(self, statistics: Sequence[Statistics]) -> dict[str, float]:
        """Every metric of `reported`."""

    def _inputs(self, examples: Sequence[Example]) -> Batch:
        rows = [e.input_ids for e in examples]
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": padded(rows, pad if pad is not None else self.tokenizer.eos_token_id),
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
        }

    def _groups(self, examples: Dataset) -> list[str | None]:
        group = self.data.group
        return [str(g) for g in examples[group]] if group in examples.column_names else [None] * len(examples)


def _owners(tasks: Mapping[str, type[Task]]) -> dict[str, list[str]]:
    """Each optional key of the data section with the names of the tasks that read it."""
    owners: dict[str, list[str]] = {}
    for task in tasks.values():
        for option in task.options:
            owners.setdefault(option, []).append(task.name)
    return owners


def padded(rows: list[list[int]], value: int) -> Tensor:
    """Rows as one int64 tensor, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def grouped(task: Task, statistics: Sequence[Statistics]) -> dict[str, dict[str, float]]:
    """Metrics by group, in order of name; empty where the held-out examples have none."""
    groups: dict[str, list[Statistics]] = {}
    for s in statistics:
        if s["group"] is not None:
            groups.setdefault(s["group"], []).append(s)
    return {name: task.metrics(groups[name]) for name in sorted(groups)}
