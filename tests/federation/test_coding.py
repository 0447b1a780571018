"""Uploads in fewer bytes: codes, what rounding takes, what is done about it, and what is no code."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import final_tensors, rounds, run, same_bits

from fedray.config.build import make_method
from fedray.errors import ClientError, ConfigError
from fedray.federation import checkpoint
from fedray.federation import run as inline
from fedray.federation.coding import BLOCK, CODES, Coded, bytes_of
from fedray.federation.results import classes_of, global_view, load_state, read_run_config
from fedray.federation.wire import Packet, pack, unpack
from fedray.federation.worker import Worker
from fedray.methods import METHODS
from fedray.plan import plan
from fedray.training.local import LocalTrainer

vectors = st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=0, max_size=3 * BLOCK).map(
    lambda values: np.array(values, np.float32)
)


@settings(max_examples=200, deadline=None)
@given(vectors)
def test_a_code_is_as_near_as_it_says(vector):
    codes, steps = CODES["bf16"].code(vector)
    back = CODES["bf16"].number(codes, steps)
    assert back.dtype == np.float32 and (np.abs(back - vector) <= 2.0**-8 * np.abs(vector)).all()
    codes, steps = CODES["int8"].code(vector)
    back = CODES["int8"].number(codes, steps)
    assert len(back) == len(vector) and len(steps) == math.ceil(len(vector) / BLOCK)
    for i in range(0, len(vector), BLOCK):
        block, found = vector[i : i + BLOCK], back[i : i + BLOCK]
        assert (np.abs(found - block) <= np.abs(block).max() / 254 * (1 + 1e-5) + 1e-37).all()


@pytest.mark.parametrize("wire", CODES)
def test_what_was_coded_once_is_not_changed_again(wire):
    vector = torch.randn(1000, generator=torch.Generator().manual_seed(0)).numpy()
    once = CODES[wire].number(*CODES[wire].code(vector))
    assert np.array_equal(once, CODES[wire].number(*CODES[wire].code(once)))


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("numbers", [0, 1, 255, 256, 257, 5000])
def test_bytes_are_those_that_travel(wire, numbers):
    vector = np.ones(numbers, np.float32)
    coded = Packet((), vector) if wire == "fp32" else Coded((), *CODES[wire].code(vector))
    assert coded.nbytes == bytes_of(wire, numbers)


# --- whole runs -----------------------------------------------------------------------------------------------------

#: One of each kind: means of the same factors, of alternating ones, of some; and what is no mean.
OF_A_KIND = ["fedit", "ffa", "rolora", "fedsa", "fedex", "flora", "fra", "hetlora", "fed-sb", "ravan"]


#: Adam would magnify the last digit of gradients near zero.
SGD = {"federation__optimizer": "sgd", "federation__lr": 0.3}
FED_IT = {"method__name": "fedit"}


def whole_model(folder, rounds=None):
    """What is added to the base's weights when a run ends (or began), as one vector."""
    config = read_run_config(folder)
    state = load_state(folder, config, classes_of(config))
    if rounds == 0:
        trainer = LocalTrainer(config, "cpu", 1)
        heads, started = trainer.describe()[1], trainer.start_from_weights(state.spec.adapter)
        state = make_method(config).init(state.spec, heads, started)
    view = global_view(config, state)
    added = []
    for layer in state.spec.layers:
        delta = layer.scale * state.spec.adapter.delta(layer, factors_of(view, layer)).dense()
        added.append(delta + view.base[layer.name].dense() if layer.name in view.base else delta)
    return torch.cat([delta.flatten() for delta in added])


def factors_of(view, layer):
    return {n.removeprefix(f"{layer.name}."): t for n, t in view.tensors.items() if n.startswith(f"{layer.name}.")}


def options(method):
    kind = METHODS[method].adapters[0]
    return {"method__name": method, "adapter": {"kind": kind, "rank": 2}, "federation__rounds": 3} | SGD


@pytest.mark.parametrize("method", OF_A_KIND)
@pytest.mark.parametrize("wire", CODES)
def test_a_run_is_about_the_same_in_half_and_in_a_quarter_of_the_bytes(make_config, method, wire):
    whole = run(make_config(**options(method)))
    coded = run(make_config(federation__wire=wire, **options(method)))
    one, other, start = whole_model(whole), whole_model(coded), whole_model(whole, rounds=0)
    if method != "fedsa":  # whose clients keep the other factor: there is no one model
        assert (one - other).norm() < (0.01 if wire == "bf16" else 0.03) * (one - start).norm()
    for before, after in zip(rounds(whole), rounds(coded), strict=True):
        ratio = after["bytes_up"] / before["bytes_up"]
        assert ratio == 0.5 if wire == "bf16" else 0.25 < ratio < 0.28
        assert before["bytes_down"] == after["bytes_down"] and "wire_error" not in before
        assert 0 < after["wire_error"] < (2.0**-8 if wire == "bf16" else 0.02)
        assert before["metrics"] == pytest.approx(after["metrics"], abs=1e-3)
        if METHODS[method].exact == "yes":
            assert after["exactness"] < 1e-6  # of what arrived


