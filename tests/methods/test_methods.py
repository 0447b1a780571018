"""Every method with every adapter against the dense fp64 mean: several rounds, non-square and square layers, unequal
weights, prime cohorts. The algebra half of the battery; `tests/federation/test_run.py` runs the same pairs through
whole runs."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from algebra import LAYERS, aggregate, begin, effective, method_of, spec, train
from support import ALL, EXACT, LINEAR, PAIRS, STATED

from fedray.adapters import ADAPTERS, Layer
from fedray.config.build import make_method
from fedray.config.read import from_dict
from fedray.errors import ConfigError, RoundError
from fedray.methods import METHODS, Diagnostics, FedEx, FedExKeep, ServerOptimizer, State, Update, why_not
from fedray.methods.fed_sb import RavanMean
from fedray.methods.fedask import FedASK
from fedray.methods.fedit import FedIT
from fedray.methods.fedrpca import FedRPCA, robust_pca
from fedray.methods.fedsa import FedSA
from fedray.methods.fedsvd import FedSVD
from fedray.methods.flora import FLoRA
from fedray.methods.fra import FRA, FRAFFA, FlexLoRA, FLoRIST
from fedray.methods.hetlora import HetLoRA
from fedray.methods.lora_fair import LoRAFair
from fedray.methods.rolora import RoLoRA


@dataclass
class Round:
    """`gap`: the largest norm of a client's effective weights minus the ideal's, over all layers; `miss`: that over the
    ideal's norm."""

    gap: float
    miss: float
    diagnostics: Diagnostics
    state: State
    before: State


def play(method, s, k, rounds, dtype, cohorts=None):
    state = begin(method, s)
    for t in range(rounds):
        names = cohorts[t] if cohorts else [f"c{i}" for i in range(k)]
        weights = [1.0 + i * i for i in range(len(names))]
        moved = [
            train(method, state, name, 100 * t + i, dtype, w)
            for i, (name, w) in enumerate(zip(names, weights, strict=True))
        ]
        p = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        want = {
            layer.name: sum(pi * d[layer.name] for pi, (_, d, _) in zip(p, moved, strict=True)) for layer in s.layers
        }
        before = state
        state, diagnostics = aggregate(method, state, [u for u, _, _ in moved], [x for _, _, x in moved])
        head = sum(pi * u.tensors["head.weight"].double() for pi, (u, _, _) in zip(p, moved, strict=True))
        torch.testing.assert_close(state.tensors["head.weight"].double(), head, rtol=1e-6, atol=1e-6)
        gap = 0.0
        for client in [None, "c0", f"c{k - 1}", "never-seen"]:
            if client in s.ranks or (method.personal and client == "never-seen"):
                # A smaller rank sees less; keep's first draws lie over the same effective weights: checked by
                # client=None.
                continue
            got = effective(method, state, client)
            gap = max(gap, sum((got[n] - want[n]).norm().item() ** 2 for n in want) ** 0.5)
        yield Round(gap, gap / sum(want[n].norm().item() ** 2 for n in want) ** 0.5, diagnostics, state, before)


