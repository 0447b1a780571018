"""Median, trimmed mean and multi-Krum in place of the mean: against dense numpy, against attackers who send anything,
in whole runs, and where they are refused."""

import dataclasses
import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from algebra import begin, dense, method_of, spec, train
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LINEAR, rounds, run

from fedray.adapters import Layer
from fedray.config.read import from_dict, help_lines, read_config
from fedray.errors import ConfigError, RoundError
from fedray.federation.pool_inline import InlinePool
from fedray.federation.prepare import prepare
from fedray.federation.wire import Packet
from fedray.methods import METHODS, RobustOptions, ServerOptimizer, Update, robust
from fedray.methods.fedit import FedIT
from fedray.methods.robust import RULES, Median, MultiKrum, RobustRule, TrimmedMean, trimmed_mean
from fedray.plan import plan

SMALL = (Layer("square", 6, 6, 3, 0.5), Layer("wide", 5, 9, 2, 2.0))
WHOLE = sorted(pair for pair in LINEAR if not method_of(pair)[1].kept)  # those whose updates say what they mean
RULES_OF_3 = [Median(), TrimmedMean(2), MultiKrum(2)]


def with_rule(pair, rule):
    kind, method = method_of(pair)
    return kind, dataclasses.replace(method, robust=rule)


def cohort_of(method, s, k, round=0, dtype=torch.float32, scatter=1.0, state=None):
    """A state, and k updates that are trained from it, `scatter` of the usual distance from their mean."""
    state = begin(method, s) if state is None else state
    updates = [train(method, state, f"c{i}", 100 * round + i, dtype, 1.0)[0] for i in range(k)]
    mean = {n: sum(u.tensors[n] for u in updates) / k for n in updates[0].tensors}
    near = [{n: (mean[n] + scatter * (t - mean[n])).to(dtype) for n, t in u.tensors.items()} for u in updates]
    return state, [Update(u.client, 1.0, t) for u, t in zip(updates, near, strict=True)]


def broadcast_of(method, state, names):
    view = method.view(state.spec, method.broadcast(state), None).tensors
    return {name: view[name] for name in names}


def meant(method, state, update):
    """What an update means and its heads, as one vector; and the upload, as one."""
    view = method.view(state.spec, method.broadcast(state), None)
    deltas = dense(state.spec, dataclasses.replace(view, base={}), view.tensors | dict(update.tensors))
    heads = [update.tensors[name].double().flatten() for name in state.heads]
    sent = [t.double().flatten() for t in update.tensors.values()]
    return (
        torch.cat([*(d.flatten() for d in deltas.values()), *heads]).numpy(),
        torch.cat(sent).numpy(),
    )


def distances(vectors):
    return np.array([[np.linalg.norm(a - b) for b in vectors] for a in vectors])