@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_the_rest_is_kept_and_comes_with_the_next_update(make_config, engine, request):
    """By hand: what the coordinator adds over the rounds is what was meant, but for the last rest."""
    if engine == "ray":
        request.getfixturevalue("ray_session")
    seen = []

    class Watched(Worker):
        def train(self, client, round, header, packet, fetch, kept, orders):
            done = super().train(client, round, header, packet, fetch, kept, orders)
            seen.append((client, round, kept and unpack(kept), unpack(done[1]), done[2]))
            return done

    more = {"federation__wire": "int8", "federation__rounds": 4, "worker": {"cpus": 1, "count": 1}}
    config = make_config(engine=engine, **FED_IT | more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inline, "Worker", Watched)
        folder = run(config)
    for client, round, before, after, report in seen:
        assert (before is None) == (round == 0)
        lost = sum(t.double().square().sum().item() for n, t in after.items() if n.startswith("rest/"))
        assert lost == pytest.approx(report.lost, rel=1e-6) and report.meant > report.lost > 0
        last = [a for c, r, _, a, _ in seen if (c, r) == (client, round - 1)]
        assert not last or all(torch.equal(before[n], last[0][n]) for n in before)
    assert bool(seen) == (engine == "inline")
    kept = final_tensors(folder)
    assert any("/rest/" in name for name in kept)


def test_feedback_brings_the_mean_nearer_than_rounding_alone(make_config):
    """Over many rounds of a small step, rests add up to what rounding alone would lose for ever."""

    def distance(feeds_back):
        options = {"federation__wire": "int8", "federation__wire_feedback": feeds_back}
        found = final_tensors(run(make_config(**options, **common)))
        assert feeds_back == any("/rest/" in name for name in found)
        return found

    common = FED_IT | SGD | {"federation__rounds": 12, "federation__lr": 0.03, "seed": 2}
    whole = final_tensors(run(make_config(**common)))
    away = {}
    for feeds_back in (True, False):
        found = distance(feeds_back)
        names = [n for n in whole if n.startswith("tensors/")]
        away[feeds_back] = sum((found[n] - whole[n]).double().square().sum().item() for n in names) ** 0.5
    assert 0 < away[True] < 0.75 * away[False]


def test_a_killed_run_goes_on_with_its_rests(make_config, monkeypatch):
    options = FED_IT | {"federation__wire": "bf16", "federation__rounds": 4}
    whole = run(make_config(**options))
    config = make_config(**options)
    real, saves = checkpoint.save, []

    def dies(*args):
        real(*args)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(checkpoint, "save", real)
    folder = run(config.model_copy(update={"output": config.output.model_copy(update={"resume": True})}))
    same_bits(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_engines_and_clients_together_give_the_same(make_config, ray_session, wire):
    options = FED_IT | {"federation__wire": wire}
    alone = run(make_config(**options))
    same_bits(alone, run(make_config(engine="ray", **options)))
    together = run(make_config(worker={"cpus": 1, "batch_clients": 3}, **options))
    one, other = final_tensors(alone), final_tensors(together)
    for name in (n for n in one if n.startswith("tensors/")):  # a last digit more may be a step more of int8's
        assert (one[name] - other[name]).abs().max() < 2e-3, name


# --- what is no code ------------------------------------------------------------------------------------------------


def broken(update, how):
    coded = {
        "no packet": lambda: "an update",
        "a whole packet": lambda: Packet(update.manifest, np.ones(len(update.codes), np.float32)),
        "too short": lambda: Coded(update.manifest, update.codes[:-1], update.steps),
        "of another type": lambda: Coded(update.manifest, update.codes.astype(np.int64), update.steps),
        "other steps": lambda: Coded(update.manifest, update.codes, update.steps[:-1]),
        "steps that are none": lambda: Coded(update.manifest, update.codes, update.steps * np.float32("nan")),
        "steps too long": lambda: Coded(update.manifest, update.codes, update.steps * np.float32(1e30)),
        "another manifest": lambda: Coded(update.manifest[:-1], update.codes, update.steps),
        "a list": lambda: Coded(update.manifest, list(update.codes), update.steps),
    }
    return coded[how]()


@pytest.mark.parametrize(
    "how",
    [
        *("no packet", "a whole packet", "too short", "of another type", "other steps", "steps that are none"),
        *("steps too long", "another manifest", "a list"),
    ],
)
def test_who_sends_no_code_is_left_out_with_the_reason(make_config, monkeypatch, how):
    class Odd(Worker):
        def train(self, client, round, *args):
            update, kept, report = super().train(client, round, *args)
            return (broken(update, how), kept, report) if client == "client-1" else (update, kept, report)

    monkeypatch.setattr(inline, "Worker", Odd)
    folder = run(make_config(federation__wire="int8", federation__quorum=0.5))
    for record in rounds(folder):
        (dropped,) = record["dropped"]
        assert dropped["client"] == "client-1" and dropped["reason"]


def test_a_rest_that_is_none_is_not_kept(make_config, monkeypatch):
    class Odd(Worker):
        def train(self, client, round, *args):
            update, kept, report = super().train(client, round, *args)
            other = unpack(kept) | {"rest/other": torch.ones(1)}
            return update, pack(other), report

    monkeypatch.setattr(inline, "Worker", Odd)
    with pytest.raises(ClientError, match="it sent another rest than that of its update"):
        run(make_config(**FED_IT, federation__wire="bf16", federation__clients=1))


@pytest.mark.parametrize(
    "more, words",
    [
        ({"privacy": {"noise": 1.0}}, "privacy counts what clients send"),
        (FED_IT | {"privacy": {"secure_aggregation": True}}, "adds whole numbers of its own"),
        ({"method__name": "fedask"}, "second message"),
    ],
)
def test_who_needs_exact_numbers_refuses_codes(make_config, more, words):
    with pytest.raises(ConfigError, match=words):
        make_config(federation__wire="int8", **more)


def test_the_plan_counts_what_travels(make_config):
    for wire in ("fp32", *CODES):
        config = make_config(federation__wire=wire)
        cost = plan(config).costs[0]
        moved = [record["bytes_up"] for record in rounds(run(config))]
        assert cost.up == moved[-1] // 3 and cost.run_up == sum(moved) // 3