@pytest.mark.parametrize("pair", sorted(LINEAR))
def test_a_linear_method_makes_of_updates_what_it_makes_of_their_mean(pair):
    """What secure sums and client-level noise rest on: nothing but the weighted mean of the uploads is used."""
    kind, method = method_of(pair)
    state = begin(method, spec(kind))
    for t in range(3):
        weights = [1.0, 2.0, 5.0]
        updates = [train(method, state, f"c{i}", 10 * t + i, torch.float64, w)[0] for i, w in enumerate(weights)]
        mean = {
            name: sum(w / 8.0 * u.tensors[name].double() for w, u in zip(weights, updates, strict=True))
            for name in updates[0].tensors
        }
        of_mean, _ = method.aggregate(state, [Update("(the sum)", 8.0, mean)])
        state, _ = method.aggregate(state, updates)
        assert of_mean.tensors.keys() == state.tensors.keys() and len(of_mean.increments) == len(state.increments)
        for name, tensor in state.tensors.items():
            torch.testing.assert_close(of_mean.tensors[name].double(), tensor.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("k", [1, 2, 5, 7])
@pytest.mark.parametrize("pair", sorted(EXACT))
def test_exact_methods_match_the_dense_mean(pair, k):
    kind, method = method_of(pair)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for r in play(method, spec(kind), k, 3, dtype):
            assert r.miss < bound
            assert r.diagnostics.exactness < bound


@pytest.mark.parametrize("k", [2, 5, 7])
@pytest.mark.parametrize("pair", sorted(STATED))
def test_the_other_methods_miss_by_exactly_what_they_report(pair, k):
    kind, method = method_of(pair)
    for r in play(method, spec(kind), k, 3, torch.float64):
        if method.name == "fra-ffa" and r.before.round >= method.fra_rounds:
            assert r.miss < 1e-10 and r.diagnostics.exactness < 1e-10
            continue
        assert r.gap == pytest.approx(r.diagnostics.exactness * r.diagnostics.ideal_norm, rel=1e-8)
        assert r.diagnostics.exactness > 1e-4
        if method.name == "fedit":
            assert r.diagnostics.exactness == pytest.approx(r.diagnostics.aggregation_error, rel=1e-9) and r.miss > 0.05
        if kind == "lora" and method.name in ("fra", "fra-ffa", "lora-fair"):
            assert r.diagnostics.exactness < r.diagnostics.aggregation_error


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_fedask_bounds_its_loss_from_sketches_and_is_exact_where_the_sketch_holds_the_sum(k):
    for r in play(FedASK(oversample=2), spec(), k, 3, torch.float64):
        assert r.gap <= r.diagnostics.exactness * r.diagnostics.ideal_norm * (1 + 1e-9) + 1e-12  # rounding
        assert r.diagnostics.aggregation_error is None
        assert (
            k > 2 or r.diagnostics.exactness * r.diagnostics.ideal_norm < 2 * r.gap + 1e-9
        )  # a bound, and a tight one for few clients
    wide, fra = (
        play(FedASK(oversample=40), spec(), k, 2, torch.float64),
        play(FRA(split="balanced"), spec(), k, 2, torch.float64),
    )
    for r, best in zip(wide, fra, strict=True):
        # The sketch holds everything: what is lost is the tail, and the factors are FRA's.
        assert r.gap == pytest.approx(r.diagnostics.exactness * r.diagnostics.ideal_norm, rel=1e-6, abs=1e-9)
        if r.before.round == 0:
            assert r.gap == pytest.approx(best.gap, rel=1e-6, abs=1e-9)
    one = list(play(FedASK(oversample=40), spec(), 1, 2, torch.float64))
    assert all(r.miss < 1e-9 for r in one)


@pytest.mark.parametrize("kind", ["lora", "abba"])
def test_fedsa_shares_A_and_leaves_every_client_its_own_B(kind):
    method, s = FedSA(), spec(kind)
    state, own = begin(method, s), {}
    B, A = s.adapter.pair
    for t in range(3):
        moved = {
            c: train(method, state, c, 10 * t + i, torch.float64, 1.0 + i, own.get(c))
            for i, c in enumerate(("x", "y", "z"))
        }
        assert not any(n.endswith(B) for u, _, _ in moved.values() for n in u.tensors)
        state, diagnostics = aggregate(method, state, [u for u, _, _ in moved.values()], None)
        own = {c: {n: v for n, v in trained.items() if n.endswith(B)} for c, (_, _, trained) in moved.items()}
        assert (diagnostics.exactness, diagnostics.aggregation_error) == (None, None)
        for layer in LAYERS:
            mean = sum((1 + i) / 6 * u.tensors[f"{layer.name}.{A}"] for i, (u, _, _) in enumerate(moved.values()))
            torch.testing.assert_close(
                method.view(s, state, "x").tensors[f"{layer.name}.{A}"], mean, rtol=1e-12, atol=1e-12
            )


# --- which adapter fits which method --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", METHODS)
def test_every_pair_outside_the_table_is_refused_with_its_reason(name, kind):
    config = {"adapter": {"kind": kind}, "method": {"name": name}}
    if f"{kind}+{name}" in PAIRS:
        assert why_not(name, kind) is None and make_method(from_dict(config)).name == name
        return
    with pytest.raises(ConfigError, match=f"method '{name}' does not fit adapter '{kind}': .*(use|needs) "):
        from_dict(config)


# --- single methods -------------------------------------------------------------------------------------------------


def test_fra_keeps_the_best_rank_r_of_the_dense_mean():
    method, state = FRA(), FRA().init(spec())
    pairs = [train(method, state, f"c{i}", i, torch.float64, 1.0 + i)[:2] for i in range(5)]
    after, _ = method.aggregate(state, [u for u, _ in pairs])
    for layer in LAYERS:
        mean = sum((1.0 + i) / 15 * d[layer.name] for i, (_, d) in enumerate(pairs))
        U, S, Vt = torch.linalg.svd(mean)
        best = (U[:, : layer.rank] * S[: layer.rank]) @ Vt[: layer.rank]
        torch.testing.assert_close(effective(method, after)[layer.name], best, rtol=1e-9, atol=1e-9)
        A = after.tensors[f"{layer.name}.lora_A"]
        torch.testing.assert_close(A @ A.T, torch.eye(layer.rank, dtype=A.dtype), rtol=1e-9, atol=1e-9)


def test_the_balanced_split_puts_the_root_on_both_sides():
    for r in play(FRA(split="balanced"), spec(), 5, 1, torch.float64):
        for layer in LAYERS:
            A, B = r.state.tensors[f"{layer.name}.lora_A"], r.state.tensors[f"{layer.name}.lora_B"]
            torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-9, atol=1e-9)
            assert (A @ A.T - torch.eye(layer.rank)).abs().max() > 0.1