# --- against numpy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", sorted(LINEAR))
@pytest.mark.parametrize("k", [3, 5, 6])
def test_median_and_trimmed_mean_are_those_of_each_number_that_is_sent(pair, k, monkeypatch):
    monkeypatch.setattr(robust, "_CHUNK", 37)
    cut = (k - 1) // 2
    for rule, dense_rule in (
        (Median(), lambda x: np.median(x, axis=0)),
        (TrimmedMean(1), lambda x: np.sort(x, axis=0)[1:-1].mean(axis=0)),
        (TrimmedMean(cut), lambda x: np.median(x, axis=0)),
    ):
        kind, method = with_rule(pair, rule)
        state = None
        for t in range(2):  # rolora: each factor in its turn
            state, updates = cohort_of(method, spec(kind), k, t, torch.float64, state=state)
            state, _ = method.aggregate(state, updates)
            got = broadcast_of(method, state, updates[0].tensors)
            for name, tensor in got.items():
                want = dense_rule(np.stack([u.tensors[name].numpy() for u in updates]))
                np.testing.assert_allclose(tensor.numpy(), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k, f", [(5, 1), (8, 2), (9, 3)])
@pytest.mark.parametrize("pair", WHOLE)
def test_krum_is_the_mean_of_those_that_dense_distances_choose(pair, k, f):
    kind, method = with_rule(pair, MultiKrum(f))
    state, out = None, set()
    for t in range(2):
        state, updates = cohort_of(method, spec(kind), k, t, torch.float64, state=state)
        vectors = [meant(method, state, u) for u in updates]
        chosen = set(range(k))
        for part in zip(*vectors, strict=True):
            squared = np.sort(distances(part) ** 2, axis=1)[:, 1 : k - f - 1]  # without itself, the k - f - 2 nearest
            chosen &= set(np.argsort(squared.sum(axis=1), kind="stable")[: k - f].tolist())
        assert k - 2 * f <= len(chosen) <= k - f
        out |= set(range(k)) - chosen
        state, _ = method.aggregate(state, updates)
        for name, tensor in broadcast_of(method, state, updates[0].tensors).items():
            want = np.mean([updates[i].tensors[name].numpy() for i in chosen], axis=0)
            np.testing.assert_allclose(tensor.numpy(), want, rtol=1e-10, atol=1e-13)
    assert len(out) >= f


@pytest.mark.parametrize("rule", RULES_OF_3, ids=lambda rule: rule.name)
@pytest.mark.parametrize("pair", WHOLE)
def test_of_clients_that_agree_it_is_what_the_mean_is(pair, rule):
    kind, method = with_rule(pair, rule)
    state, updates = cohort_of(method, spec(kind), 7)
    alike = [Update(u.client, 1.0, updates[0].tensors) for u in updates]
    ours, diagnostics = method.aggregate(state, alike)
    plain, of_plain = dataclasses.replace(method, robust=None).aggregate(state, alike)
    for name in updates[0].tensors:
        one, other = (broadcast_of(method, s, [name])[name] for s in (ours, plain))
        torch.testing.assert_close(one, other, rtol=1e-7, atol=0)
    assert diagnostics.exactness < 1e-6 and diagnostics.ideal_norm == of_plain.ideal_norm


@pytest.mark.parametrize("rule", RULES_OF_3, ids=lambda rule: rule.name)
@pytest.mark.parametrize("pair", ["lora+fedit", "lora+ffa", "abba+fedit"])
def test_what_is_reported_is_against_the_mean_of_all_who_reported(pair, rule):
    kind, method = with_rule(pair, rule)
    state, updates = cohort_of(method, spec(kind), 7, dtype=torch.float64)
    after, diagnostics = method.aggregate(state, updates)
    _, plain = dataclasses.replace(method, robust=None).aggregate(state, updates)
    assert diagnostics.aggregation_error == plain.aggregation_error
    view = method.view(state.spec, method.broadcast(state), None)
    each = [dense(state.spec, view, view.tensors | dict(u.tensors)) for u in updates]
    landed = dense(state.spec, view, method.view(after.spec, after, None).tensors)
    ideal = {name: sum(e[name] for e in each) / 7 for name in landed}
    gap = math.sqrt(sum((landed[n] - ideal[n]).norm().item() ** 2 for n in landed))
    norm = math.sqrt(sum(t.norm().item() ** 2 for t in ideal.values()))
    assert diagnostics.ideal_norm == pytest.approx(norm, rel=1e-9)
    assert diagnostics.exactness == pytest.approx(gap / norm, rel=1e-8)
    assert diagnostics.exactness > 0.01


def test_a_server_optimizer_steps_along_what_the_rule_takes():
    _, method = with_rule("lora+fedit", Median())
    step = ServerOptimizer("avgm", beta1=0.0)
    state, updates = cohort_of(method, spec(), 5, dtype=torch.float64)
    whole, _ = method.aggregate(state, updates)
    for lr, share in ((1.0, 1.0), (0.5, 0.5)):
        stepping = dataclasses.replace(method, server=dataclasses.replace(step, lr=lr))
        stepped, _ = stepping.aggregate(state, updates)
        for name, t in whole.tensors.items():
            want = state.tensors[name] + share * (t - state.tensors[name])
            torch.testing.assert_close(stepped.tensors[name].double(), want.double(), rtol=1e-12, atol=1e-14)


def test_weights_count_for_nothing():
    for rule in RULES_OF_3:
        _, method = with_rule("lora+fedit", rule)
        state, updates = cohort_of(method, spec(), 7)
        heavy = [dataclasses.replace(u, weight=1e15 if i == 0 else 1.0) for i, u in enumerate(updates)]
        one, other = method.aggregate(state, updates)[0], method.aggregate(state, heavy)[0]
        assert all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())


