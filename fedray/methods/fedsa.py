"""FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463): A is shared, B stays with its client."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.methods.base import Method
from fedray.methods.state import Cohort, Spec, State


@dataclass(frozen=True)
class FedSA(Method):
    """Both factors train; A <- sum p_i A_i, and each client goes on with its own B: r n both ways. There is no global
    model, so every client's own is evaluated and exported, and no `exactness` can be stated. Heads are averaged (the
    authors' code keeps the classifier with the client)."""

    name = "fedsa"
    exact = "personal"
    linear = True
    kept = ("B",)

    def trained(self, spec: Spec) -> tuple[str, ...]:
        return spec.pair

    def merge(self, state: State, cohort: Cohort) -> tuple[State, None]:
        sent = cohort.cast({name: cohort.means[name] for name in state.tensors})
        return state.replace(round=state.round + 1, tensors=sent), None
