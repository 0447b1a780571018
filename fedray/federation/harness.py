"""Tasks of lm-evaluation-harness (EleutherAI) on a run's exported adapter, loaded as anybody would load it."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from fedray.data.tasks import TASKS
from fedray.errors import ConfigError
from fedray.federation.exports import Form, export
from fedray.federation.results import read_run_config
from fedray.training.model import load_base, load_tokenizer


def harness(
    folder: Path, tasks: Sequence[str], limit: int | None = None, include: Path | None = None
) -> dict[str, Any]:
    """The harness's metrics by task. `limit`: examples of each task; `include`: a folder of task files beside its own.

    Raises ConfigError for tasks that it does not have, a run of a classifier, or one whose clients have models of their
    own.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks are those of lm-evaluation-harness: pip install fedray[harness]")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    config = read_run_config(folder)
    if TASKS[config.model.task].model != "causal-lm":
        raise ConfigError(f"--tasks ask a language model, and this run trained a {config.model.task} model")
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(f"--tasks: lm-evaluation-harness has no task '{unknown[0]}'")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as place:
        export(folder, Path(place) / "adapter", Form())
        if not (Path(place) / "adapter" / "adapter_config.json").is_file():
            raise ConfigError("this run's clients have models of their own: export it, and measure each")
        model = PeftModel.from_pretrained(load_base(config), Path(place) / "adapter").to(device).eval()
        asked = HFLM(pretrained=model, tokenizer=load_tokenizer(config), batch_size=8, device=device)
        found = simple_evaluate(asked, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False)
    results: dict[str, Any] = found["results"]
    return {task: {name: v for name, v in of.items() if isinstance(v, float)} for task, of in results.items()}
