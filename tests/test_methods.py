"""Every method against the dense fp64 mean: several rounds, non-square and square layers, unequal weights, prime cohorts."""

import pytest
import torch

from fedray.adapters import ADAPTERS, Layer
from fedray.errors import RoundError
from fedray.lowrank import LowRank
from fedray.methods import FFA, FRA, FRAFFA, FedEx, FedExKeep, FedIT, FLoRA, Spec, State, Update

LAYERS = (Layer("square", 40, 40, 3, 0.5), Layer("wide", 37, 53, 2, 2.0), Layer("tall", 61, 29, 4, 1.0))
EXACT = {
    "ffa": FFA(),
    "fedex": FedEx(),
    "fedex-reinit": FedEx(assignment="reinit"),
    "fedex-keep": FedExKeep(),
    "flora": FLoRA(),
    "fra-fold": FRA(residual="fold"),
    "fra-fold-balanced": FRA(residual="fold", split="balanced"),
    "fedex-high-rank": FedEx(residual_rank=40),
}
INEXACT = {"fedit": FedIT(), "fra": FRA(), "fra-balanced": FRA(split="balanced"), "fedex-truncated": FedEx(residual_rank=1), "fra-ffa": FRAFFA(fra_rounds=1)}


def spec(dtype=torch.float64):
    return Spec(ADAPTERS["lora"], LAYERS, seed=7)


def effective(method, state: State, client=None) -> dict[str, torch.Tensor]:
    """W - W0 per layer, dense in fp64: what a client computes with."""
    view = method.view(state.spec, method.broadcast(state), client)
    result = {}
    for layer in LAYERS:
        delta = state.spec.adapter.delta(layer, state.spec.factors(layer, view.tensors))
        result[layer.name] = delta.to(torch.float64).dense()
        if layer.name in view.base:
            result[layer.name] = result[layer.name] + view.base[layer.name].to(torch.float64).dense()
    return result


def train(method, state, client, seed, dtype, weight):
    """A stand-in for local training: a random step on whatever trains, head included."""
    view = method.view(state.spec, method.broadcast(state), client)
    g = torch.Generator().manual_seed(seed)
    moves = [n for n in view.tensors if n in state.heads or n.rsplit(".", 1)[1] in view.trained]
    sent = {n: (view.tensors[n].to(dtype) + 0.3 * torch.randn(view.tensors[n].shape, generator=g, dtype=dtype)) for n in moves}
    after = {**view.tensors, **sent}
    dense = {}
    for layer in LAYERS:
        dense[layer.name] = state.spec.adapter.delta(layer, {n: t.double() for n, t in state.spec.factors(layer, after).items()}).dense()
        if layer.name in view.base:
            dense[layer.name] = dense[layer.name] + view.base[layer.name].to(torch.float64).dense()
    return Update(client, weight, sent), dense


def play(method, k, rounds, dtype, cohorts=None):
    """Yield per round: relative miss of every client's effective weights, the cohort's own miss as reported, the state."""
    state = method.init(spec(), {"head.weight": torch.zeros(2, 5)})
    for t in range(rounds):
        names = cohorts[t] if cohorts else [f"c{i}" for i in range(k)]
        weights = [1.0 + i * i for i in range(len(names))]
        pairs = [train(method, state, name, 100 * t + i, dtype, w) for i, (name, w) in enumerate(zip(names, weights, strict=True))]
        p = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        want = {layer.name: sum(pi * dense[layer.name] for pi, (_, dense) in zip(p, pairs, strict=True)) for layer in LAYERS}
        before = effective(method, state)
        state, diagnostics = method.aggregate(state, iter([update for update, _ in pairs]))
        head = sum(pi * update.tensors["head.weight"].double() for pi, (update, _) in zip(p, pairs, strict=True))
        torch.testing.assert_close(state.tensors["head.weight"].double(), head, rtol=1e-6, atol=1e-6)
        miss = 0.0
        for client in [None, "c0", f"c{k - 1}", "never-seen"]:
            got = effective(method, state, client)
            if method.personal and client == "never-seen":
                continue  # its factors are the first draw, over the same effective weights: checked by client=None
            gap = sum((got[n] - want[n]).norm() ** 2 for n in want) ** 0.5
            miss = max(miss, (gap / sum(want[n].norm() ** 2 for n in want) ** 0.5).item())
        yield miss, diagnostics, state, before


