"""Tasks: what a run trains for. One file a task; this is their register, and what holds a config against it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedray.data.tasks.base import IGNORED, Batch, Example, Forward, Model, Task, grouped
from fedray.registers import load

if TYPE_CHECKING:  # the config stands above: it is checked by what is declared here
    from fedray.config.sections import Config

#: Module and class of each task. A new one is its file and a line here.
_CLASSES = (
    "classification.Classification",
    "regression.Regression",
    "causal_lm.CausalLM",
    "instruction.Instruction",
    "math.Math",
    "choice.Choice",
    "nlg.NLG",
)

TASKS: dict[str, type[Task]] = {task.name: task for task in load(__name__, _CLASSES)}


def check_task(config: Config) -> None:
    """Hold a config against the task that it names, as `Task.check` does. Raises ValueError."""
    TASKS[config.model.task].check(config, TASKS)


__all__ = ["IGNORED", "TASKS", "Batch", "Example", "Forward", "Model", "Task", "check_task", "grouped"]
