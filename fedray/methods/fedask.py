"""FedASK (NeurIPS 2025, arXiv 2507.09990): the mean update through two linear sketches, so that the server never sees
a client's factors (and could sum them securely).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedray import seeding
from fedray.adapters.base import Adapter, Layer
from fedray.lowrank import LowRank
from fedray.methods.base import Method
from fedray.methods.gathering import checked
from fedray.methods.state import Cohort, Diagnostics, Spec, State, Update, factor_of, key
from fedray.options import option

Y, P, LEFT, Q = "sketch_Y", "sketch_P", "sketch_left", "sketch_Q"


@dataclass(frozen=True)
class FedASK(Method):
    """Up: Y_i = B_i (A_i Omega), Omega (n x q) drawn anew each round from the seed, q = r + `oversample`. Down: Q =
    qr(sum p_i Y_i). Up: P_i = A_i^T (B_i^T Q). Then U S V^T = SVD_r((sum p_i P_i)^T), B <- Q U S^1/2, A <- S^1/2 V^T.
    m q + n q up, m q + r (m + n) down.

    The server cannot know the ideal. Each client also sends ||B_i A_i - Q Q^T B_i A_i||, one number a layer, so that
    `exactness` is an upper bound: (sum p_i of these, and the tail that SVD_r cuts, added as squares) over ||Q^T sum
    p_i B_i A_i||.
    """

    name = "fedask"
    adapters = ("lora",)
    exact = "to its tail"
    linear = False
    kept = ()
    asks = True
    oversample: int = option(8, "columns of the sketch beyond the rank", ge=0)

    @classmethod
    def unfit(cls, adapter: type[Adapter]) -> str:
        return adapter.unpaired or (
            f"the loss that it reports bounds s B A from sketches, which says nothing of {adapter.kind}'s product: "
            "it needs adapter.kind lora, or use fra"
        )

    def width(self, layer: Layer) -> int:
        """Columns of the sketch."""
        return min(layer.rank + self.oversample, layer.m, layer.n)

    def upload(self, spec: Spec, client: str, tensors: Mapping[str, Tensor], round: int) -> dict[str, Tensor]:
        B, A = spec.pair
        sent = {n: t for n, t in tensors.items() if factor_of(n) not in (B, A)}
        for layer in spec.layers:
            generator = seeding.generator(spec.seed, "sketch", layer.name, round)
            B_mr, A_rn = tensors[key(layer, B)], tensors[key(layer, A)]
            Omega_nq = torch.randn(layer.n, self.width(layer), generator=generator).to(A_rn)
            sent[key(layer, Y)] = B_mr @ (A_rn @ Omega_nq)
        return sent

    def ask(self, state: State, updates: Sequence[Update]) -> dict[str, Tensor]:
        total, sketches = sum(u.weight for u in updates), {}
        for layer in state.spec.layers:
            Y_mq = sum(u.weight / total * u.tensors[key(layer, Y)].double() for u in updates)
            sketches[key(layer, Q)] = torch.linalg.qr(Y_mq).Q.to(updates[0].tensors[key(layer, Y)].dtype)
        return sketches

    def answer(self, spec: Spec, question: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        B, A = spec.pair
        sent = {}
        for layer in spec.layers:
            Q_mq, B_mr, A_rn = question[key(layer, Q)], trained[key(layer, B)], trained[key(layer, A)]
            seen_qr = Q_mq.T @ B_mr
            sent[key(layer, P)] = (seen_qr @ A_rn).T
            sent[key(layer, LEFT)] = torch.tensor([LowRank(B_mr - Q_mq @ seen_qr, A_rn).norm()], dtype=A_rn.dtype)
        return sent

    def aggregate(
        self, state: State, updates: Iterable[Update], exact_report: bool = False
    ) -> tuple[State, Diagnostics]:
        """`updates` hold both uploads; `state.memory` holds the question's Q."""
        updates = list(checked(updates))
        merged, spectra = self._reduce(state, updates)
        lost = whole = 0.0
        for layer in state.spec.layers:
            S, left = spectra[layer.name], _mean(updates, key(layer, LEFT))
            lost += layer.scale**2 * (S[layer.rank :].square().sum().item() + left.item() ** 2)
            whole += layer.scale**2 * S.square().sum().item()
        return merged, Diagnostics(None, (lost / whole) ** 0.5 if whole else 0.0, whole**0.5)

    def advance(self, state: State, updates: Iterable[Update]) -> State:
        return self._reduce(state, list(updates))[0]

    def _reduce(self, state: State, updates: Sequence[Update]) -> tuple[State, dict[str, Tensor]]:
        """The next state, and each layer's singular values of Q^T sum p_i B_i A_i."""
        spec, sent, spectra = state.spec, {}, {}
        dtype = next(iter(updates[0].tensors.values())).dtype
        B, A = spec.pair
        for layer in spec.layers:
            U, S, Vt = torch.linalg.svd(_mean(updates, key(layer, P)).T, full_matrices=False)
            root, r = S[: layer.rank].sqrt(), layer.rank
            sent[key(layer, B)] = state.memory[key(layer, Q)].double() @ (U[:, :r] * root)
            sent[key(layer, A)] = root[:, None] * Vt[:r]
            spectra[layer.name] = S
        sent |= {name: _mean(updates, name) for name in state.heads}
        memory = {n: t for n, t in state.memory.items() if factor_of(n) != Q}
        tensors = {n: t.to(dtype).contiguous() for n, t in sent.items()}
        return state.replace(round=state.round + 1, tensors=tensors, memory=memory), spectra

    def merge(self, state: State, cohort: Cohort) -> tuple[State, None]:
        raise NotImplementedError("FedASK's server has sketches, no factors: see aggregate")


def _mean(updates: Sequence[Update], name: str) -> Tensor:
    """sum p_i of one tensor of the updates, in fp64."""
    total = sum(u.weight for u in updates)
    mean = sum(u.weight / total * u.tensors[name].double() for u in updates)
    assert isinstance(mean, Tensor), "a round without updates does not come to its mean"
    return mean
