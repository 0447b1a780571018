"""Noise, accounting, plans, the ledger, and clients' keys: the parts that need no model."""

import json
import math
import os
import stat

import numpy as np
import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy import stats

from fedray.config.read import from_dict
from fedray.errors import ConfigError
from fedray.privacy import client_level
from fedray.privacy.accountant import Release, _prv, epsilon, rdp_epsilon
from fedray.privacy.keys import TEST_KEY, Key, KeyStore
from fedray.privacy.ledger import Ledger, draw_of
from fedray.privacy.plan import PRECISION, PrivacyPlan, calibrate, default_delta, round_up
from fedray.privacy.planning import plans_for

KEY = Key(bytes(range(32)))


# --- noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "purpose", [("noise", "round", 0, "x", 0), ("noise", "round", 1, "x", 0), ("noise", "round", 0, "y", 3)], ids=str
)
def test_a_million_normals_have_variance_one(purpose):
    z = KEY.stream(*purpose).normals(1_000_000)
    assert 1e-6 < stats.chi2.cdf(z.square().sum().item(), len(z)) < 1 - 1e-6
    assert abs(z.mean().item()) < 5 / math.sqrt(len(z))
    assert stats.kstest(z[:200_000].numpy(), "norm").pvalue > 1e-6
    assert 4 < z.abs().max().item() < 8.6


def test_normals_differ_between_clients_rounds_and_purposes_and_repeat_for_the_same():
    others = [
        Key(os.urandom(32)).stream("noise", 0),
        KEY.stream("noise", 1),
        KEY.stream("noise", "0"),
        KEY.stream("sample", 0),
        KEY.stream("noise", 0, 0),
    ]
    mine = KEY.stream("noise", 0).normals(100_000)
    assert torch.equal(mine, KEY.stream("noise", 0).normals(100_000))
    for other in others:
        assert abs(torch.corrcoef(torch.stack([mine, other.normals(100_000)]))[0, 1].item()) < 0.02
    assert KEY.derive("a", "bc") != KEY.derive("ab", "c") and KEY.derive(1) != KEY.derive("1")


def test_uniforms_and_poisson_samples():
    u = KEY.stream("u").uniforms(1_000_000)
    assert u.min() >= 0 and u.max() < 1 and stats.kstest(u[:200_000].numpy(), "uniform").pvalue > 1e-6
    sizes = [len(KEY.stream("sample", i).sample(1000, 0.03)) for i in range(2000)]
    assert 1e-6 < stats.binom.cdf(sum(sizes), 2000 * 1000, 0.03) < 1 - 1e-6
    assert 1e-6 < stats.chi2.cdf(sum((s - 30) ** 2 / (30 * 0.97) for s in sizes), 2000) < 1 - 1e-6
    assert KEY.stream("s").sample(5, 1.0) == [0, 1, 2, 3, 4] and KEY.stream("s").sample(0, 0.5) == []
    assert min(sizes) < 30 < max(sizes)


def test_keys_come_from_the_system_stay_private_and_survive(tmp_path, monkeypatch):
    monkeypatch.delenv(TEST_KEY, raising=False)
    store = KeyStore(tmp_path / "keys")
    first = store.key("run", "../a/b")
    assert KeyStore(tmp_path / "keys").key("run", "../a/b").identity == first.identity and not first.fixed
    assert len({first.identity, store.key("run", "c").identity, store.key("other", "../a/b").identity}) == 3
    assert len({store.key("names", name).identity for name in ("", "_", "A", "a", "x" * 400)}) == 5
    for name in ("", "_", "A", "a", "x" * 400):
        store.forget("names", name)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 3 and all(
        stat.S_IMODE(p.stat().st_mode) == 0o600 and tmp_path / "keys" in p.parents for p in files
    )
    assert first.identity not in {p.read_bytes().hex() for p in files} and "identity" not in repr(first.derive("noise"))
    store.forget("run", "../a/b")
    assert store.key("run", "../a/b").identity != first.identity
    monkeypatch.setenv(TEST_KEY, "word")
    assert (
        store.key("run", "x").fixed
        and store.key("run", "x").identity == store.key("run2", "x").identity != store.key("run", "y").identity
    )


