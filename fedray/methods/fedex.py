"""FedEx-LoRA (Singhal, Ponkshe, Vepakomma, ACL 2025, arXiv 2410.09432): exact, because the frozen base absorbs
whatever the clients' new factors do not say.

`FedEx` assigns the mean factors (the paper's choice), or fresh ones; `FedExKeep` leaves every client its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from fedray.adapters.base import Layer
from fedray.lowrank import LowRank
from fedray.methods.base import Method
from fedray.methods.deltas import Sum, averaging_error, deltas, ideal
from fedray.methods.increments import add_increment, base_tensors, base_total, stacked_base_tensors
from fedray.methods.state import Broadcast, Cohort, Deltas, Increment, Spec, State, Tensors, View, key
from fedray.options import option


@dataclass(frozen=True)
class FedEx(Method):
    """average: (A, B) <- (Abar, Bbar), W0 <- W0 + sum p_i delta_i - s Bbar Abar, as a covariance of rank (k-1) r.

    reinit: (A, B) <- (fresh, 0), W0 <- W0 + sum p_i delta_i, of rank k r. With `residual_rank` the base update is its
    best approximation of that rank (Eckart-Young) and what is cut off is lost.
    """

    name = "fedex"
    exact = "yes"
    linear = False
    kept = ()
    assignment: Literal["average", "reinit"] = option(
        "average", "the factors that clients go on with", reads=Literal["average", "reinit", "keep"]
    )
    residual_rank: int | None = option(
        None, "truncate the base update to this rank; what is cut off is reported as exactness", ge=1
    )

    @classmethod
    def configured(cls, options: Mapping[str, Any], rounds: int, adapter: str) -> Method:
        """As for every method; assignment `keep` is a class of its own."""
        if options.get("assignment") != "keep":
            return super().configured(options, rounds, adapter)
        if adapter not in FedExKeep.adapters:
            raise ValueError(f"method.assignment keep needs adapter.kind lora, not {adapter}: use average or reinit")
        if "residual_rank" in options:
            raise ValueError(
                "method.assignment keep cannot be truncated by residual_rank: each client's base differs, "
                "and what is cut off would differ too; use average or reinit"
            )
        return FedExKeep()

    @property
    def fresh(self) -> bool:
        return self.assignment == "reinit"

    def drawn(self, spec: Spec) -> dict[str, int]:
        if not self.fresh:
            return {}
        return {name: 0 for name in self.trained(spec) if name not in spec.adapter.started}

    @property
    def moves_base(self) -> bool:
        return True

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, average = state.spec, self.assignment == "average"
        sent = cohort.cast({name: cohort.means[name] for name in state.tensors})
        stored = self._base_update(spec, cohort, sent if average else None)
        moved = base_total(spec, [Increment(0, stored)])
        increments = add_increment(state, stored) if any(t.numel() for t in stored.values()) else state.increments
        draw = state.draw if average else dict.fromkeys(state.draw, state.round + 1)
        merged = state.replace(round=state.round + 1, tensors=sent, increments=increments, draw=draw)
        return merged, Sum(spec.layers, deltas(spec, sent), moved) if average else moved

    def _base_update(self, spec: Spec, cohort: Cohort, means: Tensors | None) -> dict[str, Tensor]:
        """sum p_i delta_i, less the delta of `means` where clients go on from those, as it travels."""
        if means is not None and len(cohort.clients) == 1:  # its own mean
            zeros = {layer.name: LowRank.zeros(layer.m, layer.n) for layer in spec.layers}
            return cohort.cast(base_tensors(zeros))
        if spec.adapter.stacked and self.residual_rank is None:
            return cohort.cast(stacked_base_tensors(spec, cohort, means))
        update, cut = ideal if means is None else averaging_error, self.residual_rank
        if cut is None:
            return cohort.cast(base_tensors(update(spec, cohort, cohort.dtype)))
        whole = update(spec, cohort)
        return {n: t for name in whole for n, t in cohort.cast(base_tensors({name: whole[name].compress(cut)})).items()}


@dataclass(frozen=True)
class FedExKeep(Method):
    """FedEx, assignment `keep`: client i goes on with its own (A_i, B_i) over the base W + sum_j p_j delta_j - delta_i.

    All clients' effective weights agree: W0 + E, with E_new = E + sum_j p_j (delta_j_new - delta_j_old). E is a stack
    of the clients' unscaled last factors with one coefficient each, so a client finds its own in it to the bit, and
    k r (m + n) numbers travel down in all. Older factors cancel when cohort and weights repeat; what is left of them
    otherwise becomes a base update, sent once. `plain["blocks"]` names the stack's blocks: [client, coefficient].
    """

    name = "fedex"
    adapters = ("lora",)
    exact = "yes"
    linear = False
    kept = ()
    personal = True

    def drawn(self, spec: Spec) -> dict[str, int]:
        return dict.fromkeys(self.trained(spec), 0)

    def view(self, spec: Spec, message: Broadcast, client: str | None) -> View:
        blocks = message.plain.get("blocks", [])
        mine = next((i for i, (name, _) in enumerate(blocks) if name == client), None)
        start = super().view(spec, message, client)
        tensors = {name: t for name, t in start.tensors.items() if not name.endswith((".stack_A", ".stack_B"))}
        base = {}
        for layer in spec.layers if blocks else ():
            stack_A, stack_B = message.tensors[f"{layer.name}.stack_A"], message.tensors[f"{layer.name}.stack_B"]
            width = layer.rank
            coefficients = torch.tensor([c - (i == mine) for i, (_, c) in enumerate(blocks)], dtype=torch.float64)
            stack = LowRank(stack_B * (layer.scale * coefficients.repeat_interleave(width)).to(stack_B), stack_A)
            base[layer.name] = start.base[layer.name] + stack if layer.name in start.base else stack
            if mine is not None:
                cut = slice(mine * width, (mine + 1) * width)
                B, A = spec.pair
                tensors[key(layer, A)], tensors[key(layer, B)] = stack_A[cut].clone(), stack_B[:, cut].clone()
        return View(tensors, base, message.trained)

    @property
    def moves_base(self) -> bool:
        return True

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, blocks = state.spec, [list(b) for b in state.plain.get("blocks", [])]
        weight = dict(zip(cohort.clients, cohort.weights, strict=True))
        stays = [i for i, (client, _) in enumerate(blocks) if client not in weight]
        plain = {"blocks": [blocks[i] for i in stays] + [[client, p] for client, p in weight.items()]}
        sent = {name: cohort.means[name] for name in state.heads}
        for layer in spec.layers:
            sent |= _stack(state, cohort, layer, stays)
        left = _left_over(state, blocks, weight)
        increments = add_increment(state, cohort.cast(base_tensors(left))) if left else state.increments
        merged = state.replace(round=state.round + 1, tensors=cohort.cast(sent), plain=plain, increments=increments)
        return merged, self._landed(state, merged, cohort)

    def _landed(self, state: State, merged: State, cohort: Cohort) -> Deltas:
        """Per layer, the base's change and the mean of the deltas that the cohort started this round with."""
        spec = state.spec

        @cache
        def bases() -> tuple[Mapping[str, LowRank], Mapping[str, LowRank]]:
            before, after = (self.view(spec, self.broadcast(s), None).base for s in (state, merged))
            return before, after

        @cache
        def starts() -> list[Tensors]:
            return [self.view(spec, self.broadcast(state), client).tensors for client in cohort.clients]

        def landed(layer: Layer) -> LowRank:
            before, after = bases()
            change = after[layer.name].to(torch.float64)
            if layer.name in before:
                change = change - before[layer.name].to(torch.float64)
            old = [spec.adapter.delta(layer, spec.factors(layer, t)).to(torch.float64) for t in starts()]
            return change + LowRank.sum(old, cohort.weights)

        return Deltas(spec.layers, landed)


