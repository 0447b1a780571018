"""How updates become a cohort: in one pass, those of a mean forgotten as they are added."""

import dataclasses
import gc
import math
import weakref
from typing import ClassVar

import pytest
import torch
from algebra import begin, method_of, spec, train

from fedray.adapters import Layer
from fedray.errors import RoundError
from fedray.federation.wire import PacketView, pack
from fedray.lowrank import KRYLOV_COLUMNS, OVERSAMPLE, LowRank
from fedray.methods import Update
from fedray.methods.gathering import GRAM_COLUMNS, Gathering
from fedray.methods.robust import RULES

WIDE = (Layer("one", 150, 170, 2, 1.0), Layer("two", 190, 150, 2, 0.5))
MANY = 80  # clients: of rank 2 they have more columns than a layer has rows

LINEAR = ["lora+fedit", "lora+ffa", "lora+rolora", "lora+fedsa", "abba+ffa", "lora-sb+fed-sb", "ravan+ravan"]
STACKING = ["lora+fedex", "lora+flora", "lora+fra", "lora+fedsvd"]


def first_state(pair):
    kind, method = method_of(pair)
    return method, begin(method, spec(kind, WIDE))


def stream(method, state, alive, most, count=3 * MANY):
    """Updates that are watched: `most` is the largest number that lived at once."""
    for i in range(count):
        update = train(method, state, f"c{i}", i % 7, torch.float32, 1.0 + i % 3)[0]
        tensors = {name: t.clone() for name, t in update.tensors.items()}
        alive.add(i)
        weakref.finalize(next(iter(tensors.values())), alive.discard, i)
        most[0] = max(most[0], len(alive))
        yield Update(update.client, update.weight, tensors)
        del tensors, update


@pytest.mark.parametrize("pair", LINEAR)
def test_updates_of_a_mean_are_forgotten_as_they_are_added(pair):
    method, state = first_state(pair)
    alive, most = set(), [0]
    method.aggregate(state, stream(method, state, alive, most))
    gc.collect()
    columns = max(state.spec.adapter.delta_columns(layer.rank) for layer in WIDE)
    assert most[0] <= GRAM_COLUMNS // columns + 2 < 3 * MANY and not alive


@pytest.mark.parametrize("pair", ["lora+fedit", "abba+ffa", "lora-sb+fed-sb", "ravan+ravan"])
def test_a_mean_has_the_same_bits_whether_updates_are_kept_or_not(pair):
    method, state = first_state(pair)
    updates = [train(method, state, f"c{i}", i % 7, torch.float32, 1.0 + i % 3)[0] for i in range(2 * MANY)]
    streamed, kept = (method.aggregate(state, updates, exact_report=exact)[0] for exact in (False, True))
    assert streamed.tensors.keys() == kept.tensors.keys()
    assert all(torch.equal(t, kept.tensors[name]) for name, t in streamed.tensors.items())


@pytest.mark.parametrize("pair", ["lora+ffa", "abba+ffa", "lora-sb+fed-sb", "ravan+ravan", "lora+rolora"])
def test_the_delta_of_the_mean_tells_what_the_clients_factors_do(pair):
    """Where a method is linear and exact: of a large cohort, with nothing kept of it."""
    method, state = first_state(pair)
    updates = [train(method, state, f"c{i}", i, torch.float32, 1.0 + i % 3)[0] for i in range(2 * MANY)]
    streamed, kept = (method.aggregate(state, updates, exact_report=exact)[1] for exact in (False, True))
    assert streamed.standard_error is None
    assert streamed.ideal_norm == pytest.approx(kept.ideal_norm, rel=1e-9)
    assert streamed.exactness == pytest.approx(kept.exactness, rel=0.2) and 0 < streamed.exactness < 1e-6
    assert streamed.aggregation_error == 0.0 and kept.aggregation_error < 1e-12


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_robust_rule_has_every_update(rule):
    method, state = first_state("lora+fedit")
    robust = RULES[rule](attackers=1) if rule != "median" else RULES[rule]()
    updates = [train(method, state, f"c{i}", i, torch.float32, 1.0)[0] for i in range(MANY)]
    after, found = type(method)(robust=robust).aggregate(state, updates)
    assert found.exactness > 0 and all(torch.isfinite(t).all() for t in after.tensors.values())