# --- accounting -------------------------------------------------------------------------------------------------

PLANS = [
    (noise, rate, steps, delta)
    for noise, rate, steps in [
        (1.0, 0.01, 1000),
        (0.6, 0.001, 500),
        (0.8, 0.002, 2000),
        (2.0, 0.1, 300),
        (5.0, 1.0, 10),
        (1.3, 0.05, 200),
        (0.523, 0.000175, 5723),
        (10.0, 0.5, 100),
        (1.0, 1.0, 1),
        (0.9, 0.03, 140),
    ]
    for delta in (1e-5, 1e-6)
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_epsilon_agrees_with_dp_accountings_pld_or_is_above_it(plan):
    noise, rate, steps, delta = plan
    pld = PLDAccountant()
    pld.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps)
    other, ours = pld.get_epsilon(delta), epsilon([Release("training", noise, rate, steps)], delta)
    assert ours >= other * 0.98
    assert ours <= other * 1.02 + 0.012  # the accountant's own mesh: what is added is on the safe side


def test_epsilon_is_opacus_own():
    for history in ([(1.0, 0.01, 1000)], [(20.0, 1.0, 1), (0.9, 0.1, 12)], [(0.45, 0.0014, 140), (3.0, 0.2, 2)]):
        accountant = PRVAccountant()
        accountant.history = history
        ours = epsilon([Release("x", *h) for h in history], 1e-5)
        assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=2e-3)


def test_epsilon_is_a_bound_where_opacus_mesh_is_too_coarse():
    """Its discretization refuses this history; dp-accounting's lower value shows that the bound is one."""
    releases = [
        Release("training", 0.2355430223790418, 0.075, 6),
        Release("subspace", 0.41038, 1.0, 2),
        Release("count", 20.0),
    ]
    accountant, pld = _prv()(), PLDAccountant()
    accountant.history = [(r.noise, r.rate, r.steps) for r in releases]
    with pytest.raises(RuntimeError, match="mean"), np.errstate(divide="ignore"):
        accountant.get_epsilon(1e-5)
    for release in releases:
        one = dp_event.PoissonSampledDpEvent(release.rate, dp_event.GaussianDpEvent(release.noise))
        pld.compose(one, release.steps)
    ours = epsilon(releases, 1e-5)
    assert pld.get_epsilon(1e-5) <= ours == pytest.approx(rdp_epsilon(releases, 1e-5), abs=1e-6)


def test_epsilon_composes_what_differs():
    parts = [Release("count", 20.0), Release("subspace", 4.0, 0.2, 2), Release("training", 1.1, 0.02, 100)]
    pld = PLDAccountant()
    for r in parts:
        pld.compose(dp_event.PoissonSampledDpEvent(r.rate, dp_event.GaussianDpEvent(r.noise)), r.steps)
    ours = epsilon(parts, 1e-5)
    assert pld.get_epsilon(1e-5) * 0.98 <= ours <= pld.get_epsilon(1e-5) * 1.02 + 0.02
    assert ours == epsilon([*parts[::-1]], 1e-5) > max(epsilon([p], 1e-5) for p in parts)
    assert epsilon([Release("training", 1.1, 0.02, 60), Release("training", 1.1, 0.02, 40), *parts[:2]], 1e-5) == ours
    assert epsilon([], 1e-5) == 0.0 and epsilon([Release("x", 0.0)], 1e-5) == math.inf


