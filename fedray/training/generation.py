"""What a model says after prompts: batched, with a cache of keys and values, greedily or drawn with a seed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedray.config.sections import GenerationSection
from fedray.data.tasks import Task
from fedray.training.engine import StepEngine

#: Habits that a model's own settings may have, and that are no part of what it has learned: a penalty of what was said
#: would count the padding too.
_NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beams": 1,
    "min_p": None,
    "typical_p": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}


class Evaluated:
    """An engine's model as tasks evaluate it (`fedray.data.tasks.Model`)."""

    def __init__(self, engine: StepEngine, task: Task, section: GenerationSection, device: torch.device):
        self._engine, self._task, self._section, self._device = engine, task, section, device

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of a batch."""
        return self._engine.forward(batch)

    def generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """At most `generation.max_new_tokens` after each prompt, up to the first token that ends a turn. Prompts are
        padded on the left, where attention does not look: what a model says does not depend on the others of its batch
        but for rounding."""
        ends, pad = self._ends, self._task.tokenizer.pad_token_id
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        said = self._engine.generate(
            {"input_ids": ids, "attention_mask": mask},
            max_new_tokens=self._section.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=ends,
            use_cache=True,
            **_NEUTRAL,
            **self._how(),
        )
        return [_until(row, ends) for row in said[:, longest:].tolist()]

    def _how(self) -> dict[str, Any]:
        if self._section.temperature == 0:  # the model's own settings of sampling would be warned about
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            "do_sample": True,
            "temperature": self._section.temperature,
            "top_p": self._section.top_p,
            "top_k": 0,
        }

    @cached_property
    def _ends(self) -> list[int]:
        """The task's, and those that the model says itself."""
        own = getattr(getattr(self._engine.model, "generation_config", None), "eos_token_id", None)
        ends = {*self._task.ends, *(own if isinstance(own, list) else [own])}
        return sorted(end for end in ends if end is not None)


def _until(row: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first that ends a turn."""
    return list(row[: next((i for i, token in enumerate(row) if token in ends), len(row))])
