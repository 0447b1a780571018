"""Cross-entropy a few tokens at a time: the logits of a large vocabulary are never whole.

A frozen head is linear, and a token's loss is a function of that token's hidden state alone. So the gradient of each
loss with respect to its hidden state is worked out in the forward pass, while the chunk's logits are there, and is what
is kept: as wide as the hidden state, not as the vocabulary. It takes no product more than the plain form.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedray.data.tasks.base import IGNORED
from fedray.errors import ConfigError


class _Losses(torch.autograd.Function):
    """Token losses (n, fp32) of hidden states (n x h), `tokens` at a time."""

    @staticmethod
    def forward(ctx: Any, hidden_nh: Tensor, targets_n: Tensor, head: nn.Linear, tokens: int) -> Tensor:
        losses = hidden_nh.new_empty(len(hidden_nh), dtype=torch.float32)
        wanted, device = ctx.needs_input_grad[0], hidden_nh.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        weight_vh, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
        gradients = torch.empty_like(hidden_nh) if wanted else hidden_nh.new_empty(0)
        for start in range(0, len(hidden_nh), tokens):
            some = slice(start, start + tokens)
            logits_cv = nn.functional.linear(hidden_nh[some].to(dtype), weight_vh, bias)
            logp_cv = logits_cv.float().log_softmax(1)
            losses[some] = -logp_cv.gather(1, targets_n[some, None])[:, 0]
            if wanted:
                slope_cv = logp_cv.exp_()
                slope_cv[torch.arange(len(slope_cv), device=slope_cv.device), targets_n[some]] -= 1
                gradients[some] = slope_cv.to(dtype) @ weight_vh
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return (gradients * slopes[0][:, None]).to(gradients.dtype), None, None, None


def head_of(model: Any) -> nn.Linear:
    """What makes logits of a model's last hidden states. Raises ConfigError where it is no frozen linear layer."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            "model.loss_chunk needs a frozen linear layer that makes the logits, and this run trains it or the model "
            "has none: leave it out"
        )
    return head


def chunk_losses(model: PreTrainedModel, tokens: int) -> None:
    """From now on the model takes one word more: with `targets` (batch x length, `IGNORED` where nothing is scored)
    what it calls logits are the token losses (batch x length, fp32, 0 where ignored). Raises ConfigError for a model
    that does more with its logits than to make them."""
    head, forward = head_of(model), model.forward

    @functools.wraps(forward)
    def scored(*args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return forward(*args, **kwargs)
        head.forward = nn.Identity().forward  # type: ignore[method-assign]
        try:
            hidden = forward(*args, **kwargs).logits
        finally:
            del head.forward
        mask = targets != IGNORED
        losses = hidden.new_zeros(targets.shape, dtype=torch.float32)
        return SimpleNamespace(
            logits=losses.masked_scatter(mask, _Losses.apply(hidden[mask], targets[mask], head, tokens))
        )

    model.forward = scored
    _check(model)


#: What configs call a scale or a cap of the logits: None or 1 where there is none.
_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier_scale")


@torch.no_grad()
def _check(model: PreTrainedModel) -> None:
    """Some architectures scale or cap their logits after the head: this would leave it out. What the config says is
    believed, since a cap shows in large logits alone; what it does not say shows in the losses of a few tokens."""
    config, mode = model.config.get_text_config(), model.training
    said = any(getattr(config, name, None) not in (None, 1, 1.0) for name in _SCALES)
    ids = torch.arange(8)[None] % config.vocab_size
    model.eval()
    plain = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0].float(), ids[0], reduction="none")
    chunked = model(input_ids=ids, targets=ids).logits[0]
    model.train(mode)
    if said or not torch.allclose(plain, chunked, rtol=1e-4, atol=1e-4):
        raise ConfigError(
            f"model.loss_chunk: {model.config.model_type} does more with its logits than its head says: leave it out"
        )
