"""FedIT (Zhang et al., 2023, arXiv 2305.05644): the weighted mean of each factor.

Not exact: the mean of products is not the product of means. METHODS.md 6.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedray.methods.base import Cohort, Deltas, Method, Payload, Spec, State, deltas


@dataclass(frozen=True)
class FedIT(Method):
    """A <- sum p_i A_i, B <- sum p_i B_i. Sends r (m + n) both ways."""

    name = "fedit"
    exact = "no"
    linear = True
    kept = ()

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        sent = cohort.cast({name: cohort.means[name] for name in state.tensors})
        return state.replace(round=state.round + 1, tensors=sent), deltas(state.spec, cohort.means | sent)

    def payload(self, spec: Spec, cohort: Sequence[str], client: str, round: int) -> Payload:
        size, rests = spec.size(*self.trained(spec)), [f for f in spec.adapter.started if f not in self.trained(spec)]
        return Payload(up=size, down=size, once=spec.size(*rests) if rests and round == 0 else 0)
