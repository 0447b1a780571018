"""FedIT (Zhang et al., 2023, arXiv 2305.05644): the weighted mean of each factor.

Not exact: the mean of products is not the product of means.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedray.methods.base import Method
from fedray.methods.deltas import deltas
from fedray.methods.state import Cohort, Deltas, State


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
