"""FedRot-LoRA (Zhang, Kim, Cha, Vikalo, ICML 2026, arXiv 2602.23638): the clients' factors are turned towards those of
the broadcast before they are averaged. B_i R_i R_i^T A_i is B_i A_i, so turning changes no client's update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedray.lowrank import weighted_sum
from fedray.methods.deltas import deltas
from fedray.methods.fedit import FedIT
from fedray.methods.state import Cohort, Deltas, Spec, State, key
from fedray.options import option


@dataclass(frozen=True)
class FedRot(FedIT):
    """A <- sum p_i R_i^T A_i, B <- sum p_i B_i R_i, with R_i the rotation (det 1) that brings one factor closest to the
    broadcast's: min ||R^T A_i - A||_F in rounds 2, 4, ..., min ||B_i R - B||_F in rounds 3, 5, ...; none in round 1,
    where B is zero. `rotation` goes only part of the way: the rotation closest to (1 - rotation) I + rotation R_i.
    Not exact. r (m + n) both ways. Done at the server, where it gives what the clients would have sent."""

    name = "fedrot"
    exact = "no"
    linear = False
    kept = ()
    rotation: float = option(0.5, "how much of the way the clients' factors are turned", gt=0, le=1)

    def trained(self, spec: Spec) -> tuple[str, ...]:
        return spec.pair

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, means = state.spec, dict(cohort.means)
        B, A = spec.pair
        broadcast = self.view(spec, self.broadcast(state), None).tensors
        for layer in spec.layers if state.round else ():
            left, right, turn_by = key(layer, B), key(layer, A), key(layer, A if state.round % 2 else B)
            turns = [self.turn(t[turn_by], broadcast[turn_by], turn_by == left) for t in cohort.tensors]
            turned = list(zip(cohort.tensors, turns, strict=True))
            means[left] = weighted_sum([t[left].double() @ R_rr for t, R_rr in turned], cohort.weights)
            means[right] = weighted_sum([R_rr.T @ t[right].double() for t, R_rr in turned], cohort.weights)
        sent = cohort.cast({name: means[name] for name in state.tensors})
        return state.replace(round=state.round + 1, tensors=sent), deltas(spec, means | sent)

    def turn(self, factor: Tensor, reference: Tensor, columns: bool) -> Tensor:
        """R (r x r, fp64): `rotation` of the way to what brings a factor closest to its reference."""
        X, Y = factor.double(), reference.double()
        R_rr = nearest_rotation(X.T @ Y if columns else X @ Y.T)
        rest = torch.eye(len(R_rr), dtype=R_rr.dtype, device=R_rr.device)
        return nearest_rotation((1 - self.rotation) * rest + self.rotation * R_rr) if self.rotation < 1 else R_rr


def nearest_rotation(M_rr: Tensor) -> Tensor:
    """The R with R^T R = I and det R = 1 of the largest trace(R^T M) (Kabsch, 1976)."""
    U, _, Vt = torch.linalg.svd(M_rr)
    return torch.cat([U[:, :-1], U[:, -1:] * torch.linalg.det(U @ Vt).sign()], 1) @ Vt