@pytest.mark.parametrize("pair", STACKING)
def test_a_sum_of_many_is_no_wider_than_its_matrix(pair):
    """With factors of more columns than the matrix has rows: what is sent down has no more numbers than need be."""
    method, state = first_state(pair)
    updates = [train(method, state, f"c{i}", i, torch.float32, 1.0)[0] for i in range(2 * MANY)]
    after, found = method.aggregate(state, updates)
    for layer in WIDE:
        room = min(layer.m, layer.n) * (layer.m + layer.n)
        held = sum(t.numel() for i in after.increments for n, t in i.tensors.items() if n.startswith(f"{layer.name}."))
        assert held <= room
    if method.exact == "yes":
        assert found.exactness < 1e-6


def test_a_tail_that_is_folded_is_exact_in_a_large_cohort_too():
    """Where the first singular values are iterated for, the tail is what they leave."""
    kind, plain = method_of("lora+fra")
    method = dataclasses.replace(plain, residual="fold")
    state = begin(method, spec(kind, WIDE))
    updates = [train(method, state, f"c{i}", i, torch.float32, 1.0)[0] for i in range(2 * MANY)]
    after, found = method.aggregate(state, updates, exact_report=True)
    assert all(min(layer.m, layer.n) >= KRYLOV_COLUMNS * (layer.rank + OVERSAMPLE) for layer in WIDE)
    assert found.exactness < 1e-6 < found.aggregation_error
    means, base = method.view(state.spec, after, None).tensors, method.view(state.spec, after, None).base
    for layer in WIDE:
        factors = [state.spec.factors(layer, u.tensors) for u in updates]
        want = sum(layer.scale * f["lora_B"].double() @ f["lora_A"].double() for f in factors) / len(factors)
        B, A = means[f"{layer.name}.lora_B"].double(), means[f"{layer.name}.lora_A"].double()
        torch.testing.assert_close(layer.scale * B @ A + base[layer.name].dense().double(), want, rtol=0, atol=1e-6)


class Watched(PacketView):
    """An update in the object store: every tensor that is unpacked of it is watched."""

    alive: ClassVar[dict[int, int]] = {}
    most: ClassVar[list[int]] = [0]

    def __getitem__(self, name):
        tensor = super().__getitem__(name)
        self.alive[id(tensor)] = tensor.numel()
        weakref.finalize(tensor, self.alive.pop, id(tensor), None)
        self.most[0] = max(self.most[0], sum(self.alive.values()))
        return tensor


@pytest.mark.parametrize("pair", STACKING)
def test_updates_that_are_kept_stay_where_they_are(pair):
    """In the object store: of a large cohort no more is unpacked at once than of a small one, and the bits are the
    same as of updates that are held here."""
    method, state = first_state(pair)
    most = {}
    for count in (MANY, 4 * MANY):
        updates = [train(method, state, f"c{i}", i, torch.float32, 1.0 + i % 3)[0] for i in range(count)]
        held = method.aggregate(state, updates)[0]
        Watched.alive.clear()
        Watched.most[0] = 0
        watched = method.aggregate(state, (Update(u.client, u.weight, Watched(pack(u.tensors))) for u in updates))[0]
        most[count] = Watched.most[0]
        assert all(torch.equal(t, watched.tensors[name]) for name, t in held.tensors.items())
        for one, other in zip(held.increments, watched.increments, strict=True):
            assert all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())
    assert 0 < most[4 * MANY] <= 1.05 * most[MANY]


def test_no_update_with_a_weight_is_no_round():
    method, state = first_state("lora+fedit")
    with pytest.raises(RoundError, match="at least one update with a positive weight"):
        method.aggregate(state, [])
    with pytest.raises(RoundError, match="at least one update with a positive weight"):
        reading = Gathering(state.spec, lambda client: {}, False, "means", True)
        reading.add(Update("one", 0.0, dict(state.tensors)))
        reading.cohort(state.tensors)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_a_total_is_the_sum_of_its_terms_whatever_its_form(count):
    generator = torch.Generator().manual_seed(count)
    terms = [
        LowRank(*(torch.randn(s, dtype=torch.float64, generator=generator) for s in ((7, 3), (3, 11))))
        for _ in range(count)
    ]
    weights = [0.5 - i for i in range(count)]
    total = LowRank.total(iter(terms), weights)
    dense = sum(w * t.B @ t.A for w, t in zip(weights, terms, strict=True))
    assert total.k == min(3 * count, 7) and torch.allclose(total.dense(), dense, atol=1e-12)
    assert math.isclose(total.norm(), torch.linalg.matrix_norm(dense).item(), rel_tol=1e-9)
    with pytest.raises(ValueError, match="no shape"):
        LowRank.total([], [])
