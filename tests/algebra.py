"""Rounds of a method on tensors alone, without a model: what the tests of the methods and of their bytes share."""

import torch
from support import ALL

from fedray import seeding
from fedray.adapters import ADAPTERS, Layer
from fedray.config.build import make_method
from fedray.config.read import from_dict
from fedray.methods import Spec, State, Update

LAYERS = (Layer("square", 40, 40, 3, 0.5), Layer("wide", 37, 53, 2, 2.0), Layer("tall", 61, 29, 4, 1.0))


def spec(kind="lora", layers=LAYERS, ranks=None):
    return Spec(ADAPTERS[kind](), layers, 7, ranks or {})


def method_of(pair):
    kind, name, options = ALL[pair]
    return kind, make_method(
        from_dict({"adapter": {"kind": kind}, "method": {"name": name, **options}, "federation": {"rounds": 4}})
    )


def started(s: Spec) -> dict[str, torch.Tensor]:
    """The factors that come from base weights, of random ones."""
    found = {}
    for layer in s.layers:
        weight = torch.randn(layer.m, layer.n, generator=seeding.generator("weight", layer.name))
        found |= {f"{layer.name}.{f}": t for f, t in s.adapter.start(layer, weight, s.seed).items()}
    return found


def begin(method, s: Spec) -> State:
    return method.init(s, {"head.weight": torch.zeros(2, 5)}, started(s))


def dense(s: Spec, view, tensors) -> dict[str, torch.Tensor]:
    result = {}
    for layer in s.layers:
        result[layer.name] = s.adapter.delta(
            layer, {n: t.double() for n, t in s.factors(layer, tensors).items()}
        ).dense()
        if layer.name in view.base:
            result[layer.name] = result[layer.name] + view.base[layer.name].to(torch.float64).dense()
    return result


def effective(method, state: State, client=None) -> dict[str, torch.Tensor]:
    """W - W0 per layer, dense in fp64: what a client computes with."""
    view = method.view(state.spec, method.broadcast(state), client)
    return dense(state.spec, view, view.tensors)


def train(method, state, client, seed, dtype, weight, own=None):
    """A stand-in for local training: a random step on whatever trains, head included. (update, its dense weights, what
    was trained)"""
    view = method.view(state.spec, method.broadcast(state), client)
    held = view.tensors | (own or {})
    g = torch.Generator().manual_seed(seed)
    moves = sorted(n for n in held if n in state.heads or n.rsplit(".", 1)[1] in view.trained)
    room = {n: t.shape for n, t in state.spec.cut(client, held).items()}
    after = dict(held)
    for name in moves:
        step = 0.3 * torch.randn(room[name], generator=g, dtype=dtype)
        pad = [x for have, want in zip(step.shape[::-1], held[name].shape[::-1], strict=True) for x in (0, want - have)]
        after[name] = held[name].to(dtype) + torch.nn.functional.pad(step, pad)
    trained = {n: after[n] for n in moves}
    return (
        Update(client, weight, method.upload(state.spec, client, trained, state.round)),
        dense(state.spec, view, after),
        trained,
    )


def aggregate(method, state, updates, trained):
    """As the coordinator does it, second upload included."""
    if method.asks:
        asked = method.question(state, updates)
        updates = [
            Update(u.client, u.weight, {**u.tensors, **method.answer(state.spec, asked, t)})
            for u, t in zip(updates, trained, strict=True)
        ]
        state = state.replace(memory=state.memory | asked)
    return method.aggregate(state, iter(updates))
