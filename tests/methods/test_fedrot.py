"""FedRot-LoRA: turned factors mean the same update, and rotated clients are found again."""

import pytest
import torch
from algebra import begin, dense, spec, train

from fedray.methods import Update
from fedray.methods.fedit import FedIT
from fedray.methods.fedrot import FedRot, nearest_rotation
from fedray.methods.state import key


def turned(s, update: Update, seed: int) -> Update:
    """The same update in other factors: (B_i R, R^T A_i) with a random rotation R a layer."""
    g, tensors = torch.Generator().manual_seed(seed), dict(update.tensors)
    B, A = s.adapter.pair
    for layer in s.layers:
        rank = tensors[key(layer, B)].shape[1]
        R = nearest_rotation(torch.randn(rank, rank, dtype=torch.float64, generator=g))
        tensors[key(layer, B)] = tensors[key(layer, B)] @ R
        tensors[key(layer, A)] = R.T @ tensors[key(layer, A)]
    return Update(update.client, update.weight, tensors)


def played(method, s, rounds: int, seed: int | None = None):
    """The state after some rounds, and the last one's diagnostics; from round 2 on each client's factors are turned."""
    state = begin(method, s)
    for round in range(rounds):
        updates = [train(method, state, f"c{i}", 100 * round + i, torch.float64, 1.0 + i)[0] for i in range(3)]
        if seed is not None and round:
            updates = [turned(s, u, seed + 10 * round + i) for i, u in enumerate(updates)]
        state, diagnostics = method.aggregate(state, iter(updates))
    return state, diagnostics


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_nearest_rotation_is_one_and_none_is_nearer(size):
    g = torch.Generator().manual_seed(size)
    M = torch.randn(size, size, dtype=torch.float64, generator=g)
    R = nearest_rotation(M)
    torch.testing.assert_close(R.T @ R, torch.eye(size, dtype=torch.float64))
    assert torch.linalg.det(R) == pytest.approx(1.0)
    for _ in range(50):
        other = nearest_rotation(torch.randn(size, size, dtype=torch.float64, generator=g))
        assert torch.trace(other.T @ M) <= torch.trace(R.T @ M) + 1e-12


@pytest.mark.parametrize("kind", ["lora", "abba"])
@pytest.mark.parametrize("rounds", [2, 3], ids=["by A", "by B"])
def test_whatever_factors_a_client_sends_for_its_update_the_aggregate_is_the_same(kind, rounds):
    s, method = spec(kind), FedRot(rotation=1.0)
    before = played(method, s, rounds - 1)[0]
    updates = [train(method, before, f"c{i}", i, torch.float64, 1.0 + i)[0] for i in range(3)]
    a, _ = method.aggregate(before, iter(updates))
    b, _ = method.aggregate(before, iter([turned(s, u, 50 + i) for i, u in enumerate(updates)]))
    assert all(torch.allclose(a.tensors[n], b.tensors[n], rtol=1e-8, atol=1e-10) for n in a.tensors)
    plain = [FedIT().aggregate(before, iter(us))[0] for us in (updates, [turned(s, u, 50) for u in updates])]
    assert any(not torch.allclose(plain[0].tensors[n], plain[1].tensors[n]) for n in a.tensors)


def test_turning_loses_less_than_plain_averaging_and_more_of_it_less_still():
    losses = {}
    for rotation in (0.25, 0.5, 1.0):
        _, diagnostics = played(FedRot(rotation=rotation), spec(), 2, seed=1)
        losses[rotation] = diagnostics.exactness
        assert diagnostics.exactness < diagnostics.aggregation_error
    assert losses[1.0] < losses[0.5] < losses[0.25]


def test_clients_that_only_turned_the_broadcast_are_averaged_without_loss():
    s, method = spec(), FedRot(rotation=1.0)
    state, _ = played(method, s, 1)
    view = method.view(s, method.broadcast(state), None)
    same = {n: t.double() for n, t in view.tensors.items()}
    updates = [turned(s, Update(f"c{i}", 1.0 + i, same), i) for i in range(5)]
    after, diagnostics = method.aggregate(state, iter(updates))
    assert diagnostics.exactness < 1e-12 < 0.01 < diagnostics.aggregation_error
    now = method.view(s, method.broadcast(after), None)
    before = dense(s, view, view.tensors)
    assert all(torch.allclose(d, before[n], atol=1e-8) for n, d in dense(s, now, now.tensors).items())


def test_the_first_round_is_fedits():
    s = spec()
    mine, theirs = played(FedRot(), s, 1), played(FedIT(), s, 1)
    assert all(torch.equal(mine[0].tensors[n], t) for n, t in theirs[0].tensors.items())
    assert mine[1] == theirs[1]