@pytest.mark.parametrize("k", [1, 2, 5, 7])
@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_match_the_dense_mean(name, k):
    for miss, diagnostics, _, _ in play(EXACT[name], k, 3, torch.float64):
        assert miss < 1e-10
        assert diagnostics.exactness < 1e-10
    for miss, diagnostics, _, _ in play(EXACT[name], k, 3, torch.float32):
        assert miss < 1e-5
        assert diagnostics.exactness < 1e-5


@pytest.mark.parametrize("k", [2, 5, 7])
def test_fedit_fails_that_test_and_reports_by_how_much(k):
    for miss, diagnostics, _, _ in play(FedIT(), k, 2, torch.float64):
        assert miss > 0.05
        assert diagnostics.exactness == pytest.approx(miss, rel=1e-9)
        assert diagnostics.aggregation_error == pytest.approx(miss, rel=1e-9)


@pytest.mark.parametrize("name", ["fra", "fra-balanced"])
@pytest.mark.parametrize("k", [2, 5, 7])
def test_fra_misses_by_its_reported_tail_and_by_the_optimal_one(name, k):
    for miss, diagnostics, _, _ in play(INEXACT[name], k, 2, torch.float64):
        assert miss == pytest.approx(diagnostics.exactness, rel=1e-8)
        assert 0 < diagnostics.exactness < diagnostics.aggregation_error


def test_fra_keeps_the_best_rank_r_of_the_dense_mean():
    method, state = FRA(), FRA().init(spec())
    pairs = [train(method, state, f"c{i}", i, torch.float64, 1.0 + i) for i in range(5)]
    after, _ = method.aggregate(state, [u for u, _ in pairs])
    for layer in LAYERS:
        dense = sum((1.0 + i) / 15 * d[layer.name] for i, (_, d) in enumerate(pairs))
        U, S, Vt = torch.linalg.svd(dense)
        best = (U[:, : layer.rank] * S[: layer.rank]) @ Vt[: layer.rank]
        torch.testing.assert_close(effective(method, after)[layer.name], best, rtol=1e-9, atol=1e-9)
        A = after.tensors[f"{layer.name}.lora_A"]
        torch.testing.assert_close(A @ A.T, torch.eye(layer.rank, dtype=A.dtype), rtol=1e-9, atol=1e-9)


def test_truncated_fedex_loses_exactly_the_dense_tail():
    method = FedEx(residual_rank=1)
    state = method.init(spec())
    pairs = [train(method, state, f"c{i}", i, torch.float64, 1.0 + i) for i in range(5)]
    _, diagnostics = method.aggregate(state, [u for u, _ in pairs])
    tail = total = 0.0
    for layer in LAYERS:
        mean = {n: sum((1 + i) / 15 * u.tensors[f"{layer.name}.{n}"] for i, (u, _) in enumerate(pairs)) for n in ("lora_A", "lora_B")}
        dense = sum((1.0 + i) / 15 * d[layer.name] for i, (_, d) in enumerate(pairs))
        S = torch.linalg.svdvals(dense - layer.scale * mean["lora_B"] @ mean["lora_A"])
        tail, total = tail + S[1:].square().sum(), total + dense.square().sum()
    assert diagnostics.exactness == pytest.approx((tail / total).sqrt().item(), rel=1e-9)


def test_fra_ffa_freezes_orthonormal_rows_and_is_exact_from_then_on():
    played = list(play(FRAFFA(fra_rounds=2), 5, 4, torch.float64))
    assert all(miss > 1e-3 for miss, *_ in played[:2])
    assert all(miss < 1e-10 and d.exactness < 1e-10 for miss, d, *_ in played[2:])
    final = played[-1][2]
    assert final.trained == ("lora_B",) and not any(n.endswith("lora_A") for n in final.tensors)
    A = FRAFFA().view(final.spec, final, None).tensors["wide.lora_A"]
    torch.testing.assert_close(A @ A.T, torch.eye(2, dtype=A.dtype), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [FedEx(), FLoRA(), FedExKeep(), FFA(), FRA(residual="fold")], ids=lambda m: type(m).__name__)
