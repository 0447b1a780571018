"""A method's own code on tensors without numbers: the names and shapes of what a client sends, whatever it trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fedray.adapters.base import Layer
from fedray.methods.base import Method
from fedray.methods.state import Broadcast, Spec, State, Tensors, View, factor_of, key

Shapes = Mapping[str, tuple[int, ...]]


class ShapeSpec(Spec):
    """A spec whose factors have shapes and no numbers."""

    def drawn(self, factor: str, draw: int) -> dict[str, Tensor]:
        return {key(layer, factor): self._empty(layer, factor) for layer in self.layers}

    def started(self) -> dict[str, Tensor]:
        """The factors that would come from base weights or gradients."""
        return {key(layer, f): self._empty(layer, f) for layer in self.layers for f in self.adapter.started}

    def _empty(self, layer: Layer, factor: str) -> Tensor:
        return torch.empty(self.adapter.shapes(layer)[factor], device="meta")


def without_numbers(tensors: Tensors) -> dict[str, Tensor]:
    """Tensors of the same shapes on the meta device."""
    return {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}


def trained(view: View, heads: tuple[str, ...]) -> dict[str, Tensor]:
    """Of what a client has, what its local training gives back: the factors that train, and the heads."""
    return {n: t for n, t in view.tensors.items() if n in heads or factor_of(n) in view.trained}


def sent_shapes(method: Method, state: State, client: str) -> Shapes:
    """What a client sends in the state's round, in order of the names (as the wire has them). Costs a view without
    numbers: linear in layers and live increments."""
    spec, result = _trained(method, state, client)
    return _shapes(method.upload(spec, client, result, state.round))


def trained_shapes(method: Method, state: State, client: str) -> Shapes:
    """What it trains in the state's round, as its model holds it."""
    return _shapes(_trained(method, state, client)[1])


def answer_shapes(method: Method, state: State, client: str, question: Tensors) -> Shapes:
    """What it answers to the method's second message."""
    spec, result = _trained(method, state, client)
    return _shapes(method.answer(spec, without_numbers(question), result))


def _trained(method: Method, state: State, client: str) -> tuple[ShapeSpec, dict[str, Tensor]]:
    whole, message = state.spec, method.broadcast(state)
    spec = ShapeSpec(whole.adapter, whole.layers, whole.seed, whole.ranks)
    increments = tuple(dataclasses.replace(i, tensors=without_numbers(i.tensors)) for i in message.increments)
    bare: Broadcast = dataclasses.replace(message, tensors=without_numbers(message.tensors), increments=increments)
    return spec, trained(method.view(spec, bare, client), state.heads)


def _shapes(tensors: Tensors) -> Shapes:
    return {name: tuple(tensors[name].shape) for name in sorted(tensors)}
