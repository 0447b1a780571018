"""What an aggregation lost: the new global model held against the ideal sum p_i delta_i, all from thin factors.

Linear in the clients: a norm over few columns is exact, by Gram matrices; over many it is estimated by Gaussian vectors
unless it is asked for exactly, which forms a layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fedray.lowrank import LowRank
from fedray.methods.deltas import averaging_error, ideal
from fedray.methods.state import Cohort, Deltas, Diagnostics, Spec

#: Gaussian vectors in the estimate of a norm that is a rounding error (`LowRank.norm`).
ROUNDING_PROBES = 16
#: Gaussian vectors in any other estimate: of one layer of rank 1 its relative standard error is 9 %, of more less.
PROBES = 64
#: Of those vectors.
SEED = 0
#: Up to so many columns a Gram matrix, which costs their square, is not dearer than the vectors.
GRAM_COLUMNS = 128


def diagnose(spec: Spec, cohort: Cohort, landed: Deltas | None, exact: bool = False) -> Diagnostics:
    """Hold what landed, as it was rounded for the wire, against the ideal. Costs O((m + n) K) a layer of K columns of
    all clients together, or O(m n K) where it is to be `exact`."""
    if landed is None:
        return Diagnostics(None, None, None)
    wanted, averaged = ideal(spec, cohort), averaging_error(spec, cohort)
    widest = max(layer.n for layer in spec.layers)

    @cache  # one set for all layers, drawn where one needs it: errors rest on the vectors' independence alone
    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(widest, PROBES, dtype=torch.float64, generator=generator)

    probes = None if exact else draw
    whole, lost, error = torch.zeros(3, PROBES, dtype=torch.float64)
    for layer in spec.layers:  # one at a time: in fp64 all of them would be twice as large as all updates
        delta = wanted[layer.name]
        whole += _squares(delta, probes)
        lost += _squares(landed[layer.name].to(torch.float64) - delta, probes)
        error += _squares(averaged[layer.name], probes)
    norm = whole.mean().item() ** 0.5
    (missed, of_missed), (gone, of_gone) = _ratio(error, whole), _ratio(lost, whole)
    estimated = of_missed > 0 or of_gone > 0
    return Diagnostics(missed, gone, norm, (of_missed, of_gone) if estimated else None)


def _squares(matrix: LowRank, probes: Callable[[], Tensor] | None) -> Tensor:
    """||M||_F^2 as each vector estimates it (fp64, PROBES of them), all alike where it is exact."""
    m, n = matrix.shape
    if matrix.k <= GRAM_COLUMNS or matrix.B.is_meta:
        return torch.full((PROBES,), matrix.norm(ROUNDING_PROBES) ** 2, dtype=torch.float64)
    if probes is None or m * n <= (m + n) * PROBES:  # the matrix itself is no dearer
        return torch.full((PROBES,), matrix.dense().square().sum().item(), dtype=torch.float64)
    return (matrix.B @ (matrix.A @ probes()[:n].to(matrix.A.device))).square().sum(0).cpu()


def _ratio(part: Tensor, whole: Tensor) -> tuple[float, float]:
    """The root of the ratio of two means, and its standard error (the delta method, over the vectors)."""
    if not part.any():
        return 0.0, 0.0
    square = (part.mean() / whole.mean()).item()
    spread = (part - square * whole).std().item() / len(part) ** 0.5 / whole.mean().item()
    # What is alike for every vector differs by rounding alone.
    exact = bool((part == part[0]).all() and (whole == whole[0]).all())
    return square**0.5, 0.0 if exact else spread / (2 * square**0.5)
