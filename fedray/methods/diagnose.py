"""What an aggregation lost: the new global model held against the ideal sum p_i delta_i, all from thin factors.

Linear in the clients. Of a small cohort every norm is exact, from its clients' factors. Of a large one where the ideal
is the delta of the mean, from that; else every norm is estimated from the sketch that was kept of the ideal, unless it
is asked for exactly, which forms a layer at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedray.adapters.base import Layer
from fedray.lowrank import LowRank
from fedray.methods.deltas import averaging_error, deltas, ideal
from fedray.methods.gathering import GRAM_COLUMNS, PROBES
from fedray.methods.state import Cohort, Deltas, Diagnostics, Sketch, Spec

#: Gaussian vectors in the estimate of a norm that is a rounding error (`LowRank.norm`).
ROUNDING_PROBES = 16


def diagnose(spec: Spec, cohort: Cohort, landed: Deltas | None) -> Diagnostics:
    """Hold what landed, as it was rounded for the wire, against the ideal. Costs O((m + n) K) a layer of K columns of
    all clients together, or O(m n K) where the clients' factors were kept of a large cohort for an exact report."""
    if landed is None:
        return Diagnostics(None, None, None)
    squares = _of_sketch(spec, cohort, cohort.sketch, landed) if cohort.sketch else _of_factors(spec, cohort, landed)
    whole, lost, error = squares
    norm = whole.mean().item() ** 0.5
    (missed, of_missed), (gone, of_gone) = _ratio(error, whole), _ratio(lost, whole)
    estimated = of_missed > 0 or of_gone > 0
    return Diagnostics(missed, gone, norm, (of_missed, of_gone) if estimated else None)


def _of_factors(spec: Spec, cohort: Cohort, landed: Deltas) -> Tensor:
    """||.||_F^2 over all layers of the ideal, of what was lost of it and of what averaging would lose (3 x 1, fp64)."""
    if not cohort.by_means:
        wanted, averaged = ideal(spec, cohort), averaging_error(spec, cohort)
    else:
        wanted, averaged = deltas(spec, {**cohort.means, **cohort.unrounded}), None
    squares = torch.zeros(3, 1, dtype=torch.float64)
    for layer in spec.layers:  # one at a time: in fp64 all of them would be twice as large as all updates
        delta = wanted[layer.name]
        squares[0] += _square(delta)
        squares[1] += _square(landed[layer.name].to(torch.float64) - delta)
        squares[2] += _square(averaged[layer.name]) if averaged is not None else 0.0
    return squares


def _square(matrix: LowRank) -> float:
    """||M||_F^2: of few columns by Gram matrices, of many dense."""
    if matrix.k <= GRAM_COLUMNS or matrix.B.is_meta:
        return matrix.norm(ROUNDING_PROBES) ** 2
    return matrix.dense().square().sum().item()


def _of_sketch(spec: Spec, cohort: Cohort, sketch: Sketch, landed: Deltas) -> Tensor:
    """The same three as each of the sketch's vectors estimates them (3 x vectors)."""
    means, squares = deltas(spec, {**cohort.means, **cohort.unrounded}), torch.zeros(3, PROBES, dtype=torch.float64)
    for layer in spec.layers:
        wanted, vectors = sketch.images[layer.name], sketch.vectors[: layer.n]
        images = (wanted, _image(landed, layer, vectors) - wanted, _image(means, layer, vectors) - wanted)
        squares += torch.stack([image.square().sum(0).cpu() for image in images])
    return squares


def _image(matrices: Deltas, layer: Layer, vectors: Tensor) -> Tensor:
    return matrices.image(layer.name, vectors)


def _ratio(part: Tensor, whole: Tensor) -> tuple[float, float]:
    """The root of the ratio of two means, and its standard error (the delta method, over the vectors); 0 of one number,
    which is no estimate."""
    if not part.any():
        return 0.0, 0.0
    square = (part.mean() / whole.mean()).item()
    if len(part) == 1:
        return square**0.5, 0.0
    spread = (part - square * whole).std().item() / len(part) ** 0.5 / whole.mean().item()
    return square**0.5, spread / (2 * square**0.5)
