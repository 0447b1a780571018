"""What all tasks of next-token prediction share: the loss over the tokens that are scored, and its statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedray.data.tasks.base import IGNORED, Batch, Example, Forward, Model, Statistics, Task, padded

#: What `data.completion` is.
COMPLETION = (
    "Column whose text is to be produced after `text`; the loss covers it alone (causal-lm; instruction, math, choice "
    "and nlg take output, completion, response or answer, whichever is there)."
)


def with_targets(batch: Batch) -> Batch:
    """The batch with what each place is to predict, for a model that gives token losses (`fedray.training.chunked`)."""
    return batch | {"targets": torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)}


class TokenTask(Task, stated=False):
    """Next-token prediction of the labels that are not `IGNORED`; a step's loss is the mean over these tokens."""

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def collate(self, examples: Sequence[Example]) -> Batch:
        return self._inputs(examples) | {"labels": padded([e.labels for e in examples], IGNORED)}

    def _tokens(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Token losses and their mask, both batch x (length - 1)."""
        mask = batch["labels"][:, 1:] != IGNORED
        asked = with_targets(batch)
        if self.config.model.loss_chunk is not None:
            return forward(asked)[:, :-1], mask
        # The last place predicts nothing, and stays: to leave it out would copy the logits, and classes along any but
        # the last dimension take half as long again.
        logits, targets = forward(batch), asked["targets"]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=IGNORED
        )
        return losses.view(targets.shape)[:, :-1], mask

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        losses, mask = self._tokens(forward, batch)
        return losses.sum() / mask.sum().clamp_min(1)

    def counted(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        losses, mask = self._tokens(forward, batch)
        return losses.sum(1) / mask.sum(1).clamp_min(1)

    def statistics(self, model: Model, examples: Sequence[Example], batch: Batch) -> list[Statistics]:
        losses, mask = self._tokens(model.forward, batch)
        sums, counts = losses.double().sum(1).tolist(), mask.sum(1).tolist()
        return [
            {"group": e.group, "loss": loss, "tokens": count}
            for e, loss, count in zip(examples, sums, counts, strict=True)
        ]

    def metrics(self, statistics: Sequence[Statistics]) -> dict[str, float]:
        nats = math.fsum(s["loss"] for s in statistics)
        return {"loss": nats / max(1, sum(s["tokens"] for s in statistics))}