def test_truncated_fedex_loses_exactly_the_dense_tail():
    method = FedEx(residual_rank=1)
    state = method.init(spec())
    pairs = [train(method, state, f"c{i}", i, torch.float64, 1.0 + i)[:2] for i in range(5)]
    _, diagnostics = method.aggregate(state, [u for u, _ in pairs])
    tail = norm = 0.0
    for layer in LAYERS:
        mean = {
            n: sum((1 + i) / 15 * u.tensors[f"{layer.name}.{n}"] for i, (u, _) in enumerate(pairs))
            for n in ("lora_A", "lora_B")
        }
        ideal = sum((1.0 + i) / 15 * d[layer.name] for i, (_, d) in enumerate(pairs))
        S = torch.linalg.svdvals(ideal - layer.scale * mean["lora_B"] @ mean["lora_A"])
        tail, norm = tail + S[1:].square().sum(), norm + ideal.square().sum()
    assert diagnostics.exactness == pytest.approx((tail / norm).sqrt().item(), rel=1e-9)


def test_fra_ffa_freezes_orthonormal_rows_and_is_exact_from_then_on():
    rounds = list(play(FRAFFA(fra_rounds=2), spec(), 5, 4, torch.float64))
    assert all(r.miss > 1e-3 for r in rounds[:2])
    assert all(r.miss < 1e-10 and r.diagnostics.exactness < 1e-10 for r in rounds[2:])
    final = rounds[-1].state
    assert final.trained == ("lora_B",) and not any(n.endswith("lora_A") for n in final.tensors)
    A = FRAFFA().view(final.spec, final, None).tensors["wide.lora_A"]
    torch.testing.assert_close(A @ A.T, torch.eye(2, dtype=A.dtype), rtol=1e-9, atol=1e-9)


def test_fedsvd_gives_an_orthonormal_basis_without_changing_the_model():
    for r in play(FedSVD(), spec(), 3, 2, torch.float64):
        for layer in LAYERS:
            A, B = r.state.tensors[f"{layer.name}.lora_A"], r.state.tensors[f"{layer.name}.lora_B"]
            torch.testing.assert_close(A @ A.T, torch.eye(layer.rank, dtype=A.dtype), rtol=1e-9, atol=1e-9)
            gram = B.T @ B
            torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=1e-9, atol=1e-9)  # U S: orthogonal columns