def test_changing_cohorts_stay_exact(method):
    cohorts = [["c0", "c1", "c2"], ["c3", "c1"], ["c4"], ["c0", "c3", "c4", "c6", "c5"], ["c2", "c0"]]
    for miss, diagnostics, _, _ in play(method, 7, 5, torch.float64, cohorts):
        assert miss < 1e-10 and diagnostics.exactness < 1e-10


def test_keep_leaves_every_client_its_own_factors_to_the_bit_and_does_not_grow():
    method = FedExKeep()
    state = method.init(spec())
    for t in range(4):
        sent = [train(method, state, f"c{i}", 10 * t + i, torch.float32, 1.0 + i)[0] for i in range(3)]
        state, _ = method.aggregate(state, sent)
        for update in sent:
            view = method.view(state.spec, method.broadcast(state), update.client)
            assert all(torch.equal(view.tensors[n], t) for n, t in update.tensors.items())
        assert state.tensors["tall.stack_B"].shape[1] == 3 * 4  # k r: full participation telescopes


def test_keep_stays_bounded_under_changing_cohorts():
    cohorts = [[f"c{(t + i) % 7}" for i in range(3)] for t in range(20)]
    for miss, _, state, _ in play(FedExKeep(), 7, 20, torch.float64, cohorts):
        assert miss < 1e-10
        assert state.tensors["tall.stack_B"].shape[1] <= 7 * 4
        assert all(d.k <= 7 * 4 + min(d.shape) for d in FedExKeep().view(state.spec, state, None).base.values())


def test_the_total_base_update_is_bounded_by_the_dense_matrix():
    for miss, _, state, _ in play(FLoRA(), 7, 6, torch.float64):
        assert miss < 1e-10
        view = FLoRA().view(state.spec, state, None)
        assert all(delta.k <= min(delta.shape) for delta in view.base.values())


@pytest.mark.parametrize("name", [*EXACT, *INEXACT])
def test_every_client_starts_from_the_same_factors_and_delta_zero(name):
    method = {**EXACT, **INEXACT}[name]
    one, other = (method.init(spec()) for _ in range(2))
    for client in (None, "a", "b"):
        mine, theirs = method.view(one.spec, one, client).tensors, method.view(other.spec, other, client).tensors
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert all(not dense.any() for dense in effective(method, one).values())


@pytest.mark.parametrize("name", [*EXACT, *INEXACT])
def test_the_sum_does_not_change_with_weights_of_another_scale(name):
    method = {**EXACT, **INEXACT}[name]
    state = method.init(spec())
    updates = [train(method, state, f"c{i}", i, torch.float32, 2.0 ** (i % 3))[0] for i in range(5)]
    one, _ = method.aggregate(state, updates)
    scaled = [Update(u.client, u.weight * 1024, u.tensors) for u in updates]
    other, _ = method.aggregate(state, scaled)
    assert all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)


@pytest.mark.parametrize("name", [*EXACT, *INEXACT])
def test_payload_is_what_the_state_holds(name):
    method, k = {**EXACT, **INEXACT}[name], 3
    state = method.init(spec())
    for t in range(2):
        updates = [train(method, state, f"c{i}", 10 * t + i, torch.float32, 1.0)[0] for i in range(k)]
        seen = {i.version for i in state.increments}
        state, _ = method.aggregate(state, updates)
    up = sum(t.numel() for t in updates[0].tensors.values())
    new = [i for i in state.increments if i.version not in seen]
    down = sum(t.numel() for t in state.tensors.values()) + sum(t.numel() for i in new for t in i.tensors.values())
    assert (up, down) == (method.payload(state.spec, k).up, method.payload(state.spec, k).down)


def test_bad_updates_are_refused_by_name():
    method, state = FedIT(), FedIT().init(spec())
    update, _ = train(method, state, "ward-7", 0, torch.float32, 1.0)
    update.tensors["tall.lora_B"][0, 0] = float("nan")
    with pytest.raises(RoundError, match="client 'ward-7' sent a value that is not finite in tall.lora_B"):
        method.aggregate(state, [update])
    with pytest.raises(RoundError, match="at least one update"):
        method.aggregate(state, [])


def test_lora_factors_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="does not fit rank 3"):
        ADAPTERS["lora"].factors(LAYERS[0], LowRank(torch.zeros(40, 4), torch.zeros(4, 40)))
