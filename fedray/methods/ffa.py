"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): A is drawn once, shared and frozen; only B trains.

Exact, because the delta is linear in B.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedray.methods.fedit import FedIT
from fedray.methods.state import Spec


@dataclass(frozen=True)
class FFA(FedIT):
    """B <- sum p_i B_i. Sends r m both ways; clients draw the shared A from the seed. With abba: B2 over (B1, A1,
    A2)."""

    name = "ffa"
    exact = "yes"
    linear = True
    kept = ()

    def trained(self, spec: Spec) -> tuple[str, ...]:
        return (spec.pair[0],)