def _stack(state: State, cohort: Cohort, layer: Layer, stays: list[int]) -> dict[str, Tensor]:
    """One layer's stack: the blocks of clients that were not asked, then the cohort's new factors."""
    r, new = layer.rank, cohort.factors(state.spec, layer)
    name_B, name_A = state.spec.pair
    old_B = [state.tensors[f"{layer.name}.stack_B"][:, i * r : (i + 1) * r] for i in stays]
    old_A = [state.tensors[f"{layer.name}.stack_A"][i * r : (i + 1) * r] for i in stays]
    return {
        f"{layer.name}.stack_B": torch.cat([*old_B, *(f[name_B] for f in new)], 1),
        f"{layer.name}.stack_A": torch.cat([*old_A, *(f[name_A] for f in new)], 0),
    }


def _left_over(state: State, blocks: list[list], weight: dict[str, float]) -> dict[str, LowRank]:
    """Per layer, what the replaced blocks leave in the base, where a client's weight is not what it was; empty where
    it is."""
    leaves = [(i, c - weight[name]) for i, (name, c) in enumerate(blocks) if name in weight and c != weight[name]]
    left = {}
    for layer in state.spec.layers if leaves else ():
        r = layer.rank
        B, A = state.tensors[f"{layer.name}.stack_B"], state.tensors[f"{layer.name}.stack_A"]
        parts = [
            LowRank(layer.scale * B[:, i * r : (i + 1) * r].double(), A[i * r : (i + 1) * r].double())
            for i, _ in leaves
        ]
        left[layer.name] = LowRank.sum(parts, [c for _, c in leaves])
    return left
