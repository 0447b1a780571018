"""Models in which one example's gradient depends on the others: what they would let through, and that they are
refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from fedray.errors import PrivacyError
from fedray.privacy import dpsgd
from fedray.privacy.dpsgd import ClippedSum, Mechanism, SampleHooks, private_step
from fedray.privacy.keys import Key
from fedray.privacy.model_checks import check_model
from fedray.training.engine import TorchEngine

CLIP = 0.5


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def clipped_sum(model: nn.Module, losses) -> torch.Tensor:
    """The sum of clipped gradients that a model which was not checked gives for these losses (a function)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpsgd, "check_model", lambda model: None)
        hooks = SampleHooks(model)
    total = ClippedSum({n: p for n, p in model.named_parameters() if p.requires_grad}, CLIP)
    with hooks.awake():
        each = losses()
        each.sum().backward()
        total.add(len(each))
    hooks.close()
    return total.total()


# --- statistics over the batch, in a module that does not train ----------------------------------------------------


def with_batch_norm(affine: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), frozen(nn.BatchNorm1d(8, affine=affine)), nn.Linear(8, 1))


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_batch_norm_lets_one_example_move_the_sum_by_more_than_the_clip(affine):
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    x[0] *= 50.0
    model = with_batch_norm(affine).train()

    def total(rows):
        return clipped_sum(model, lambda: model(rows).square().sum(1))

    assert (total(x) - total(x[1:])).norm() > 1.5 * CLIP
    with pytest.raises(PrivacyError, match=r"^1 \(BatchNorm1d\) takes statistics over the batch.* choose a model"):
        check_model(model)


def test_norms_of_each_example_alone_are_let_through_unless_they_remember():
    layers = [nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.InstanceNorm1d(8)]
    for layer in layers:
        check_model(nn.Sequential(nn.Linear(6, 8), frozen(layer)))
    with pytest.raises(PrivacyError, match="InstanceNorm1d"):
        check_model(nn.Sequential(nn.Linear(6, 8), nn.InstanceNorm1d(8, track_running_stats=True)))


# --- random numbers in a forward pass ------------------------------------------------------------------------------


def mixtral(**more) -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=20,
        num_local_experts=2,
        num_experts_per_tok=1,
        **more,
    )
    return get_peft_model(MixtralForCausalLM(config), LoraConfig(target_modules=["q_proj", "v_proj"]))


def test_jitter_lets_one_example_move_the_sum_by_more_than_the_clip():
    ids = torch.randint(0, 20, (40, 6), generator=torch.Generator().manual_seed(1))
    model = mixtral(router_jitter_noise=0.9).train()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.5)

    def losses(rows):
        torch.manual_seed(7)  # as a client's round does
        return 100 * model(input_ids=rows).logits.log_softmax(-1)[..., 0].sum(1)

    def total(rows):
        return clipped_sum(model, lambda: losses(rows))

    assert (total(ids) - total(ids[1:])).norm() > 1.5 * CLIP
    with pytest.raises(
        PrivacyError, match=r"draws random numbers as it trains \(router_jitter_noise 0\.9.* set it to 0"
    ):
        check_model(model)
    check_model(mixtral())


def test_jitter_that_only_a_module_knows_is_refused():
    model = mixtral()
    model.get_submodule("base_model.model.model.layers.0.mlp").jitter_noise = 0.1
    with pytest.raises(
        PrivacyError, match=r"mlp draws random numbers as it trains \(jitter_noise 0\.1\).* set it to 0"
    ):
        check_model(model)


# --- rows that are tokens ------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Sends each token to the expert of its first number's sign: an expert's rows are whichever tokens came to it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        tokens = x.reshape(-1, 4)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mine = (tokens[:, 0] > 0) == bool(number)
            out[mine] = expert(tokens[mine])
        return (out * self.gate(tokens).softmax(-1).amax(-1, keepdim=True)).reshape(x.shape)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.moe = nn.Linear(4, 4), Routed()

    def forward(self, x):
        return self.moe(self.attention(x))


def test_an_expert_takes_two_tokens_of_one_example_for_two_examples():
    model = frozen(Block())
    nn.init.eye_(model.attention.weight), nn.init.zeros_(model.attention.bias)
    model.moe.experts[1].requires_grad_(True)
    x = torch.ones(2, 2, 4)
    x[1, :, 0] = -1.0  # both tokens of the first example go to expert 1, none of the second's

    def total(weight):
        return clipped_sum(model, lambda: model(x).square().sum((1, 2)) * torch.tensor([weight, 1.0]))

    assert (total(10.0) - total(0.0)).norm() > 1.9 * CLIP
    with pytest.raises(PrivacyError, match=r"moe\.experts\.1 trains inside moe \(Routed\).* leave it out of"):
        check_model(model)


def test_what_trains_beside_experts_that_rest_is_let_through():
    model = frozen(Block())
    model.attention.requires_grad_(True)
    check_model(model)
    model.moe.gate.requires_grad_(True)
    with pytest.raises(PrivacyError, match=r"moe\.gate trains inside moe"):
        check_model(model)


@pytest.mark.parametrize("where", ["moe", "moe.gate"])
def test_experts_of_a_limited_capacity_are_refused(where):
    model = frozen(Block())
    model.attention.requires_grad_(True)
    model.get_submodule(where).capacity_factor = 1.25
    with pytest.raises(PrivacyError, match=rf"{where} .*capacity_factor.* depends on the others"):
        check_model(model)


# --- what no check of a model's parts can know ---------------------------------------------------------------------


class Engine(TorchEngine):
    def forward(self, inputs):
        return self.model(inputs["x"])


class Shaken(nn.Module):
    def forward(self, x):
        return x * torch.rand_like(x)


class Remembering(nn.Module):
    """Statistics over the batch of a class that nobody knows; `anew`: in another tensor each time."""

    def __init__(self, anew):
        super().__init__()
        self.anew = anew
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.anew:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        else:
            self.mean.mul_(0.9).add_(x.mean(0).detach(), alpha=0.1)
        return x - self.mean


@pytest.mark.parametrize(
    "middle, words",
    [
        (Shaken(), "draws random numbers"),
        (Remembering(False), "1.mean changed"),
        (Remembering(True), "1.mean changed"),
        (nn.Tanh(), None),
    ],
)
def test_a_pass_that_is_no_function_of_each_example_stops_the_run_before_its_step(make_config, middle, words):
    model = nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 2))
    engine, hooks = Engine(model, dict(model.named_parameters()), make_config().federation), SampleHooks(model)

    def step():
        private_step(
            engine,
            hooks,
            [{"x": torch.randn(4, 3)}],
            lambda forward, batch: forward(batch).square().sum(1),
            0.1,
            Mechanism(1.0, 1.0, 4.0),
            Key(b"7" * 32).stream("n"),
            check=True,
        )

    before = engine.read()
    if words is None:
        step()
        assert any(not torch.equal(before[n], t) for n, t in engine.read().items())
        return
    with pytest.raises(PrivacyError, match=words):
        step()
    assert all(torch.equal(before[n], t) for n, t in engine.read().items())