def test_rolora_alternates_and_sends_each_factor_once():
    method, trained = RoLoRA(), []
    for r in play(method, spec(), 3, 4, torch.float64):
        trained.append(r.before.trained)
        assert len(r.state.increments) <= 2 and not any("lora" in n for n in r.state.tensors)
    assert trained == [("lora_B",), ("lora_A",)] * 2


def test_lora_fair_solves_its_least_squares_problem():
    """The gradient of the objective in dB vanishes, and with the ridge gone nothing in the span of Abar is missed."""
    for correction in (0.3, 1e-12):
        method, s = LoRAFair(correction=correction), spec()
        state = begin(method, s)
        moved = [train(method, state, f"c{i}", i, torch.float64, 1.0 + i) for i in range(3)]
        after, _ = method.aggregate(state, [u for u, _, _ in moved])
        for layer in LAYERS:
            A = after.tensors[f"{layer.name}.lora_A"]
            B = sum((1 + i) / 6 * u.tensors[f"{layer.name}.lora_B"] for i, (u, _, _) in enumerate(moved))
            dB = (after.tensors[f"{layer.name}.lora_B"] - B).requires_grad_()
            ideal = sum(
                (1 + i) / 6 * u.tensors[f"{layer.name}.lora_B"] @ u.tensors[f"{layer.name}.lora_A"]
                for i, (u, _, _) in enumerate(moved)
            )
            ridge = correction * (A @ A.T).diagonal().mean()
            ((ideal - (B + dB) @ A).square().sum() + ridge * dB.square().sum()).backward()
            assert dB.grad.norm() < 1e-9 * ideal.norm()


def test_florist_takes_the_least_rank_for_its_energy_and_fills_the_rest_anew():
    method, state = FLoRIST(energy=0.6), FLoRIST().init(spec())
    moved = [train(method, state, f"c{i}", i, torch.float64, 1.0 + i)[:2] for i in range(5)]
    after, _ = method.aggregate(state, [u for u, _ in moved])
    for layer in LAYERS:
        S = torch.linalg.svdvals(sum((1.0 + i) / 15 * d[layer.name] for i, (_, d) in enumerate(moved))).square()
        p = after.tensors[f"{layer.name}.lora_A"].shape[0]
        assert (S[:p].sum() >= 0.6 * S.sum() or p == layer.rank) and S[: p - 1].sum() < 0.6 * S.sum()
    for r in play(FLoRIST(energy=0.6), spec(), 5, 2, torch.float64):
        view = FLoRIST(energy=0.6).view(r.state.spec, r.state, None)
        for layer in LAYERS:
            p = r.state.tensors[f"{layer.name}.lora_A"].shape[0]
            A, B = view.tensors[f"{layer.name}.lora_A"], view.tensors[f"{layer.name}.lora_B"]
            assert A.shape[0] == layer.rank and not B[:, p:].any() and bool(A[p:].any()) == (p < layer.rank)
    assert {r.state.tensors[f"{layer.name}.lora_A"].shape[0] for layer in LAYERS} != {layer.rank for layer in LAYERS}


def test_robust_pca_finds_a_planted_low_rank_and_sparse_part():
    g = torch.Generator().manual_seed(0)
    L = torch.randn(400, 1, generator=g, dtype=torch.float64) @ torch.randn(1, 60, generator=g, dtype=torch.float64)
    S = 10 * torch.randn(400, 60, generator=g, dtype=torch.float64) * (torch.rand(400, 60, generator=g) < 0.03)
    low, sparse = robust_pca(L + S)
    torch.testing.assert_close(low + sparse, L + S, rtol=0, atol=1e-12)
    assert (low - L).norm() < 1e-3 * L.norm() and (sparse - S).norm() < 1e-3 * S.norm()


def test_fedrpca_counts_the_clients_own_part_by_its_scale():
    state = begin(FedRPCA(), spec())
    moved = [train(FedRPCA(), state, f"c{i}", i, torch.float64, 1.0 + i)[0] for i in range(5)]
    p = torch.tensor([1.0 + i for i in range(5)], dtype=torch.float64) / 15
    after, _ = FedRPCA(sparse_scale=3.0).aggregate(state, moved)
    for name in ("tall.lora_A", "wide.lora_B"):
        old = state.tensors[name].double()
        low, sparse = robust_pca(torch.stack([(u.tensors[name] - old).flatten() for u in moved], 1))
        assert sparse.norm() > 0.01 * low.norm()
        torch.testing.assert_close(
            after.tensors[name], old + (low @ p + 3.0 * (sparse @ p)).reshape(old.shape), rtol=1e-9, atol=1e-9
        )


