"""What an aggregation lost: the new global model held against the ideal sum p_i delta_i, all from thin factors."""

from __future__ import annotations

import torch

from fedray.methods.deltas import averaging_error, ideal
from fedray.methods.state import Cohort, Deltas, Diagnostics, Spec

#: Gaussian vectors in the estimate of a norm that is a rounding error (`LowRank.norm`).
PROBES = 16


def diagnose(spec: Spec, cohort: Cohort, landed: Deltas | None) -> Diagnostics:
    """Hold what landed, as it was rounded for the wire, against the ideal; all from thin factors."""
    if landed is None:
        return Diagnostics(None, None, None)
    wanted, averaged = ideal(spec, cohort), averaging_error(spec, cohort)
    whole = lost = error = 0.0
    for layer in spec.layers:  # one at a time: in fp64 all of them would be twice as large as all updates
        delta = wanted[layer.name]
        whole += delta.norm(PROBES) ** 2
        lost += (landed[layer.name].to(torch.float64) - delta).norm(PROBES) ** 2
        error += averaged[layer.name].norm(PROBES) ** 2
    whole, lost, error = whole**0.5, lost**0.5, error**0.5
    return Diagnostics(error / whole if error else 0.0, lost / whole if lost else 0.0, whole)
