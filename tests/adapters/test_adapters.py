"""LoRA-SB, ABBA and RAVAN inside real models: against PEFT's LoHa and the full gradient, through PEFT's own save, load
and merge."""

import math

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fedray.adapters import ADAPTERS, Layer, attach
from fedray.adapters.modules import HadamardProduct
from fedray.config.build import make_adapter
from fedray.config.read import from_dict
from fedray.errors import ConfigError

INPUTS = {
    "input_ids": torch.randint(3, 200, (3, 11), generator=torch.Generator().manual_seed(5)),
    "attention_mask": torch.ones(3, 11, dtype=torch.long),
}


def section(kind, **options):
    method = {"lora-sb": "fed-sb", "ravan": "ravan"}.get(kind, "fedit")
    return from_dict({"adapter": {"kind": kind, "rank": 4, **options}, "method": {"name": method}}).adapter


def randomised(model, seed=0):
    """Every factor drawn, so that no part of a product hides behind a zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attach.factors(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    return model


# --- ABBA ------------------------------------------------------------------------------------------------------------


def test_abba_equals_pefts_loha_in_value_and_gradients():
    """At r1 = r2 LoHa is the same product; it forms m x n, abba does not."""
    torch.manual_seed(0)
    m, n, r, scale = 23, 31, 3, 1.7
    base = nn.Sequential(nn.Linear(n, m))
    loha = get_peft_model(
        base, LoHaConfig(r=r, alpha=scale * r, target_modules=["0"], init_weights=False)
    ).base_model.model[0]
    a1, b1, a2, b2 = (getattr(loha, name)["default"] for name in ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a"))
    ours = HadamardProduct("A1", "B1", "A2", "B2", {"A1": (r, n), "B1": (m, r), "A2": (r, n), "B2": (m, r)})
    with torch.no_grad():
        for name, value in (("A1", a1), ("B1", b1), ("A2", a2), ("B2", b2)):
            getattr(ours, name).copy_(value)
    x = torch.randn(2, 5, n, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y = scale * ours(x)
    z = loha(twin) - nn.functional.linear(twin, loha.base_layer.weight, loha.base_layer.bias)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (z * weight).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-5, atol=1e-5)
    for name, value in (("A1", a1), ("B1", b1), ("A2", a2), ("B2", b2)):
        torch.testing.assert_close(getattr(ours, name).grad, value.grad, rtol=1e-5, atol=1e-5)


def test_abbas_hand_written_backward_against_finite_differences_at_unequal_ranks():
    g = torch.Generator().manual_seed(0)
    shapes = {"A1": (2, 7), "B1": (5, 2), "A2": (3, 7), "B2": (5, 3)}
    ours = HadamardProduct("A1", "B1", "A2", "B2", shapes).double()
    factors = [
        torch.randn(shapes[n], generator=g, dtype=torch.float64, requires_grad=True) for n in ("B1", "A1", "B2", "A2")
    ]
    x = torch.randn(2, 4, 7, generator=g, dtype=torch.float64, requires_grad=True)

    def forward(x, *given):
        return torch.func.functional_call(ours, dict(zip(("B1", "A1", "B2", "A2"), given, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *factors))
    factors[0].requires_grad_(False)
    factors[1].requires_grad_(False)  # the pair alone, as most methods train it
    assert torch.autograd.gradcheck(forward, (x, *factors))


def test_abbas_scales_and_start():
    paper, released = make_adapter(section("abba")), make_adapter(section("abba", scale="released"))
    assert paper.scaling(4, 9.0, False) == 81 / math.sqrt(2 * 2) and released.scaling(4, 9.0, False) == 9.0
    assert paper.scaling(5, 9.0, False) == 81 / math.sqrt(2 * 3)
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    layer = Layer("l", 20, 30, 5, 1.0)
    started, drawn = paper.start(layer, W, 0), paper.draw(layer, 0)
    U, S, Vt = torch.linalg.svd(W)
    torch.testing.assert_close(
        started["abba_B1"] @ started["abba_A1"], (U[:, :2] * S[:2]) @ Vt[:2], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(started["abba_B1"].norm(dim=0), started["abba_A1"].norm(dim=1))  # S^1/2 on each side
    assert (
        not drawn["abba_B2"].any()
        and drawn["abba_A2"].abs().max() <= math.sqrt(6 / 30) < 1.05 * drawn["abba_A2"].abs().max()
    )


def test_abba_keeps_no_khatri_rao_factor_for_the_backward_pass():
    """Saved by autograd: the input, the four factors, and T x r1 r2."""
    m, n, r, tokens = 64, 48, 4, 10
    ours = HadamardProduct("A1", "B1", "A2", "B2", {"A1": (r, n), "B1": (m, r), "A2": (r, n), "B2": (m, r)})
    x, saved = torch.randn(tokens, n, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ours(x)
    assert sorted(saved) == sorted([tokens * n, m * r, r * n, m * r, r * n, tokens * r * r])


# --- LoRA-SB ---------------------------------------------------------------------------------------------------------


def test_a_step_on_R_is_the_projection_of_the_full_gradients_step(tiny):
    """With orthonormal bases and s = 1: B R A moves by -lr (B B^T) g (A^T A) under SGD (arXiv 2411.19557)."""
    base = AutoModelForCausalLM.from_pretrained(tiny / "llama").eval()
    full = AutoModelForCausalLM.from_pretrained(tiny / "llama").eval()
    model = attach.attach(base, section("lora-sb"), "causal-lm").eval()
    adapter, layers, parameters = ADAPTERS["lora-sb"](), attach.layers(model), attach.factors(model)
    for layer in layers:
        weight = attach.base_layers(model)[layer.name].weight
        assert layer.scale == 1.0
        with torch.no_grad():
            for name, value in adapter.start(layer, weight, 0).items():
                parameters[f"{layer.name}.{name}"].copy_(value)
    for m in (model, full):
        m(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    gradients = {name: module.weight.grad for name, module in full.named_modules() if isinstance(module, nn.Linear)}
    lr, checked = 0.1, 0
    for layer in layers:
        B, A, R = (parameters[f"{layer.name}.{f}"] for f in ("sb_B", "sb_A", "sb_R"))
        torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=1e-5, atol=1e-5)
        step = B @ (-lr * R.grad) @ A
        wanted = -lr * (B @ B.T) @ gradients[layer.name] @ (A.T @ A)
        assert (step - wanted).norm() < 1e-6 * wanted.norm()
        assert wanted.norm() > 1e-5
        checked += 1
    assert checked == 14


@pytest.mark.parametrize("kind", ["lora-sb", "ravan", "abba"])
def test_factors_train_in_fp32_on_a_bf16_base(kind, tiny):
    base = AutoModelForCausalLM.from_pretrained(tiny / "llama", dtype=torch.bfloat16)
    model = randomised(attach.attach(base, section(kind), "causal-lm"))
    assert {p.dtype for p in attach.factors(model).values()} == {torch.float32}
    logits = model(**INPUTS).logits
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16 and all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in attach.factors(model).values()
    )


# --- in PEFT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora-sb", "abba", "ravan"])
def test_found_saved_loaded_merged_and_unmerged_through_peft(kind, tiny, tmp_path):
    def base():
        return AutoModelForCausalLM.from_pretrained(tiny / "llama")

    options = section(kind, targets=("q_proj", "down_proj"))
    model = randomised(attach.attach(base(), options, "causal-lm")).eval()
    assert {layer.name.rsplit(".", 1)[1] for layer in attach.layers(model)} == {"q_proj", "down_proj"}
    with torch.no_grad():
        expected = model(**INPUTS).logits
        with model.disable_adapter():
            plain = model(**INPUTS).logits
        assert (expected - plain).abs().max() > 1e-3
        model.merge_adapter()
        torch.testing.assert_close(model(**INPUTS).logits, expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model(**INPUTS).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(attach.factors(model))
    read = attach.lora_config(options, "causal-lm")
    assert LoraConfig.from_pretrained(tmp_path).r == read.r
    again = PeftModel.from_pretrained(base(), tmp_path, config=read).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**INPUTS).logits, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(again.merge_and_unload()(**INPUTS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora-sb", "abba", "ravan"])
def test_conv1d_layers_too(kind):
    """GPT-2 keeps its weights as n x m."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=259, n_positions=32))
    model = randomised(attach.attach(base, section(kind, targets=("c_attn", "c_proj")), "causal-lm")).eval()
    assert [(layer.m, layer.n) for layer in attach.layers(model)] == [(96, 32), (32, 32), (32, 128)]
    with torch.no_grad():
        expected = model(**INPUTS).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**INPUTS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora-sb", "abba", "ravan"])
def test_dropout_works_on_the_adapters_input(kind, tiny):
    model = randomised(
        attach.attach(AutoModelForCausalLM.from_pretrained(tiny / "llama"), section(kind, dropout=0.5), "causal-lm")
    )

    def logits(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(**INPUTS).logits

    model.train()
    assert torch.equal(logits(0), logits(0)) and not torch.equal(logits(0), logits(1))
    model.eval()
    assert torch.equal(logits(0), logits(1))


@pytest.mark.parametrize("kind", ["lora-sb", "abba", "ravan"])
def test_autocast_trains_as_it_does_with_lora(kind, tiny):
    model = randomised(attach.attach(AutoModelForCausalLM.from_pretrained(tiny / "llama"), section(kind), "causal-lm"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**INPUTS, labels=INPUTS["input_ids"]).loss
    loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for n, p in attach.factors(model).items()
    )


def test_convolutions_are_refused():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 6, 3)

    model = get_peft_model(Small(), LoraConfig(r=2, target_modules=["conv"]))
    with pytest.raises(ConfigError, match="conv, which is no linear layer"):
        attach.layers(model)