def test_fedrpca_with_scale_1_is_fedit():
    kwargs = dict(s=spec(), k=5, rounds=2, dtype=torch.float64)
    for one, other in zip(play(FedRPCA(sparse_scale=1.0), **kwargs), play(FedIT(), **kwargs), strict=True):
        for name, tensor in other.state.tensors.items():
            torch.testing.assert_close(one.state.tensors[name], tensor, rtol=1e-9, atol=1e-9)


def test_ravan_sends_the_scaled_cores_and_starts_again_from_scale_1():
    method, s = RavanMean(), spec("ravan")
    state = begin(method, s)
    update, _, trained = train(method, state, "c0", 0, torch.float64, 1.0)
    assert {n.rsplit(".", 1)[1] for n in update.tensors} == {"ravan_H", "weight"}
    core, scale = trained["wide.ravan_H"], trained["wide.ravan_s"]
    assert not torch.equal(scale, torch.ones_like(scale))
    torch.testing.assert_close(update.tensors["wide.ravan_H"], core * scale[:, None, None])
    after, _ = method.aggregate(state, [update])
    assert torch.equal(method.view(s, after, None).tensors["wide.ravan_s"], torch.ones(4))


# --- clients of different ranks -----------------------------------------------------------------------------------

EVEN = tuple(Layer(layer.name, layer.m, layer.n, 4, layer.scale) for layer in LAYERS)
RANKS = {"c0": 4, "c1": 1, "c2": 3, "c3": 2, "c4": 2}


def test_flora_is_exact_for_clients_of_different_ranks_and_sends_no_zeros():
    s = spec(layers=EVEN, ranks=RANKS)
    for r in play(FLoRA(), s, 5, 3, torch.float64):
        assert r.miss < 1e-10 and r.diagnostics.exactness < 1e-10
    state = FLoRA().init(s)
    sizes = [sum(t.numel() for t in train(FLoRA(), state, c, 0, torch.float64, 1.0)[0].tensors.values()) for c in RANKS]
    assert sizes == [RANKS[c] * sum(layer.m + layer.n for layer in EVEN) for c in RANKS]
    after, _ = FLoRA().aggregate(
        state, [train(FLoRA(), state, c, i, torch.float64, 1.0)[0] for i, c in enumerate(RANKS)]
    )
    assert after.increments[-1].tensors["wide.base_A"].shape == (sum(RANKS.values()), 53)


@pytest.mark.parametrize("method", [FlexLoRA(), HetLoRA()], ids=lambda m: m.name)
def test_each_client_gets_the_first_components_of_its_rank(method):
    s = spec(layers=EVEN, ranks=RANKS)
    for r in play(method, s, 5, 2, torch.float64):
        assert r.gap == pytest.approx(r.diagnostics.exactness * r.diagnostics.ideal_norm, rel=1e-8)
        for client, rank in RANKS.items():
            cut = s.cut(client, r.state.tensors)
            assert cut["wide.lora_A"].shape == (rank, 53) and cut["wide.lora_B"].shape == (37, rank)
            view = method.view(s, r.state, client).tensors
            assert (
                torch.equal(view["wide.lora_A"][:rank], r.state.tensors["wide.lora_A"][:rank])
                and not view["wide.lora_A"][rank:].any()
            )


def test_flexlora_is_the_svd_of_the_dense_mean_for_every_rank():
    s, method = spec(layers=EVEN, ranks=RANKS), FlexLoRA()
    state = method.init(s)
    moved = [train(method, state, c, i, torch.float64, 1.0 + i) for i, c in enumerate(RANKS)]
    after, _ = method.aggregate(state, [u for u, _, _ in moved])
    for layer in EVEN:
        U, S, Vt = torch.linalg.svd(sum((1.0 + i) / 15 * d[layer.name] for i, (_, d, _) in enumerate(moved)))
        for client, rank in RANKS.items():
            torch.testing.assert_close(
                effective(method, after, client)[layer.name], (U[:, :rank] * S[:rank]) @ Vt[:rank], rtol=1e-9, atol=1e-9
            )


