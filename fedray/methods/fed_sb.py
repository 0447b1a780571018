"""Fed-SB (Singhal, Ponkshe et al., 2025, arXiv 2502.15436) and RAVAN (NeurIPS 2025, arXiv 2506.05568): between frozen,
shared bases only small cores train, and the delta is linear in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedray.adapters import CORED
from fedray.adapters.base import Adapter
from fedray.adapters.ravan import H, S
from fedray.methods.fedit import FedIT
from fedray.methods.state import Spec, factor_of, key


@dataclass(frozen=True)
class FedSB(FedIT):
    """R <- sum p_i R_i. Sends r^2 both ways, whatever the number of clients; the bases once, r (m + n). With ravan: its
    cores, scales held at 1."""

    name = "fed-sb"
    adapters = CORED
    exact = "yes"
    linear = True
    kept = ()

    @classmethod
    def unfit(cls, adapter: type[Adapter]) -> str:
        return (
            f"it averages the r x r core R between two frozen bases, and {adapter.kind} has no such core; "
            "it needs adapter.kind lora-sb, or use fedex or ffa"
        )

    def trained(self, spec: Spec) -> tuple[str, ...]:
        return spec.adapter.trains[:1]


@dataclass(frozen=True)
class RavanMean(FedIT):
    """H_h <- sum p_i s_ih H_ih, s_h <- 1: clients train cores and scales and send the products, so the mean is exact.
    h r^2 both ways."""

    name = "ravan"
    adapters = ("ravan",)
    exact = "yes"
    linear = True
    kept = ()

    @classmethod
    def unfit(cls, adapter: type[Adapter]) -> str:
        return (
            f"it averages the scaled cores of several frozen bases, and {adapter.kind} has none; "
            "it needs adapter.kind ravan"
        )

    def drawn(self, spec: Spec) -> dict[str, int]:
        return {name: 0 for name in spec.names if name != H}

    def upload(self, spec: Spec, client: str, tensors: Mapping[str, Tensor], round: int) -> dict[str, Tensor]:
        sent = {n: t for n, t in tensors.items() if factor_of(n) not in (H, S)}
        for layer in spec.layers:
            sent[key(layer, H)] = tensors[key(layer, H)] * tensors[key(layer, S)][:, None, None]
        return sent