# The released Fed-SB code: one step for each of 5,723 batches in 6 epochs, delta 1 / batches, and the
# noise calibrated to that.
@pytest.mark.parametrize("nominal, sigma, at_1e5, at_n", [(1, 0.523, 1.85, 2.05), (3, 0.436, 4.49, 4.79)])
def test_the_released_codes_epsilon_is_not_what_it_says(nominal, sigma, at_1e5, at_n):
    examples, batch, epochs = 183_122, 32, 6
    batches = math.ceil(examples / batch)
    assert calibrate(1 / batches, epochs * batches, 1 / batches, nominal) == pytest.approx(sigma, rel=0.01)
    release = Release("training", sigma, 1 / batches, epochs * batches)
    assert epsilon([release], 1 / batches) == pytest.approx(nominal, rel=0.02)
    assert epsilon([release], 1e-5) == pytest.approx(at_1e5, rel=0.01)
    assert epsilon([release], 1 / examples) == pytest.approx(at_n, rel=0.01)
    assert epsilon([Release("training", sigma * 1.1, 1 / batches, epochs * batches)], 1 / examples) > nominal


# --- plans ------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([0.001, 0.02, 0.3, 1.0]), st.sampled_from([1, 40, 300]), st.sampled_from([0.7, 3.0, 8.0]))
def test_calibrated_noise_is_the_least_that_keeps_the_budget(rate, steps, budget):
    before = (Release("count", 20.0),)
    noise = calibrate(rate, steps, 1e-5, budget, before)

    def spent(sigma: float) -> float:
        return epsilon([*before, Release("training", sigma, rate, steps)], 1e-5)

    assert spent(noise) <= budget
    assert spent(noise / (1 + 2 * PRECISION)) > budget or noise < 0.02


def test_a_plan_cannot_be_put_together_wrongly():
    plan = PrivacyPlan("example", 0.01, 32.0, 1.0, 0.8, 100, 1e-5, 3.0, (Release("count", 20.0),))
    assert PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.epsilon == epsilon([Release("count", 20.0), Release("training", 0.8, 0.01, 100)], 1e-5)
    assert plan.signal_to_noise(10_000) == pytest.approx(32 / (0.8 * 100))
    values = plan.to_dict() | {"before": plan.before}
    for wrong in (
        {"delta": 0.0},
        {"delta": 1.0},
        {"clip": 0.0},
        {"rate": 0.0},
        {"rate": 1.1},
        {"unit": "row"},
        {"budget": -1.0},
        {"noise": -1.0},
        {"relation": "replace-one"},
        {"sampling": "shuffled"},
        {"expected": 0.0},
    ):
        with pytest.raises(ValueError):
            PrivacyPlan(**values | wrong)
    with pytest.raises(AttributeError):
        plan.noise = 0.0


def test_deltas_and_rates():
    assert [default_delta(n) for n in (1, 100, 2240, 22_450)] == pytest.approx([0.1, 1e-3, 1e-5, 1e-6])
    assert all(default_delta(n) <= 0.1 / n * (1 + 1e-9) for n in range(1, 5000, 7))
    assert [round_up(r) for r in (1.4, 1.0, 0.0123, 0.012, 0.999, 1e-5)] == [1.0, 1.0, 0.013, 0.012, 1.0, 1e-5]


def test_plans_count_every_round_and_everything_that_came_before():
    config = from_dict(
        {
            "adapter": {"kind": "lora-sb", "subspace": "private"},
            "method": {"name": "fed-sb"},
            "privacy": {"epsilon": 2.0},
            "federation": {"rounds": 4, "cohort": 1, "local_steps": 5, "batch_size": 8},
            "clients": {"b": {"local_steps": 9, "batch_size": 16}},
        }
    )
    plans = plans_for(config, {"a": 500.0, "b": 2000.0})
    assert [plans[c].steps for c in "ab"] == [20, 36]  # in every cohort, though one client is drawn a round
    for name, n, batch in (("a", 500, 8), ("b", 2000, 16)):
        plan = plans[name]
        assert plan.rate == pytest.approx(batch / n) and plan.expected == pytest.approx(batch) and plan.delta == 1e-5
        assert [r.what for r in plan.before] == ["count", "subspace"] and 1.98 < plan.epsilon <= 2.0
        assert 0.38 < epsilon([plan.before[1]], plan.delta) <= 0.4
    with pytest.raises(ConfigError, match="not below 1 / 2000"):
        plans_for(
            from_dict(config.model_dump() | {"privacy": {"epsilon": 2.0, "delta": 1e-3}}), {"a": 500.0, "b": 2000.0}
        )
    with pytest.raises(ConfigError, match="first round"):
        plans_for(from_dict({"privacy": {"epsilon": 0.5, "noise": 0.4}}), {"a": 50.0})
    with pytest.raises(ConfigError, match="released before training"):
        plans_for(from_dict({"privacy": {"epsilon": 0.5, "count_noise": 0.5}}), {"a": 50.0})


