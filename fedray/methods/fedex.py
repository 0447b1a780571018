"""FedEx-LoRA (Singhal, Ponkshe, Vepakomma, ACL 2025, arXiv 2410.09432): exact, because the frozen base absorbs
whatever the clients' new factors do not say. METHODS.md 4.1 to 4.3.

`FedEx` assigns the mean factors (the paper's choice), or fresh ones; `FedExKeep` leaves every client its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedray.adapters.base import Layer
from fedray.lowrank import LowRank
from fedray.methods.base import (
    Broadcast,
    Cohort,
    Deltas,
    Method,
    Payload,
    PerLayer,
    Spec,
    State,
    View,
    add_increment,
    averaging_error,
    base_parts,
    base_tensors,
    deltas,
    ideal,
    increment_numbers,
    key,
    stacked_base_tensors,
)
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

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, average = state.spec, self.assignment == "average"
        sent = cohort.cast({name: cohort.means[name] for name in state.tensors})
        if average and len(cohort.clients) == 1:
            stored = cohort.cast(
                base_tensors({layer.name: LowRank.zeros(layer.m, layer.n) for layer in spec.layers})
            )  # its own mean
        elif spec.adapter.stacked and self.residual_rank is None:
            stored = cohort.cast(stacked_base_tensors(spec, cohort, sent if average else None))
        else:
            update = averaging_error(spec, cohort) if average else ideal(spec, cohort)
            if self.residual_rank is not None:
                update = PerLayer(
                    spec.layers, lambda layer, whole=update: whole[layer.name].compress(self.residual_rank)
                )
            stored = {n: t for name in update for n, t in cohort.cast(base_tensors({name: update[name]})).items()}
        means = deltas(spec, sent) if average else {}

        def landed(layer: Layer) -> LowRank:
            moved = LowRank.sum([part.to(torch.float64) for part in base_parts(spec, layer, stored)])
            return means[layer.name] + moved if average else moved

        increments = add_increment(state, stored) if any(t.numel() for t in stored.values()) else state.increments
        draw = state.draw if average else dict.fromkeys(state.draw, state.round + 1)
        return state.replace(round=state.round + 1, tensors=sent, increments=increments, draw=draw), PerLayer(
            spec.layers, landed
        )

    def payload(self, spec: Spec, cohort: Sequence[str], client: str, round: int) -> Payload:
        average, k, adapter = self.assignment == "average", len(cohort), spec.adapter
        ranks = [spec.ranks.get(c) for c in cohort]
        numbers, columns = [], []
        for layer in spec.layers:
            own = [adapter.delta_columns(layer.rank if r is None else r) for r in ranks]
            if adapter.stacked and self.residual_rank is None:
                terms = 0 if average and k == 1 else k + average
                numbers.append(terms * sum(math.prod(shape) for shape in adapter.shapes(layer).values()))
                columns.append(terms * own[0])
                continue
            # averaging: a covariance of rank (k - 1) r; a stacked adapter's is the plain difference, of k + 1 deltas
            wide = sum(own) if not average else (k - 1) * own[0] if not adapter.stacked else (k + 1) * own[0] * (k > 1)
            wide = wide if self.residual_rank is None else min(self.residual_rank, wide, layer.m, layer.n)
            numbers.append(wide * (layer.m + layer.n))
            columns.append(wide)
        weights = (
            (k + average) * len(spec.layers) if adapter.stacked and self.residual_rank is None and sum(numbers) else 0
        )
        usual = sum(numbers) + weights if round else 0
        rests = spec.size(*adapter.started) if adapter.started and self.fresh else 0
        sent = increment_numbers(spec, numbers, columns, round, rests)
        again = max(0, sent - usual) if sent != sum(numbers) else 0
        return Payload(
            up=spec.size(client=client),
            down=usual + (spec.size() if average else 0),
            once=again + (rests if round == 0 else 0),
        )


@dataclass(frozen=True)
class FedExKeep(Method):
    """FedEx, assignment `keep`: client i goes on with its own (A_i, B_i) over the base W + sum_j p_j delta_j - delta_i.

    All clients' effective weights agree: W0 + E, with E_new = E + sum_j p_j (delta_j_new - delta_j_old). E is a stack
    of the clients' unscaled last factors with one coefficient each, so a client finds its own in it to the bit, and
    k r (m + n) numbers travel down in all. Older factors cancel when cohort and weights repeat; what is left of them otherwise
    becomes a base update, sent once. `plain["blocks"]` names the stack's blocks: [client, coefficient].
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
                B, A = spec.adapter.pair
                tensors[key(layer, A)], tensors[key(layer, B)] = stack_A[cut].clone(), stack_B[:, cut].clone()
        return View(tensors, base, message.trained)

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, blocks = state.spec, [list(b) for b in state.plain.get("blocks", [])]
        weight = dict(zip(cohort.clients, cohort.weights, strict=True))
        stays = [i for i, (client, _) in enumerate(blocks) if client not in weight]
        leaves = [
            (i, c - weight[client]) for i, (client, c) in enumerate(blocks) if client in weight and c != weight[client]
        ]
        plain = {"blocks": [blocks[i] for i in stays] + [[client, p] for client, p in weight.items()]}
        sent, left = {name: cohort.means[name] for name in state.heads}, {}
        name_B, name_A = spec.adapter.pair
        for layer in spec.layers:
            r, new = layer.rank, cohort.factors(spec, layer)
            B, A = (state.tensors.get(f"{layer.name}.stack_{side}") for side in "BA")
            sent[f"{layer.name}.stack_B"] = torch.cat(
                [*(B[:, i * r : (i + 1) * r] for i in stays), *(f[name_B] for f in new)], 1
            )
            sent[f"{layer.name}.stack_A"] = torch.cat(
                [*(A[i * r : (i + 1) * r] for i in stays), *(f[name_A] for f in new)], 0
            )
            if leaves:
                parts = [
                    LowRank(layer.scale * B[:, i * r : (i + 1) * r].double(), A[i * r : (i + 1) * r].double())
                    for i, _ in leaves
                ]
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

    def payload(self, spec: Spec, cohort: Sequence[str], client: str, round: int) -> Payload:
        return Payload(up=spec.size(), down=len(cohort) * spec.size() if round else 0)