# --- against whoever sends anything -----------------------------------------------------------------------------------


@st.composite
def attacks(draw, f):
    """f functions: what an attacker sends instead of an honest update, the others' at hand."""
    scale = st.sampled_from([1e-6, 0.1, 1.0, 3.0, 10.0, 1e3, 1e6, 1e9])
    kinds = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["noise", "reversed", "spike", "copy", "another factorisation"]),
                scale,
                st.integers(0, 2**20),
            ),
            min_size=f,
            max_size=f,
        )
    )

    def attack(kind, size, seed, honest):
        g = torch.Generator().manual_seed(seed)
        tensors = honest[seed % len(honest)].tensors
        if kind == "noise":
            return {n: size * torch.randn(t.shape, generator=g) for n, t in tensors.items()}
        if kind == "reversed":
            return {n: -size * t for n, t in tensors.items()}
        if kind == "spike":
            changed = {n: t.clone() for n, t in tensors.items()}
            name = sorted(changed)[seed % len(changed)]
            changed[name].view(-1)[seed % changed[name].numel()] = size
            return changed
        if kind == "copy":
            return dict(tensors)
        sides = {"lora_A": 1 / size, "lora_B": size}
        return {n: t * sides.get(n.rsplit(".", 1)[1], 1.0) for n, t in tensors.items()}

    return [lambda honest, one=one: attack(*one, honest) for one in kinds]


def attacked(updates, f, sent):
    """The last f are attackers."""
    honest, others = updates[:-f], updates[-f:]
    return honest, [Update(u.client, 1.0, a(honest)) for u, a in zip(others, sent, strict=True)]


CHECKED = settings(max_examples=60, deadline=None, database=None, derandomize=True)


@pytest.mark.parametrize("pair", ["lora+fedit", "lora+rolora", "lora+fedsa", "lora-sb+fed-sb"])
def test_whatever_f_clients_send_each_number_stays_within_those_of_the_honest(pair):
    @CHECKED
    @given(st.data(), st.integers(1, 3), st.integers(0, 3), st.booleans(), st.randoms(use_true_random=False))
    def holds(data, f, more, median, draw):
        kind, method = with_rule(pair, Median() if median else TrimmedMean(f))
        k = 2 * f + 1 + more
        state, updates = cohort_of(method, spec(kind, SMALL), k)
        honest, liars = attacked(updates, f, data.draw(attacks(f)))
        mixed = [*honest, *liars]
        draw.shuffle(mixed)
        after, _ = method.aggregate(state, mixed)
        for name, got in broadcast_of(method, after, updates[0].tensors).items():
            values = torch.stack([u.tensors[name] for u in honest])
            assert (got >= values.amin(0)).all() and (got <= values.amax(0)).all()

    holds()


def test_the_mean_does_not_and_nor_does_a_rule_with_more_attackers_than_it_is_told():
    _, plain = method_of("lora+fedit")
    state, updates = cohort_of(plain, spec(layers=SMALL), 5)
    for attackers, rule in ((1, None), (2, TrimmedMean(1)), (3, Median())):
        liars = [Update(u.client, 1.0, {n: 1e6 + 0 * t for n, t in u.tensors.items()}) for u in updates[:attackers]]
        method = dataclasses.replace(plain, robust=rule)
        after, _ = method.aggregate(state, [*liars, *updates[attackers:]])
        assert min(t.abs().max().item() for t in after.tensors.values()) > 1e5


@pytest.mark.parametrize("pair", ["lora+fedit", "lora+ffa", "ravan+ravan"])
def test_krum_takes_nobody_who_is_far_from_all_the_honest(pair):
    met = {"taken": 0, "left out": 0}

    @CHECKED
    @given(st.data(), st.integers(1, 3), st.integers(0, 2), st.sampled_from([0.01, 0.3, 1.0]))
    def holds(data, f, more, scatter):
        rule = MultiKrum(f)
        kind, method = with_rule(pair, rule)
        k = 2 * f + 3 + more
        state, updates = cohort_of(method, spec(kind), k, scatter=scatter)
        honest, liars = attacked(updates, f, data.draw(attacks(f)))
        cohort = method.gather(state, [*honest, *liars])
        chosen = rule.chosen(state.spec, cohort, list(updates[0].tensors))
        assert k - 2 * f <= len(chosen) <= k - f
        vectors = [meant(method, state, u) for u in (*honest, *liars)]
        for part in zip(*vectors, strict=True):
            far = distances(part)
            diameter = far[: k - f, : k - f].max()
            for i in range(k - f, k):
                if i in chosen:
                    bound = diameter * math.sqrt((k - f - 2) / (k - 2 * f - 1))
                    assert far[i, : k - f].min() <= bound * (1 + 1e-6)
        met["taken"] += len(set(chosen) - set(range(k - f)))
        met["left out"] += len(set(range(k - f, k)) - set(chosen))

    holds()
    assert min(met.values()) > 10, met


