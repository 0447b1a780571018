"""Passes that keep less or round more: gradient checkpointing, and matrices multiplied in bfloat16."""

from __future__ import annotations

import json

import pytest
import torch
from support import final_tensors, run
from transformers import Gemma2Config, Gemma2ForCausalLM

from fedray.config.read import from_dict
from fedray.errors import ConfigError
from fedray.training.chunked import chunk_losses
from fedray.training.local import LocalTrainer

DP = {"noise": 1.0, "delta": 1e-5, "clip": 0.5}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[n] - other[n]).abs().max().item() for n in one)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapter__dropout": 0.1},
        {"privacy": DP},
        {"privacy": DP, "adapter__kind": "lora-sb", "method__name": "fed-sb", "adapter__alpha": None},
        {"worker__backend": "deepspeed"},
    ],
    ids=["plain", "dropout", "DP", "DP, lora-sb", "DeepSpeed"],
)
def test_checkpointing_changes_no_adapter(make_config, options):
    options = {"worker__backend": "torch", "federation__rounds": 2, **options}
    kept, again = (final_tensors(run(make_config(model__checkpointing=on, **options))) for on in (False, True))
    assert largest_difference(kept, again) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapter__dropout": 0.1, "model__checkpointing": True},
        {"privacy": DP},
        {"worker__backend": "deepspeed"},
        {"worker__batch_clients": 3},
    ],
    ids=["plain", "dropout and checkpointing", "DP", "DeepSpeed", "together"],
)
def test_a_chunked_loss_changes_no_adapter(make_config, options):
    """7 tokens at a time, of sequences that are padded and of 3 or more: the last chunk is smaller."""
    # In DP of one round: the next one's noise follows from a digest of inputs whose last bit differs.
    options = {"worker__backend": "torch", "federation__rounds": 1 if "privacy" in options else 2, **options}
    whole, chunked = (run(make_config(model__loss_chunk=tokens, **options)) for tokens in (None, 7))
    assert largest_difference(final_tensors(whole), final_tensors(chunked)) < 1e-5
    metrics = [json.loads((folder / "summary.json").read_text())["final"] for folder in (whole, chunked)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)


def test_logits_that_nobody_scores_are_not_made(make_config):
    """Of a vocabulary of 259 by a width of 32, what autograd keeps of the loss is as wide as the hidden states."""
    options = {"data__max_length": 48}
    whole, chunked = (saved_bytes(make_config(model__loss_chunk=t, **options)) for t in (None, 16))
    tokens = 4 * 47
    assert whole - chunked > tokens * 259 * 4 * 0.9


def test_a_model_that_does_more_with_its_logits_is_refused():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
    capped = Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=0.5))
    with pytest.raises(ConfigError, match="gemma2 does more with its logits"):
        chunk_losses(capped, 4)
    with pytest.raises(ConfigError, match="gemma2 does more with its logits"):  # which small logits would not show
        chunk_losses(Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=30.0)), 4)
    chunk_losses(Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=None)), 4)


def saved_bytes(config):
    """Bytes that autograd keeps of one step's forward pass, each storage once, parameters apart."""
    trainer = LocalTrainer(config, "cpu", 1)
    trainer._rebuild(dict(trainer.factors))
    trainer.set_mode(training=True)
    examples = [trainer.examples("train", "client-0")[i] for i in range(4)]
    batch, known, seen = trainer.batch(examples), {p.data_ptr() for p in trainer.model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.task.loss(lambda b: trainer.model(**{k: v for k, v in b.items() if k != "labels"}).logits, batch)
    assert loss.requires_grad
    return sum(seen.values())


def test_checkpointing_keeps_less(make_config):
    all_of_it, blocks = (saved_bytes(make_config(model__checkpointing=on)) for on in (False, True))
    assert blocks < 0.6 * all_of_it


@pytest.mark.parametrize("chunked", [False, True])
def test_products_in_bfloat16_are_near_and_what_trains_stays_fp32(make_config, chunked):
    options = {"worker__backend": "torch", "federation__rounds": 2}
    chunk = {"model__loss_chunk": 7} if chunked else {}
    whole = final_tensors(run(make_config(**options)))
    rounded = final_tensors(run(make_config(model__compute="bfloat16", **chunk, **options)))
    assert all(t.dtype == torch.float32 for t in rounded.values())
    assert largest_difference(whole, rounded) > 0
    size = sum(t.square().sum() for t in whole.values()).sqrt()
    gone = sum((whole[n] - rounded[n]).square().sum() for n in whole).sqrt()
    assert gone < 0.2 * size


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="model.compute bfloat16 cannot be: privacy.unit example clips gradients"):
        from_dict({"model": {"compute": "bfloat16"}, "privacy": DP})
    with pytest.raises(ConfigError, match="data.group_by_length cannot be: privacy.unit example"):
        from_dict({"data": {"group_by_length": True}, "privacy": DP})
    with pytest.raises(ConfigError, match="model.loss_chunk cannot be: a classifier has no logits by token"):
        from_dict({"model": {"loss_chunk": 8, "task": "classification", "path": "p"}, "data": {"source": "s"}})
    for own in ({"worker": {"zero_stage": 3}}, {"clients": {"client-0": {"zero_stage": 3}}}):
        for model in ({"loss_chunk": 8}, {"quantise": "nf4"}):
            with pytest.raises(ConfigError, match=r"model\.\w+( nf4)? cannot be: worker.zero_stage 3"):
                from_dict({"model": model, **own})
    with pytest.raises(ConfigError, match="model.checkpointing cannot be: worker.batch_clients 4 replaces layers"):
        from_dict({"model": {"checkpointing": True}, "worker": {"batch_clients": 4, "backend": "torch"}})
