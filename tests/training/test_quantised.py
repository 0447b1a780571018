"""A base of 4 or 8 bits: what its bits mean, base updates beside them, a run, its resume, its exports."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel
from support import final_tensors, options, rounds, run, same_bits, stopped_after_two, trainer_and_view
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedray.adapters import attach
from fedray.adapters.quantised import QuantisedLinear, dequantise, quantise
from fedray.config.build import make_method
from fedray.config.read import from_dict
from fedray.errors import ConfigError
from fedray.federation import results
from fedray.federation.exports import Form, export
from fedray.methods import Update
from fedray.methods.state import key

KINDS = ("nf4", "int8")
INPUTS = {"input_ids": torch.randint(3, 200, (3, 11), generator=torch.Generator().manual_seed(5))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_its_dense_meaning(kind):
    torch.manual_seed(0)
    plain = nn.Linear(96, 160)
    layer = QuantisedLinear(plain, kind)
    dense = layer.dense()
    size = plain.weight.square().mean().sqrt()
    assert 0 < (dense - plain.weight).square().mean().sqrt() < {"nf4": 0.12, "int8": 0.01}[kind] * size
    x = torch.randn(2, 5, 96, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, dense, plain.bias), rtol=0, atol=1e-6)
    (slope,) = torch.autograd.grad(y.square().sum(), x)
    other = nn.functional.linear(x, dense, plain.bias).square().sum()
    torch.testing.assert_close(slope, torch.autograd.grad(other, x)[0], rtol=1e-5, atol=1e-5)
    assert layer.weight.numel() * layer.weight.element_size() == 96 * 160 * {"nf4": 0.5, "int8": 1}[kind]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_only_layers_inside_are_quantised(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny / "llama")
    before = {n: p.clone() for n, p in model.named_parameters() if "_proj" not in n}
    quantise(model, "nf4")
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    assert {type(m) for n, m in model.named_modules() if n.endswith("_proj")} == {QuantisedLinear}
    assert type(model.lm_head) is nn.Linear
    logits = model(**INPUTS).logits
    dequantise(model)
    torch.testing.assert_close(model(**INPUTS).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora+fedex", "lora+flora", "abba+fedex"])
def test_effective_weights_are_the_bits_and_the_dense_mean(name, kind, make_config):
    """Three clients' factors, drawn: the layer's matrix after the round, read off by the identity, is the dequantised
    base and the mean of the clients' dense changes in fp64."""
    config = make_config(model__quantise=kind, **options(name))
    trainer, view = trainer_and_view(config)
    method = make_method(config)
    state = method.init(_spec(config, trainer), trainer.describe()[1], trainer.start_from_weights(_adapter(config)))
    spec, generator = state.spec, torch.Generator().manual_seed(3)
    weights, updates = (0.2, 0.3, 0.5), []
    for client, weight in zip(("client-0", "client-1", "client-2"), weights, strict=True):
        drawn = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in view.tensors.items()}
        updates.append((drawn, Update(client, weight, method.upload(spec, client, drawn, 0))))
    after = method.view(spec, method.aggregate(state, [u for _, u in updates])[0], None)
    trainer._load(after, config.federation, None, None)
    trainer.set_mode(training=False)
    modules = dict(attach.adapted(trainer.model))
    for layer in spec.layers:
        frozen = modules[layer.name].get_base_layer()
        expected = frozen.dense().double()
        for (drawn, _), weight in zip(updates, weights, strict=True):
            factors = {f: drawn[key(layer, f)].double() for f in spec.names}
            expected += weight * spec.adapter.delta(layer, factors).dense()
        with torch.no_grad():
            matrix = modules[layer.name](torch.eye(layer.n)).T
        assert (matrix.double() - expected).abs().max() < 1e-5
        assert frozen.update is not None and frozen.update.dense().abs().max() > 1e-3


def _adapter(config):
    from fedray.config.build import make_adapter

    return make_adapter(config.adapter)