def test_krum_is_not_taken_in_by_another_factorisation_of_an_honest_delta():
    """Equal deltas, and the mean of the factors would be ruined."""
    rule = MultiKrum(1)
    _, method = with_rule("lora+fedit", rule)
    state, updates = cohort_of(method, spec(), 5, scatter=0.1)
    size = {"lora_A": 2.0**-20, "lora_B": 2.0**20}
    turned = {n: t * size.get(n.rsplit(".", 1)[1], 1.0) for n, t in updates[2].tensors.items()}
    cohort = [*updates[:4], Update("liar", 1.0, turned)]
    vectors = [meant(method, state, u)[0] for u in (cohort[2], cohort[4])]
    np.testing.assert_allclose(*vectors, rtol=1e-5, atol=1e-12)
    assert 4 not in rule.chosen(state.spec, method.gather(state, cohort), list(turned))
    after, _ = method.aggregate(state, cohort)
    honest = max(t.abs().max().item() for u in updates for t in u.tensors.values())
    assert max(t.abs().max().item() for t in after.tensors.values()) <= honest


@pytest.mark.parametrize("rule", RULES_OF_3, ids=lambda rule: rule.name)
def test_the_order_of_the_clients_changes_nothing(rule):
    _, method = with_rule("lora+fedit", rule)
    state, updates = cohort_of(method, spec(layers=SMALL), 7)
    first, _ = method.aggregate(state, updates)

    @CHECKED
    @given(st.permutations(updates))
    def holds(others):
        again, _ = method.aggregate(state, others)
        for name, tensor in first.tensors.items():
            # The mean of those that krum takes is added in their order.
            bound = 1e-7 if rule.compares_deltas else 0.0
            torch.testing.assert_close(again.tensors[name], tensor, rtol=bound, atol=bound)

    holds()


def test_numbers_beyond_a_products_range_are_far_away_and_no_error():
    rule = MultiKrum(1)
    _, method = with_rule("abba+fedit", rule)
    state, updates = cohort_of(method, spec("abba"), 5)
    updates[0] = Update("c0", 1.0, {n: 3e38 + 0 * t for n, t in updates[0].tensors.items()})
    assert 0 not in rule.chosen(state.spec, method.gather(state, updates), list(updates[0].tensors))


def test_a_trimmed_mean_is_never_outside_of_what_it_is_the_mean_of():
    for x in (0.1, 1 / 3, 1.7e308, -1.7e308, 5e-324):
        assert trimmed_mean([torch.full((3,), x, dtype=torch.float64)] * 7, 2).tolist() == [x] * 3