def test_hetlora_weighs_by_the_norm_of_each_clients_product():
    s, method = spec(layers=EVEN, ranks=RANKS), HetLoRA()
    state = method.init(s)
    updates = [train(method, state, c, i, torch.float64, 1.0)[0] for i, c in enumerate(RANKS)]
    after, _ = method.aggregate(state, updates)
    norms = torch.tensor([(u.tensors["tall.lora_B"] @ u.tensors["tall.lora_A"]).norm() for u in updates])
    padded = [
        torch.nn.functional.pad(u.tensors["tall.lora_A"], (0, 0, 0, 4 - r))
        for u, r in zip(updates, RANKS.values(), strict=True)
    ]
    torch.testing.assert_close(
        after.tensors["tall.lora_A"], sum(n / norms.sum() * a for n, a in zip(norms, padded, strict=True))
    )


# --- changing cohorts, growth ---------------------------------------------------------------------------------------


COHORTS = [["c0", "c1", "c2"], ["c3", "c1"], ["c4"], ["c0", "c3", "c4", "c6", "c5"], ["c2", "c0"]]


@pytest.mark.parametrize("pair", sorted(EXACT))
def test_changing_cohorts_stay_exact(pair):
    kind, method = method_of(pair)
    for r in play(method, spec(kind), 7, 5, torch.float64, COHORTS):
        assert r.miss < 1e-10 and r.diagnostics.exactness < 1e-10


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
    for r in play(FedExKeep(), spec(), 7, 20, torch.float64, cohorts):
        assert r.miss < 1e-10
        assert r.state.tensors["tall.stack_B"].shape[1] <= 7 * 4
        assert all(d.k <= 7 * 4 + 2 * min(d.shape) for d in FedExKeep().view(r.state.spec, r.state, None).base.values())


@pytest.mark.parametrize("kind", ["lora", "abba"])
def test_the_total_base_update_holds_no_more_numbers_than_its_thin_factors_at_full_rank(kind):
    for r in play(FLoRA(), spec(kind), 7, 20, torch.float64):
        assert r.miss < 1e-10
        for layer in LAYERS:
            held = sum(
                t.numel()
                for i in r.state.increments
                for n, t in i.tensors.items()
                if n.startswith(f"{layer.name}.base_")
            )
            assert held <= 2 * min(layer.m, layer.n) * (layer.m + layer.n) + 12 * 7
    assert any(i.resets for i in r.state.increments)


# --- what every pair must satisfy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ALL)
def test_every_client_starts_from_the_same_factors_and_delta_zero(pair):
    kind, method = method_of(pair)
    one, other = (begin(method, spec(kind)) for _ in range(2))
    for client in (None, "a", "b"):
        mine, theirs = method.view(one.spec, one, client).tensors, method.view(other.spec, other, client).tensors
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
        assert all(f"{layer.name}.{f}" in mine for layer in LAYERS for f in one.spec.names)
    assert all(not weights.any() for weights in effective(method, one).values())


@pytest.mark.parametrize("pair", ALL)
def test_the_sum_does_not_change_with_weights_of_another_scale(pair):
    kind, method = method_of(pair)
    state = begin(method, spec(kind))
    moved = [train(method, state, f"c{i}", i, torch.float32, 2.0 ** (i % 3)) for i in range(5)]
    one, _ = aggregate(method, state, [u for u, _, _ in moved], [x for _, _, x in moved])
    scaled = [Update(u.client, u.weight * 1024, u.tensors) for u, _, _ in moved]
    other, _ = aggregate(method, state, scaled, [x for _, _, x in moved])
    assert all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)


def test_bad_updates_are_refused_by_name():
    method, state = FedIT(), FedIT().init(spec())
    update = train(method, state, "ward-7", 0, torch.float32, 1.0)[0]
    update.tensors["tall.lora_B"][0, 0] = float("nan")
    with pytest.raises(RoundError, match="client 'ward-7' sent a value that is not finite in tall.lora_B"):
        method.aggregate(state, [update])
    with pytest.raises(RoundError, match="at least one update"):
        method.aggregate(state, [])


