"""LoRA-FAIR (Bian et al., ICCV 2025, arXiv 2411.14961): the mean factors, B corrected towards the ideal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedray.methods.deltas import deltas, inner_mean
from fedray.methods.fedit import FedIT
from fedray.methods.state import Cohort, Deltas, Spec, State, key
from fedray.options import option


@dataclass(frozen=True)
class LoRAFair(FedIT):
    """A <- Abar, B <- Bbar + dB with dB = argmin ||sum p_i B_i A_i - (Bbar + dB) Abar||^2 + c ||dB||^2, solved in
    closed form: dB = (sum p_i B_i A_i - Bbar Abar) Abar^T (Abar Abar^T + c I)^-1, c = `correction` times the mean
    square of Abar's rows. The paper descends on a cosine distance instead; the least-squares form needs no server
    learning rate. r (m + n) both ways."""

    name = "lora-fair"
    exact = "no"
    linear = False
    kept = ()
    correction: float = option(0.01, "weight of ||dB||^2 against the fit, relative to A's rows", gt=0)

    def trained(self, spec: Spec) -> tuple[str, ...]:
        return spec.pair

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, means = state.spec, dict(cohort.means)
        B, A = spec.pair
        for layer in spec.layers:
            Bbar_mr, Abar_rn = means[key(layer, B)].double(), means[key(layer, A)].double()
            gram_rr = Abar_rn @ Abar_rn.T
            inner = inner_mean(spec, cohort, layer)
            missing_mr = inner.B @ (inner.A @ Abar_rn.T) - Bbar_mr @ gram_rr
            ridge = self.correction * gram_rr.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
            dB = torch.linalg.solve(
                gram_rr + ridge * torch.eye(len(gram_rr), dtype=gram_rr.dtype, device=gram_rr.device), missing_mr.T
            ).T
            means[key(layer, B)] = Bbar_mr + dB
        sent = cohort.cast({name: means[name] for name in state.tensors})
        return state.replace(round=state.round + 1, tensors=sent), deltas(spec, means | sent)
