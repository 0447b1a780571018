"""Simulated traffic: against the closed forms, against what travels in rounds of real tensors, and against itself
unabridged."""

import dataclasses

import pytest
import torch
from algebra import LAYERS, aggregate, begin, method_of, spec, train
from closed_forms import closed_form
from support import ALL

from fedray.adapters import Layer
from fedray.methods.fedex import FedEx
from fedray.methods.flora import FLoRA
from fedray.methods.fra import FRAFFA, FlexLoRA
from fedray.methods.hetlora import HetLoRA
from fedray.methods.traffic import ShapeSpec, distinct, simulate

NAMES = ("c0", "c1", "c2", "c3", "c4")
#: Several of a shape, a rank of its own for one of them, and one that base updates outgrow soon.
MODEL = (
    *(Layer(f"{i}.square", 40, 40, 3, 0.5) for i in range(3)),
    *(Layer(f"{i}.wide", 37, 53, 2, 2.0) for i in range(2)),
    Layer("other.square", 40, 40, 4, 1.0),
    Layer("narrow", 20, 90, 3, 1.0),
)


def rows(moves):
    return [(m.up, m.down, m.once) for m in moves]


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("pair", ALL)
def test_simulated_traffic_is_the_closed_form(pair, k):
    kind, method = method_of(pair)
    layers = MODEL[:-1] if kind == "ravan" else MODEL  # its bases have four times the rank
    if kind == "abba":
        layers = tuple(dataclasses.replace(layer, rank=layer.rank + 1) for layer in layers)
    s, names = spec(kind, layers), NAMES[:k]
    found = rows(simulate(method, s, names, names[-1], 60))
    assert found == [closed_form(method, s, names, names[-1], t) for t in range(60)]


@pytest.mark.parametrize("method", [FLoRA(), FLoRA(residual_rank=2), FlexLoRA(), HetLoRA()])
def test_clients_of_different_ranks_move_the_closed_form_of_their_own(method):
    ranks = {"c0": 1, "c1": 3, "c2": 2, "c3": 3}
    s = spec(layers=tuple(dataclasses.replace(layer, rank=4) for layer in LAYERS), ranks=ranks)
    for client in NAMES:
        found = rows(simulate(method, s, NAMES, client, 40))
        wanted = [closed_form(method, s, NAMES, client, t) for t in range(40)]
        if isinstance(method, FlexLoRA | HetLoRA):  # a cut broadcast
            size = s.size(client=client)
            wanted = [(size, size, 0)] * 40
        assert found == wanted


@pytest.mark.parametrize("pair", ALL)
def test_rounds_left_out_change_nothing(pair, monkeypatch):
    """With every round run, and with every layer run."""
    kind, method = method_of(pair)
    s = spec(kind, (*LAYERS, dataclasses.replace(LAYERS[0], name="again")))
    short = simulate(method, s, NAMES[:3], "c1", 45)
    monkeypatch.setattr("fedray.methods.traffic._mark", lambda state: state.round)
    one_by_one = {layer.name: 1 for layer in s.layers}
    whole = ShapeSpec(s.adapter, s.layers, s.seed, s.ranks)
    monkeypatch.setattr("fedray.methods.traffic.distinct", lambda spec: (whole, one_by_one))
    assert simulate(method, s, NAMES[:3], "c1", 45) == short


@pytest.mark.parametrize("turn, rounds", [(1, 1), (1, 2), (2, 9), (3, 3), (7, 20), (30, 4), (30, 31), (30, 90)])
def test_a_method_that_turns_turns_in_its_round(turn, rounds):
    method, s = FRAFFA(fra_rounds=turn), spec("abba")
    found = rows(simulate(method, s, NAMES, "c0", rounds))
    assert found == [closed_form(method, s, NAMES, "c0", t) for t in range(rounds)]


@pytest.mark.parametrize("pair", ALL)
def test_simulated_traffic_is_what_travels_in_every_round(pair):
    kind, method = method_of(pair)
    s, k, names = spec(kind), 3, ("c0", "c1", "c2")
    state, seen = begin(method, s), set()
    moves = method.moves_base and "keep" not in pair
    rounds = 16 if moves else 4  # long enough for base updates to be compressed and sent whole, more than once
    for t, simulated in enumerate(simulate(method, s, names, "c1", rounds)):
        new = [i for i in state.increments if i.version not in seen]
        down = sum(x.numel() for n, x in state.tensors.items() if n not in state.heads) + sum(
            x.numel() for i in new for x in i.tensors.values()
        )
        seen |= {i.version for i in new}
        moved = [train(method, state, f"c{i}", 10 * t + i, torch.float32, 1.0) for i in range(k)]
        up = sum(x.numel() for n, x in moved[1][0].tensors.items() if n not in state.heads)
        if method.asks:
            question = method.question(state, [u for u, _, _ in moved])
            down += sum(x.numel() for x in question.values())
            up += sum(x.numel() for x in method.answer(s, question, moved[1][2]).values())
        assert up == simulated.up
        if method.name == "florist" and t:
            assert down <= simulated.down + simulated.once
        else:
            assert down == simulated.down + simulated.once
        if t:
            assert method.moves_base == bool(method.view(s, method.broadcast(state), "c1").base)
        state, _ = aggregate(method, state, [u for u, _, _ in moved], [x for _, _, x in moved])
    assert not moves or "truncated" in pair or state.increments[0].resets


def test_a_base_update_that_is_compressed_in_its_first_round_is_counted_as_it_is_sent():
    """k r = 60 columns of a layer with 16: the closed form of one round's update would be too large."""
    s = spec(layers=(Layer("small", 16, 24, 12, 1.0),))
    assert {m.down + m.once for m in simulate(FLoRA(), s, NAMES, "c0", 9)[1:]} == {16 * (16 + 24)}


def test_layers_of_one_shape_and_rank_are_run_once():
    shapes, copies = distinct(spec(layers=MODEL))
    assert copies == {"0.square": 3, "0.wide": 2, "other.square": 1, "narrow": 1}
    assert [layer.name for layer in shapes.layers] == list(copies)
    assert all(t.is_meta for t in shapes.drawn("lora_A", 3).values())


def test_rounds_that_repeat_are_not_run(monkeypatch):
    ran = []
    monkeypatch.setattr(FedEx, "advance", lambda self, *args: ran.append(1) or super(FedEx, self).advance(*args))
    assert len(simulate(FedEx(), spec(), NAMES, "c0", 10_000)) == 10_000
    assert len(ran) < 100