# --- server optimizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, rounds",
    [
        # x starts at 0, the mean changes it by 1 and then by -0.5; lr 0.1, beta1 0.9, beta2 0.99, tau 1e-3 (by hand)
        ("avgm", [0.1, 0.1 + 0.1 * (0.9 * 1.0 - 0.5)]),
        (
            "adam",
            [
                0.1 * 0.1 / (0.01000099**0.5 + 1e-3),
                0.1 * 0.1 / (0.01000099**0.5 + 1e-3) + 0.1 * 0.04 / (0.0124009801**0.5 + 1e-3),
            ],
        ),
        (
            "yogi",
            [
                0.1 * 0.1 / (0.010001**0.5 + 1e-3),
                0.1 * 0.1 / (0.010001**0.5 + 1e-3) + 0.1 * 0.04 / (0.012501**0.5 + 1e-3),
            ],
        ),
    ],
)
def test_server_optimizers_against_hand_numbers(kind, rounds):
    optimizer, x, memory = ServerOptimizer(kind, lr=0.1), torch.zeros(1, dtype=torch.float64), {}
    for change, expected in zip((1.0, -0.5), rounds, strict=True):
        stepped, memory = optimizer.step({"w": x}, {"w": x + change}, memory)
        x = stepped["w"]
        assert x.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pair", ["lora+fedit", "lora+ffa", "lora+rolora", "lora-sb+fed-sb", "ravan+ravan", "abba+ffa"])
def test_a_server_step_of_rate_1_without_momentum_is_the_mean_itself_and_momentum_is_not(pair):
    kind, method = method_of(pair)
    plain = [r.state for r in play(method, spec(kind), 3, 3, torch.float64)]
    same = [
        r.state
        for r in play(
            dataclasses.replace(method, server=ServerOptimizer("avgm", beta1=0.0)), spec(kind), 3, 3, torch.float64
        )
    ]
    other = dataclasses.replace(method, server=ServerOptimizer("adam", lr=0.1))
    state = begin(other, spec(kind))
    moved = [train(other, state, f"c{i}", i, torch.float64, 1.0 + i * i) for i in range(3)]
    stepped, diagnostics = other.aggregate(state, [u for u, _, _ in moved])
    for one, two in zip(plain, same, strict=True):
        mine, theirs = method.view(one.spec, one, None).tensors, method.view(two.spec, two, None).tensors
        assert all(torch.allclose(mine[n].double(), theirs[n].double(), rtol=1e-12, atol=1e-12) for n in mine)
    mine, theirs = method.view(plain[0].spec, plain[0], None).tensors, method.view(stepped.spec, stepped, None).tensors
    assert any((mine[n] - theirs[n]).abs().max() > 1e-3 for n in mine) and stepped.memory
    assert (mine["head.weight"] - theirs["head.weight"]).abs().max() > 1e-3 and "m/head.weight" in stepped.memory
    assert diagnostics.exactness < 1e-10 or method.name == "fedit"  # of the aggregation, before the step


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_no_method_forms_an_m_x_n_matrix(pair):
    """By the profiler's count of every tensor: the largest that views, uploads and aggregation make of 1200 x 1400
    layers of rank 4."""
    kind, method = method_of(pair)
    s = spec(kind, (Layer("large", 1200, 1400, 4, 1.0),))
    state = begin(method, s)

    def a_round():
        view, g = method.view(s, state, None), torch.Generator().manual_seed(0)
        updates, trained = [], []
        for i in range(3):
            moved = {
                n: t + 0.1 * torch.randn(t.shape, generator=g)
                for n, t in view.tensors.items()
                if n in state.heads or n.rsplit(".", 1)[1] in view.trained
            }
            trained.append(moved)
            updates.append(Update(f"c{i}", 1.0 + i, method.upload(s, f"c{i}", moved, 0)))
        after, _ = aggregate(method, state, updates, trained)
        return method.view(s, after, "c0")

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        a_round()
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 0 < max(sizes) < 1200 * 1400 * 4 / 8
