"""What a round lost, of cohorts whose factors have more columns than a Gram matrix is formed of: estimated with its
standard error, exact on request, and linear in the clients."""

import pytest
import torch
from algebra import begin, method_of, spec, train
from torch.utils.flop_counter import FlopCounterMode

from fedray.adapters import Layer
from fedray.methods import gathering
from fedray.methods.gathering import GRAM_COLUMNS, PROBES

#: Larger than PROBES on both sides, so that the matrix itself is dearer than the vectors; rank 2.
WIDE = (Layer("one", 150, 170, 2, 1.0), Layer("two", 190, 150, 2, 0.5))
MANY = 80  # clients: 160 columns
CHEAP = ["lora+fedit", "lora+ffa", "lora+fedex", "lora+flora", "lora-sb+fed-sb", "ravan+ravan", "lora+fedsvd"]


def updates_of(method, state, clients):
    return [train(method, state, f"c{i}", i, torch.float32, 1.0 + i % 3)[0] for i in range(clients)]


def both(pair):
    kind, method = method_of(pair)
    state = begin(method, spec(kind, WIDE))
    updates = updates_of(method, state, 2 * MANY if kind == "abba" else MANY)  # whose deltas have one column
    return [method.aggregate(state, updates, exact_report=exact)[1] for exact in (False, True)]


@pytest.mark.parametrize("pair", ["lora+fedit", "lora+fedex", "lora+fra", "lora+flora", "abba+fedex"])
def test_an_estimate_is_near_what_was_measured_and_says_how_near(pair):
    estimated, exact = both(pair)
    assert exact.standard_error is None and estimated.standard_error is not None
    for name, deviation in zip(("aggregation_error", "exactness"), estimated.standard_error, strict=True):
        here, there = getattr(estimated, name), getattr(exact, name)
        assert abs(here - there) <= 5 * deviation + 1e-12
        assert deviation <= 0.1 * here
    assert estimated.ideal_norm == pytest.approx(exact.ideal_norm, rel=0.2)


def test_the_exact_report_is_that_of_the_dense_matrices():
    kind, method = method_of("lora+fedit")
    state = begin(method, spec(kind, WIDE))
    moved = [train(method, state, f"c{i}", i, torch.float32, 1.0) for i in range(MANY)]
    ideal = {layer.name: sum(d[layer.name] for _, d, _ in moved) / MANY for layer in WIDE}
    after, found = method.aggregate(state, [u for u, _, _ in moved], exact_report=True)
    factors = {one: state.spec.factors(one, after.tensors) for one in WIDE}
    landed = {one.name: one.scale * f["lora_B"].double() @ f["lora_A"].double() for one, f in factors.items()}
    gap = sum((landed[n] - ideal[n]).square().sum() for n in ideal).sqrt().item()
    whole = sum(t.square().sum() for t in ideal.values()).sqrt().item()
    assert found.ideal_norm == pytest.approx(whole, rel=1e-9)
    assert found.exactness == pytest.approx(gap / whole, rel=1e-9) == pytest.approx(found.aggregation_error, rel=1e-6)


def test_standard_errors_are_what_estimates_scatter_by(monkeypatch):
    """Over many draws of the vectors: the scatter of the estimates, and that they are not to one side."""
    kind, method = method_of("lora+fedit")
    state = begin(method, spec(kind, WIDE))
    updates = updates_of(method, state, MANY)
    exact = method.aggregate(state, updates, exact_report=True)[1].aggregation_error
    found = []
    for seed in range(40):
        monkeypatch.setattr(gathering, "SEED", seed)
        found.append(method.aggregate(state, updates)[1])
    values = torch.tensor([d.aggregation_error for d in found])
    said = sum(d.standard_error[0] for d in found) / len(found)
    assert 0.6 < values.std().item() / said < 1.6
    assert abs(values.mean().item() - exact) < 4 * said / len(found) ** 0.5


@pytest.mark.parametrize("pair", ["lora+fedit", "lora+fedex"])
def test_small_cohorts_are_measured(pair):
    kind, method = method_of(pair)
    state = begin(method, spec(kind, WIDE))
    assert method.aggregate(state, updates_of(method, state, 20))[1].standard_error is None
    assert GRAM_COLUMNS >= 2 * PROBES


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("pair", CHEAP)
def test_four_times_the_clients_take_four_times_the_work_at_most(pair, exact):
    """Multiplications in matrix products, from where a base update has more columns than its matrix has room for."""
    kind, method = method_of(pair)
    state = begin(method, spec(kind, WIDE))
    updates = updates_of(method, state, 8 * MANY)
    work = []
    for count in (2 * MANY, 8 * MANY):
        with FlopCounterMode(display=False) as counter:
            method.aggregate(state, updates[:count], exact_report=exact)
        work.append(counter.get_total_flops())
    assert work[1] <= 4.1 * work[0]
