"""Passes that keep less or round more: gradient checkpointing, and matrices multiplied in bfloat16."""

from __future__ import annotations

import pytest
import torch
from support import final_tensors, run

from fedray.config.read import from_dict
from fedray.errors import ConfigError
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
        trainer.task.loss(lambda b: trainer.model(**{k: v for k, v in b.items() if k != "labels"}).logits, batch)
    return sum(seen.values())


def test_checkpointing_keeps_less(make_config):
    all_of_it, blocks = (saved_bytes(make_config(model__checkpointing=on)) for on in (False, True))
    assert blocks < 0.6 * all_of_it


def test_products_in_bfloat16_are_near_and_what_trains_stays_fp32(make_config):
    options = {"worker__backend": "torch", "federation__rounds": 2}
    whole, rounded = (final_tensors(run(make_config(model__compute=c, **options))) for c in (None, "bfloat16"))
    assert all(t.dtype == torch.float32 for t in rounded.values())
    assert largest_difference(whole, rounded) > 0
    size = sum(t.square().sum() for t in whole.values()).sqrt()
    gone = sum((whole[n] - rounded[n]).square().sum() for n in whole).sqrt()
    assert gone < 0.2 * size


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="model.compute bfloat16 cannot be: privacy.unit example clips gradients"):
        from_dict({"model": {"compute": "bfloat16"}, "privacy": DP})
    with pytest.raises(ConfigError, match="model.checkpointing cannot be: worker.batch_clients 4 replaces layers"):
        from_dict({"model": {"checkpointing": True}, "worker": {"batch_clients": 4, "backend": "torch"}})
