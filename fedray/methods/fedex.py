"""FedEx-LoRA (Singhal, Ponkshe, Vepakomma, ACL 2025, arXiv 2410.09432): exact, because the frozen base absorbs
whatever the clients' new factors do not say. METHODS.md 4.1 to 4.3.

`FedEx` assigns the mean factors (the paper's choice), or fresh ones; `FedExKeep` leaves every client its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedray.lowrank import LowRank
from fedray.methods.base import (
    Broadcast,
    Cohort,
    Deltas,
    Method,
    Payload,
    Spec,
    State,
    View,
    add_increment,
    averaging_error,
    base_tensors,
    deltas,
    ideal,
    key,
)


@dataclass(frozen=True)
class FedEx(Method):
    """average: (A, B) <- (Abar, Bbar), W0 <- W0 + sum p_i delta_i - s Bbar Abar, as a covariance of rank (k-1) r.

    reinit: (A, B) <- (fresh, 0), W0 <- W0 + sum p_i delta_i, of rank k r. With `residual_rank` the base update is its
    best approximation of that rank (Eckart-Young) and what is cut off is lost.
    """

    name = "fedex"
    exact = "yes"
    assignment: Literal["average", "reinit"] = "average"
    residual_rank: int | None = None

    def drawn(self, spec: Spec) -> dict[str, int]:
        return {name: 0 for name in self.trained(spec)} if self.assignment == "reinit" else {}

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, draw = state.spec, state.draw
        if self.assignment == "average":
            update = averaging_error(spec, cohort)
        else:
            update = ideal(spec, cohort)
            draw = {factor: state.round + 1 for factor in draw}
        if self.residual_rank is not None:
            update = {name: delta.compress(self.residual_rank) for name, delta in update.items()}
        sent = cohort.cast({name: cohort.means[name] for name in state.tensors})
        stored = cohort.cast(base_tensors(update))
        landed = {n: LowRank(stored[f"{n}.base_B"], stored[f"{n}.base_A"]).to(torch.float64) for n in update}
        if self.assignment == "average":
            landed = {name: delta + landed[name] for name, delta in deltas(spec, sent).items()}
        increments = add_increment(state, stored) if any(delta.k for delta in update.values()) else state.increments
        return state.replace(round=state.round + 1, tensors=sent, increments=increments, draw=draw), landed

    def payload(self, spec: Spec, clients: int) -> Payload:
        size, terms = spec.size(), clients - 1 if self.assignment == "average" else clients
        base = terms * size
        if self.residual_rank is not None:
            base = sum(
                min(self.residual_rank, terms * layer.rank, layer.m, layer.n) * (layer.m + layer.n) for layer in spec.layers
            )
        return Payload(up=size, down=base + (size if self.assignment == "average" else 0))


@dataclass(frozen=True)
class FedExKeep(Method):
    """FedEx, assignment `keep`: client i goes on with its own (A_i, B_i) over the base W + sum_j p_j delta_j - delta_i.

    All clients' effective weights agree: W0 + E, with E_new = E + sum_j p_j (delta_j_new - delta_j_old). E is a stack
    of the clients' unscaled last factors with one coefficient each, so a client finds its own in it to the bit, and
    k r (m + n) numbers travel down in all. Older factors cancel when cohort and weights repeat; what is left of them otherwise
    becomes a base update, sent once. `plain["blocks"]` names the stack's blocks: [client, coefficient].
    """

    name = "fedex"
    exact = "yes"
    personal = True

    def drawn(self, spec: Spec) -> dict[str, int]:
        return {name: 0 for name in self.trained(spec)}

    def view(self, spec: Spec, message: Broadcast, client: str | None) -> View:
        blocks = message.plain.get("blocks", [])
        own = next((i for i, (name, _) in enumerate(blocks) if name == client), None)
        start = super().view(spec, message, client)
        tensors = {name: t for name, t in start.tensors.items() if not name.endswith((".stack_A", ".stack_B"))}
        base = {}
        for layer in spec.layers if blocks else ():
            stack_A, stack_B = message.tensors[f"{layer.name}.stack_A"], message.tensors[f"{layer.name}.stack_B"]
            width = layer.rank
            coefficients = torch.tensor([c - (i == own) for i, (_, c) in enumerate(blocks)], dtype=torch.float64)
            stack = LowRank(stack_B * (layer.scale * coefficients.repeat_interleave(width)).to(stack_B.dtype), stack_A)
            base[layer.name] = start.base[layer.name] + stack if layer.name in start.base else stack
            if own is not None:
                cut = slice(own * width, (own + 1) * width)
                tensors[key(layer, "lora_A")] = stack_A[cut].clone()
                tensors[key(layer, "lora_B")] = stack_B[:, cut].clone()
        return View(tensors, base, message.trained)

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, blocks = state.spec, [list(b) for b in state.plain.get("blocks", [])]
        weight = dict(zip(cohort.clients, cohort.weights, strict=True))
        stays = [i for i, (client, _) in enumerate(blocks) if client not in weight]
        leaves = [(i, c - weight[client]) for i, (client, c) in enumerate(blocks) if client in weight and c != weight[client]]
        plain = {"blocks": [blocks[i] for i in stays] + [[client, p] for client, p in weight.items()]}
        sent, left = {name: cohort.means[name] for name in state.heads}, {}
        for layer in spec.layers:
            r, new = layer.rank, [spec.factors(layer, f) for f in cohort.factors]
            B, A = (state.tensors.get(f"{layer.name}.stack_{side}") for side in "BA")
            sent[f"{layer.name}.stack_B"] = torch.cat([*(B[:, i * r : (i + 1) * r] for i in stays), *(f["lora_B"] for f in new)], 1)
            sent[f"{layer.name}.stack_A"] = torch.cat([*(A[i * r : (i + 1) * r] for i in stays), *(f["lora_A"] for f in new)], 0)
            if leaves:
                parts = [LowRank(layer.scale * B[:, i * r : (i + 1) * r].double(), A[i * r : (i + 1) * r].double()) for i, _ in leaves]
                left[layer.name] = LowRank.sum(parts, [c for _, c in leaves])
        increments = add_increment(state, cohort.cast(base_tensors(left))) if left else state.increments
        merged = state.replace(round=state.round + 1, tensors=cohort.cast(sent), plain=plain, increments=increments)
        before = self.view(spec, self.broadcast(state), None).base
        after = self.view(spec, self.broadcast(merged), None).base
        starts = [self.view(spec, self.broadcast(state), c).tensors for c in cohort.clients]
        landed = {}
        for layer in spec.layers:
            change = after[layer.name].to(torch.float64)
            if layer.name in before:
                change = change - before[layer.name].to(torch.float64)
            old = [spec.adapter.delta(layer, spec.factors(layer, t)).to(torch.float64) for t in starts]
            landed[layer.name] = change + LowRank.sum(old, cohort.weights)
        return merged, landed

    def payload(self, spec: Spec, clients: int) -> Payload:
        return Payload(up=spec.size(), down=clients * spec.size())