def _spec(config, trainer):
    from fedray.config.build import make_spec

    return make_spec(config, trainer.layers, trainer.data.clients)


def test_a_run_its_resume_and_its_exports(make_config, monkeypatch, tmp_path):
    given = {"model__quantise": "nf4", **options("lora+fedex")}
    config = make_config(**given)
    whole = run(config)
    assert math.isfinite(rounds(whole)[-1]["metrics"]["loss"])
    assert (json.loads((whole / "summary.json").read_text())["store_error"]) == 0.0  # 18 columns are below base_rank

    same_bits(whole, run(stopped_after_two(make_config(**given), monkeypatch)))

    export(whole, tmp_path / "merged", Form("merged"))
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    quantise(base, "nf4")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    bits.bnb_4bit_compute_dtype = torch.float32
    others = AutoModelForCausalLM.from_pretrained(config.model.path, quantization_config=bits, device_map="cpu")
    with torch.no_grad():
        expected = _logits(config, whole)
        # In training mode, where nothing is drawn here: out of it bitsandbytes repacks layers on some CPUs, and fails
        # on those as narrow as these.
        plain = PeftModel.from_pretrained(others, whole / "adapter").train()(**INPUTS).logits
        got = PeftModel.from_pretrained(base, whole / "adapter").eval()(**INPUTS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(**INPUTS).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert "quantised to nf4" in (tmp_path / "merged" / "README.md").read_text()


def _logits(config, folder):
    trainer, _ = trainer_and_view(config)
    return trainer.logits(results.global_view(config, results.load_state(folder, config, 0)), INPUTS)


def test_what_the_rank_cuts_off_is_reported(make_config):
    folder = run(make_config(model__quantise="nf4", model__base_rank=1, **options("lora+fedex")))
    assert json.loads((folder / "summary.json").read_text())["store_error"] > 1e-6


@pytest.mark.parametrize(
    "more",
    [
        {"privacy": {"noise": 1.0, "delta": 1e-5, "clip": 0.5}},
        {"model__checkpointing": True},
        {"model__dtype": "bfloat16"},
        {"worker__backend": "deepspeed"},
        {"adapter__kind": "lora-sb", "method__name": "fed-sb", "adapter__alpha": None, "adapter__subspace": "weights"},
    ],
    ids=["DP", "checkpointing", "bf16", "DeepSpeed", "lora-sb from the weights"],
)
def test_it_trains_with(more, make_config):
    """Each factor that trains moves, and about as far as over the whole base."""
    given = {"federation__rounds": 1, "method__name": "ffa"} | more
    found, whole = (final_tensors(run(make_config(model__quantise=q, **given))) for q in ("nf4", None))
    trains = ".sb_R" if "adapter__kind" in more else ".lora_B"
    moved = [n for n in found if n.endswith(trains)]
    assert moved and all(torch.isfinite(t).all() for t in found.values())
    for name in moved:
        assert 0.2 < found[name].norm() / whole[name].norm() < 5


def test_layers_that_train_whole_stay_whole(make_config):
    folder = run(make_config(model__quantise="nf4", federation__rounds=1, adapter={"heads": "up_proj", "rank": 2}))
    assert any("up_proj" in name for name in final_tensors(folder))


def test_clients_together_over_a_quantised_base(make_config):
    given = {"model__quantise": "nf4", "worker__backend": "torch", "federation__rounds": 2}
    one, three = (final_tensors(run(make_config(worker__batch_clients=n, **given))) for n in (1, 3))
    assert all((one[n] - three[n]).abs().max() < 1e-5 for n in one)


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="model.quantise nf4 cannot be: worker.zero_stage 3"):
        from_dict({"model": {"quantise": "nf4"}, "worker": {"zero_stage": 3}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, which fedray\[quantised\] installs"):
        from_dict({"model": {"quantise": "nf4"}})
