"""An attacker with canaries against real DP-SGD steps: the epsilon it proves stays below the claim, and breaks a broken
mechanism's."""

import math

import pytest
import torch
from torch import nn

from fedray.privacy import dpsgd
from fedray.privacy.accountant import Release, epsilon
from fedray.privacy.audit import audit, lower_bound, p_value
from fedray.privacy.dpsgd import ClippedSum, Mechanism, SampleHooks, private_step
from fedray.privacy.keys import Key
from fedray.training.engine import TorchEngine

CANARIES, STEPS, DELTA = 800, 8, 1e-5


class Engine(TorchEngine):
    def forward(self, inputs):
        return self.model(inputs["x"])


def trained(make_config, included, noise: float, rate: float, seed: int) -> torch.Tensor:
    """Scores after DP-SGD on a linear model: canary i is a feature that no other example has, the sharpest there is.
    Ordinary examples train beside them on features of their own."""
    g = torch.Generator().manual_seed(seed)
    ordinary = torch.cat([torch.zeros(100, CANARIES), torch.randn(100, 20, generator=g)], 1)
    rows = torch.cat([30.0 * torch.eye(CANARIES, CANARIES + 20)[torch.tensor(included)], ordinary])
    model = nn.Linear(CANARIES + 20, 1, bias=False)
    nn.init.zeros_(model.weight)
    federation = make_config(federation__optimizer="sgd").federation
    engine, hooks, key = (
        Engine(model, dict(model.named_parameters()), federation),
        SampleHooks(model),
        Key(seed.to_bytes(32, "big")),
    )
    score = torch.zeros(CANARIES)
    for step in range(STEPS):
        picked = key.stream("sample", step).sample(len(rows), rate)
        before = model.weight.detach().clone()
        private_step(
            engine,
            hooks,
            [{"x": rows[picked]}],
            lambda forward, batch: forward(batch).squeeze(1),
            1.0,
            Mechanism(1.0, noise, 1.0),
            key.stream("noise", step),
            check=step == 0,
        )
        score += (before - model.weight.detach())[0, :CANARIES]  # the loss pushes an included canary's weight down
    return score


def audited(make_config, noise=1.0, rate=0.5, seed=1) -> float:
    included = (torch.rand(CANARIES, generator=torch.Generator().manual_seed(seed)) < 0.5).tolist()
    return audit(included, trained(make_config, included, noise, rate, seed).tolist(), DELTA)


def test_the_proven_epsilon_stays_below_the_claim_and_is_not_nothing(make_config):
    for noise, rate in ((1.5, 1.0), (1.0, 0.5), (3.0, 1.0)):
        claimed = epsilon([Release("training", noise, rate, STEPS)], DELTA)
        for seed in (1, 2):
            assert 0.2 < audited(make_config, noise, rate, seed) < claimed


def test_noise_that_is_left_out_is_caught(make_config, monkeypatch):
    claimed = epsilon([Release("training", 2.0, 0.5, STEPS)], DELTA)
    assert audited(make_config, 2.0) < claimed
    monkeypatch.setattr(dpsgd, "noised", lambda total, mechanism, noise: total / mechanism.expected)
    assert audited(make_config, 2.0) > claimed


def test_a_clip_that_is_ignored_is_caught(make_config, monkeypatch):
    claimed = epsilon([Release("training", 2.0, 0.5, STEPS)], DELTA)
    real = ClippedSum.__init__
    monkeypatch.setattr(ClippedSum, "__init__", lambda self, parameters, clip: real(self, parameters, 1e9))
    assert audited(make_config, 2.0) > claimed


@pytest.mark.parametrize("true", [0.5, 2.0, 4.0])
def test_the_bound_holds_for_randomised_response_and_is_tight(true):
    """Randomised response is epsilon-private and nothing less: the bound is below it 95 times in 100, and near it."""
    g, bounds = torch.Generator().manual_seed(0), []
    for _ in range(60):
        right = int((torch.rand(1000, generator=g) < 1 / (1 + math.exp(-true))).sum())
        bounds.append(lower_bound(1000, 1000, right, 0.0))
    assert sum(b > true for b in bounds) <= 8 and sorted(bounds)[30] > 0.75 * true - 0.1
    assert p_value(100, 100, 100, true, 0.0) == pytest.approx((1 / (1 + math.exp(-true))) ** 100)
    assert p_value(100, 100, 50, 0.0, 1e-3) > p_value(100, 100, 50, 0.0, 0.0) and lower_bound(100, 100, 50, 1e-5) == 0.0