def test_krum_forms_no_m_x_n_matrix():
    _, method = with_rule("lora+fedit", MultiKrum(1))
    state, updates = cohort_of(method, spec(layers=(Layer("large", 1200, 1400, 4, 1.0),)), 5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        method.aggregate(state, updates)
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 0 < max(sizes) < 1200 * 1400 * 4 / 8


# --- whole runs -----------------------------------------------------------------------------------------------------

RUN = {"federation__clients": 5, "federation__rounds": 4, "federation__local_steps": 4, "method__weights": "equal"}


def lies(monkeypatch, liar="client-1"):
    """From now on one client sends its update backwards, and large."""
    real = InlinePool.train

    def train(self, handle, round, clients, kept, deadline, orders):
        outcomes = real(self, handle, round, clients, kept, deadline, orders)
        return [
            dataclasses.replace(o, update=Packet(o.update.manifest, -20 * o.update.vector)) if o.client == liar else o
            for o in outcomes
        ]

    monkeypatch.setattr(InlinePool, "train", train)


def final_loss(folder):
    return rounds(folder)[-1]["metrics"]["loss"]


@pytest.mark.parametrize("name", ["fedit", "ffa"])
def test_a_run_with_an_attacker_ends_near_the_honest_one_where_the_mean_does_not(make_config, monkeypatch, name):
    first, honest = (
        final_loss(run(make_config(**RUN | {"method__name": name, "federation__rounds": r}))) for r in (1, 4)
    )
    learned = first - honest  # in the rounds after the first
    assert learned > 0.05
    lies(monkeypatch)
    mean = final_loss(run(make_config(method__name=name, **RUN)))
    assert mean > honest + 0.3 * learned
    for rule in ("median", "trimmed", "krum"):
        told = {} if rule == "median" else {"method__robust_attackers": 1}
        folder = run(make_config(method__name=name, method__robust_rule=rule, **told, **RUN))
        assert abs(final_loss(folder) - honest) < 0.05 * learned, rule
        records = rounds(folder)
        # What is reported is against the mean of all, which the attacker has moved.
        assert all(record["exactness"] > 0.5 and not record["dropped"] for record in records)


def test_a_rule_counts_clients_alike_without_being_told(make_config):
    """By examples the ideal would be another one."""
    rule = {"method__name": "ffa", "method__robust_rule": "median", "federation__rounds": 1}
    (one,) = rounds(run(make_config(**rule)))
    (other,) = rounds(run(make_config(**rule, method__weights="equal")))
    assert (one["ideal_norm"], one["exactness"]) == (other["ideal_norm"], other["exactness"])
    assert not make_config(**rule).by_examples and make_config(method__name="ffa").by_examples


def test_example_level_privacy_goes_with_a_rule(make_config):
    private = {"noise": 1.0}
    folder = run(make_config(method__name="ffa", method__robust_rule="median", privacy=private))
    assert len(rounds(folder)) == 3


# --- what is refused, and what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--method.robust_rule median",
            "stands in for a mean, and fedex broadcasts more than one: use it with fedit, ffa",
        ),
        ("--method.name ffa --method.robust_attackers 1", "robust_attackers needs method.robust_rule: trimmed or krum"),
        (
            "--method.name ffa --method.robust_rule krum",
            "method.robust_rule krum needs method.robust_attackers, of how",
        ),
        ("--method.name ffa --method.robust_rule trimmed", "method.robust_rule trimmed needs method.robust_attackers"),
        (
            "--method.name ffa --method.robust_rule median --method.robust_attackers 1",
            "method.robust_attackers belongs to robust_rule trimmed and krum, not to median, which bears all that are",
        ),
        ("--method.name ffa --method.robust_rule krum --method.robust_attackers 0", "greater than or equal to 1"),
        ("--method.name ffa --method.robust_rule mode", "input should be 'median', 'trimmed' or 'krum'"),
        (
            "--method.name fedsa --method.robust_rule krum --method.robust_attackers 1",
            "krum compares what updates mean, and fedsa's clients keep factors that it needs for that: use median or",
        ),
        (
            "--method.name ffa --method.robust_rule median --method.weights examples",
            "let a client count for as many as it says it has, and with method.robust_rule median all count alike",
        ),
        (
            "--method.name ffa --method.robust_rule median --privacy.secure_aggregation true",
            "holds single updates against each other, and privacy.secure_aggregation lets nobody see one: leave one",
        ),
        (
            "--method.name ffa --method.robust_rule median --privacy.noise 1 --privacy.unit client",
            "median is no mean, and privacy.unit client's noise is measured by what one client can change in a mean: ",
        ),
        (
            "--adapter.kind lora-sb --adapter.subspace gradient --method.name fed-sb --method.robust_rule median",
            "does not reach the bases that adapter.subspace gradient takes from the sum of clients' gradients: use",
        ),
        (
            "--method.name fedit --method.robust_rule median --adapter.rank 8,4",
            "adapter.rank differs between clients, and fedit needs one rank for all",
        ),
    ],
)
def test_what_a_rule_cannot_hold_for_is_refused_in_a_sentence(flags, words):
    with pytest.raises(ConfigError) as error:
        read_config(flags.split())
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_one_clients_own_nodes_compute_for_all_is_refused(tmp_path):
    silos = {f"c{i}": {"node_labels": {"silo": f"{i}"}, "source": f"/data/{i}.csv"} for i in range(3)}
    values = {
        "adapter": {"kind": "abba"},
        "method": {"name": "fedit", "robust_rule": "median"},
        "clients": silos,
        "data": {"source": "/data/public.csv"},
    }
    with pytest.raises(ConfigError, match="does not reach what adapter abba takes from one client's own nodes before"):
        from_dict(values)
    from_dict(values | {"adapter": {"kind": "lora"}})