# --- the ledger -------------------------------------------------------------------------------------------------


def test_the_ledger_charges_a_draw_once_refuses_what_overspends_and_survives(tmp_path):
    plan = PrivacyPlan("example", 0.05, 8.0, 1.0, 1.1, 40, 1e-4, 2.0)
    ledger = Ledger("run", 1e-4, {"a": plan}, {"a": 80.0}, {"a": "id"})
    release, rounds = plan.release(10), 0
    while ledger.affords("a", f"draw {rounds}", release):
        assert ledger.charge("a", f"draw {rounds}", release, rounds)
        assert not ledger.charge("a", f"draw {rounds}", release, rounds)  # the same draw again
        rounds += 1
    assert 1 < rounds < 20 and ledger.epsilon("a") <= 2.0 < ledger.epsilon("a", [release])
    assert ledger.affords("a", "draw 0", release)  # it is paid for
    before = ledger.to_dict()
    ledger.save(tmp_path / "x" / "ledger.json")
    again = Ledger.load(tmp_path / "x" / "ledger.json")
    assert again == ledger and again.to_dict() == before and again.epsilon("a") == ledger.epsilon("a")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["ledger.json"] and Ledger.load(tmp_path / "none") is None
    assert len({draw_of("k", "a", 1), draw_of("l", "a", 1), draw_of("k", "a", 2), draw_of("k", "a", "1")}) == 4


# --- client level -----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-4, 1e4), st.floats(1e-3, 1e3), st.integers(0, 10_000))
def test_a_clipped_update_is_never_longer_than_the_clip(scale, clip, seed):
    g = torch.Generator().manual_seed(seed)
    update = {"a": scale * torch.randn(7, 5, generator=g), "b": scale * torch.randn(11, generator=g)}
    made, within = client_level.clipped(update, clip)
    assert client_level.norm(made) <= clip and within == (client_level.norm(update) <= clip)
    if within:
        assert all(torch.equal(made[n], update[n]) for n in update)
    else:
        assert client_level.norm(made) > clip * 0.99999
        assert torch.nn.functional.cosine_similarity(made["a"].flatten(), update["a"].flatten(), dim=0) > 0.999999


def test_client_level_noise_has_its_variance_and_the_count_is_paid_for():
    zeros = {"a": torch.zeros(600, 1000), "b": torch.zeros(400_000)}
    mean = client_level.noised_mean(zeros, 3.0, 5.0, KEY.stream("noise"))
    z = torch.cat([mean["a"].flatten(), mean["b"]]) / (3.0 / 5.0)
    assert 1e-6 < stats.chi2.cdf(z.square().sum().item(), len(z)) < 1 - 1e-6
    for noise, expected in ((1.0, 3.0), (0.7, 500.0)):
        # Two Gaussians of sensitivities 1 and 1/2 together are one of this noise.
        both = (
            client_level.update_noise(noise, expected, True) ** -2 + (2 * client_level.bit_noise(noise, expected)) ** -2
        )
        assert both == pytest.approx(noise**-2)
        assert client_level.update_noise(noise, expected, False) == noise
    with pytest.raises(FloatingPointError):
        client_level.clipped({"a": torch.tensor([math.nan])}, 1.0)


def test_the_clip_finds_its_quantile():
    norms, clip = torch.linspace(0.1, 10, 200), 1.0
    for round in range(120):
        told = torch.where(norms <= clip, 0.5, -0.5).sum().item()
        clip = client_level.next_clip(clip, 0.3, told, 0.5, 200.0, KEY.stream("clip", round))
    assert clip == pytest.approx(torch.quantile(norms, 0.3).item(), rel=0.15)
