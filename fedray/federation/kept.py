"""What stays with a client from round to round, as named tensors: its optimizer's state, factors of its own, and the
rest that rounding took from its update (`coding.py`)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_FACTORS, _OPTIMIZER, _REST = "own/", "optimizer/", "rest/"

Tensors = Mapping[str, Tensor]


def kept_tensors(factors: Tensors, optimizer: Tensors) -> dict[str, Tensor]:
    """Both under one roof."""
    return {f"{_OPTIMIZER}{n}": t for n, t in optimizer.items()} | {f"{_FACTORS}{n}": t for n, t in factors.items()}


def rest_tensors(rest: Tensors) -> dict[str, Tensor]:
    """What rounding took, under the names by which it is kept."""
    return {rest_name(n): t for n, t in rest.items()}


def rest_name(name: str) -> str:
    """The name under which the rest of a tensor is kept."""
    return f"{_REST}{name}"


def is_rest(name: str) -> bool:
    """Whether a kept tensor is a rest."""
    return name.startswith(_REST)


def rest_of(kept: Tensors) -> dict[str, Tensor]:
    """The rests among what was kept."""
    return {n.removeprefix(_REST): t for n, t in kept.items() if n.startswith(_REST)}


def factor_name(name: str) -> str:
    """The name under which a factor is kept."""
    return f"{_FACTORS}{name}"


def is_factor(name: str) -> bool:
    """Whether a kept tensor is a factor."""
    return name.startswith(_FACTORS)


def optimizer_name(name: str) -> str:
    """Of a kept tensor of the optimizer, `NAME/exp_avg` or the like; empty for any other."""
    return name.removeprefix(_OPTIMIZER) if name.startswith(_OPTIMIZER) else ""


def factors_kept(kept: Tensors) -> dict[str, Tensor]:
    """The factors among what was kept."""
    return {n.removeprefix(_FACTORS): t for n, t in kept.items() if n.startswith(_FACTORS)}


def optimizer_kept(kept: Tensors) -> dict[str, Tensor]:
    """The optimizer's state among what was kept."""
    return {n.removeprefix(_OPTIMIZER): t for n, t in kept.items() if n.startswith(_OPTIMIZER)}