@pytest.mark.parametrize(
    ("rule", "clients", "quorum", "words"),
    [
        (
            {"robust_rule": "median"},
            2,
            1.0,
            "method.robust_rule median needs 3 updates a round, and 2 clients take part",
        ),
        (
            {"robust_rule": "trimmed", "robust_attackers": 2},
            4,
            1.0,
            "trimmed with method.robust_attackers 2 needs 5 updates a round, and 4 clients take part: lower method.rob",
        ),
        (
            {"robust_rule": "krum", "robust_attackers": 1},
            4,
            1.0,
            "krum with method.robust_attackers 1 needs 5 updates a round, and 4 clients take part: have more clients",
        ),
        (
            {"robust_rule": "krum", "robust_attackers": 1},
            6,
            0.6,
            "needs 5 updates a round, and federation.quorum lets one go on with 4 of 6: raise it",
        ),
    ],
)
def test_too_few_clients_are_refused_before_anything_is_touched(make_config, rule, clients, quorum, words):
    config = make_config(
        method={"name": "ffa", **rule}, federation={"clients": clients, "quorum": quorum, "batch_size": 4}
    )
    with pytest.raises(ConfigError, match=words):
        prepare(config)
    with pytest.raises(ConfigError, match="needs 3 updates a round, and 2 clients take part"):
        prepare(make_config(method={"name": "ffa", "robust_rule": "median"}, federation={"clients": 4, "cohort": 2}))


@pytest.mark.parametrize(
    ("rule", "least"), [(Median(), 3), (TrimmedMean(1), 3), (TrimmedMean(2), 5), (MultiKrum(1), 5), (MultiKrum(2), 7)]
)
def test_a_round_with_fewer_updates_than_a_rule_needs_ends_in_a_sentence(rule, least):
    """So does one whose updates come as one sum, whatever let it through."""
    _, method = with_rule("lora+fedit", rule)
    state, updates = cohort_of(method, spec(), least)
    method.aggregate(state, updates)
    for few in (updates[:-1], updates[:1]):
        with pytest.raises(
            RoundError, match=f"robust_rule {rule.name} .*needs {least} updates a round, and {len(few)} c"
        ):
            method.aggregate(state, few)


def test_the_help_says_what_they_are():
    docs = {line.key: line.doc for line in help_lines() if line.key.startswith("method.robust_")}
    assert list(docs) == ["method.robust_rule", "method.robust_attackers"]
    assert (
        "every client counts alike" in docs["method.robust_rule"]
        and "default: take the mean" in docs["method.robust_rule"]
    )
    assert docs["method.robust_attackers"].startswith("robust_rule trimmed and krum: ")


def test_the_plan_does_not_say_exact():
    flags = "--model.path llama-3.2-1b --method.name ffa".split()
    assert [plan(read_config([*flags, *more])).costs[0].exact for more in ([], ["--method.robust_rule", "median"])] == [
        "yes",
        "no",
    ]


def test_every_rule_states_itself_and_has_its_name_in_the_config():
    assert set(RULES) == set(get_args(get_type_hints(RobustOptions)["rule"]))
    assert not any(rule.linear or rule.exact != "no" for rule in RULES.values())
    with pytest.raises(TypeError, match="Silent must state linear in its own body"):
        type("Silent", (Median,), {"exact": "no"})
    assert issubclass(Median, RobustRule) and FedIT().robust is None


def test_no_method_that_is_a_mean_has_clients_of_several_ranks():
    """The zeros beyond a client's rank would be votes: whoever adds one must say what a rule makes of them."""
    assert not [name for name, method in METHODS.items() if method.linear and method.mixed_ranks]
