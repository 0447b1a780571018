"""Before round 1: the factors that come neither from the seed nor from training. LoRA-SB's bases, ABBA's first pair.

| `adapter.subspace` | what the clients send, per layer                | what the bases are the SVD of      |
|--------------------|-------------------------------------------------|------------------------------------|
| weights            | nothing: a worker computes it                   | W0                                 |
| gradient           | their gradient, a few layers at a time          | sign of the weighted sum           |
| gradient-raw       | G_i Omega, then Q^T G_i: m q and q n numbers    | the weighted sum, never formed     |
| public             | nothing: a worker reads the public data set     | its gradient, never formed         |
| private            | the same two, of a sample, clipped and noised   | the weighted sum, never formed     |

The sketches are linear in the clients' gradients: the coordinator needs only their sums. q is the rank and
`subspace_oversample`; each of `subspace_passes` power iterations costs one more upload of either kind (Halko,
Martinsson, Tropp, 2011, algorithm 4.4).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedray import seeding
from fedray.adapters.base import Layer, Origin, sketch_columns
from fedray.errors import ClientError
from fedray.federation.channels.base import Answer
from fedray.federation.messages import PUBLIC
from fedray.federation.questions import DenseGradient, Question, RangeSketch, RowSketch, StartFromWeights
from fedray.federation.wire import pack
from fedray.lowrank import top_svd
from fedray.methods import Spec
from fedray.methods.state import key
from fedray.methods.traffic import distinct

#: Most numbers of dense gradient that a client sends at a time; a layer that has more, as those of real models do, goes
#: alone.
GROUP = 1 << 20

#: Puts a question to clients: their answers, in order (`Channel.ask`).
Ask = Callable[[Question, Sequence[str]], list[Answer]]


@dataclass(frozen=True)
class Start:
    """`tensors`: the started factors. Bytes are the clients', all together. `energy`: what share of the squared norm of
    the decomposed matrices the bases capture (about, for sketched gradients: their norm is estimated from the sketch);
    None for weights."""

    tensors: dict[str, Tensor]
    source: str
    bytes_up: int = 0
    bytes_down: int = 0
    energy: float | None = None
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """All but the tensors."""
        return {k: v for k, v in asdict(self).items() if k != "tensors"}


def make_start(spec: Spec, clients: Sequence[str], ask: Ask) -> Start:
    """The factors that the adapter's `origin` asks for. Raises ClientError when a client fails: bases need all of
    them."""
    began = time.monotonic()
    origin = spec.adapter.origin
    if origin.source == "weights":
        (answer,) = ask(StartFromWeights(), clients[:1])
        start = Start(dict(_checked(answer, _started_shapes(spec))), origin.source)
    elif origin.source == "gradient":
        start = _signed(spec, clients, ask)
    else:
        start = _sketched(spec, Sketches(spec, [PUBLIC] if origin.source == "public" else clients, ask))
    return replace(start, seconds=round(time.monotonic() - began, 4))


@dataclass(frozen=True)
class StartTraffic:
    """What one client moves before round 1: numbers `up` and `down`, and how many `sums` they are answers to. What is
    sent once with round 1 is not among them."""

    up: int = 0
    down: int = 0
    sums: int = 0


def start_traffic(spec: Spec) -> StartTraffic:
    """Of the adapter's `origin`, found by running the range finder on tensors without numbers."""
    origin = spec.adapter.origin
    if origin.source in ("weights", "public"):
        return StartTraffic()
    if origin.source == "gradient":
        return StartTraffic(up=sum(layer.m * layer.n for layer in spec.layers))
    shapes, copies = distinct(spec)
    sketches = ShapesOfSketches(shapes.layers, copies, origin)
    find_range(sketches, origin.passes)
    return StartTraffic(sketches.up, sketches.down, sketches.sums)


def _checked(answer: Answer, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
    """The answer's tensors. Raises ClientError for others than those that were asked for."""
    tensors = answer.tensors()
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != dict(shapes):
        raise ClientError(answer.client, "its answer has other tensors than were asked for (before round 1)")
    return tensors


def _mean(answers: Sequence[Answer], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """sum p_i of the answers, in fp64 in the order of the clients; one client's answer at a time. Raises ClientError
    for one that is of other shapes."""
    total: dict[str, Tensor] = {}
    whole = sum(answer.weight for answer in answers)
    for answer in answers:
        for name, tensor in _checked(answer, shapes).items():
            part = tensor.double() * (answer.weight / whole)
            total[name] = total[name].add_(part) if name in total else part
    return total


def _signed(spec: Spec, clients: Sequence[str], ask: Ask) -> Start:
    """The authors' choice: sign(sum p_i G_i), which is AdamW's first step, and its first singular vectors."""
    B, A = spec.adapter.started
    tensors: dict[str, Tensor] = {}
    up, kept, whole = 0, 0.0, 0.0
    for group in grouped(spec.layers):
        answers = ask(DenseGradient(tuple(layer.name for layer in group), spec.adapter.origin.examples), clients)
        up += sum(answer.up for answer in answers)
        mean = _mean(answers, {layer.name: (layer.m, layer.n) for layer in group})
        for layer in group:
            signed = mean[layer.name].sign().float()
            U, S, Vt = top_svd(signed, layer.rank, seeding.generator(spec.seed, layer.name, "subspace"))
            tensors |= {f"{layer.name}.{B}": U.contiguous(), f"{layer.name}.{A}": Vt.contiguous()}
            kept, whole = kept + S.double().square().sum().item(), whole + signed.double().square().sum().item()
    return Start(tensors, "gradient", up, 0, kept / whole if whole else 0.0)


def grouped(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers in order, in groups of at most GROUP numbers."""
    groups: list[list[Layer]] = []
    room = 0
    for layer in layers:
        if not groups or layer.m * layer.n > room:
            groups.append([])
            room = GROUP
        groups[-1].append(layer)
        room -= layer.m * layer.n
    return groups


class Sketched(Protocol):
    """Sketches of a matrix G (m x n) for each layer, by name."""

    def columns(self, basis: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """G times the bases (n x q), which are Gaussian where none are given."""

    def rows(self, basis: dict[str, Tensor]) -> dict[str, Tensor]:
        """The bases' (m x q) transposes times G."""


def find_range(sketches: Sketched, passes: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(G Omega, Q, Q^T G) of every layer: Q spans about the range of (G G^T)^passes G Omega."""
    columns = sketches.columns(None)
    Q = _bases(columns)
    for _ in range(passes):
        rows = sketches.rows(Q)
        Q = _bases(sketches.columns(_bases({name: z.T for name, z in rows.items()})))
    return columns, Q, sketches.rows(Q)


def _bases(sketches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.linalg.qr(sketch).Q for name, sketch in sketches.items()}


class Sketches:
    """Asks clients for sketches of their mean gradient, and counts the bytes that move: none where `clients` is a
    public data set."""

    def __init__(self, spec: Spec, clients: Sequence[str], ask: Ask):
        self.layers, self.origin, self.clients, self.ask = spec.layers, spec.adapter.origin, clients, ask
        self.up = self.down = 0

    def columns(self, basis: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Without bases the clients draw them from the seed, and no bytes go down."""
        packet = pack(basis) if basis is not None else None
        question = RangeSketch(packet, self.origin.examples, self.origin.oversample)
        return self._summed(question, column_shapes(self.layers, basis, self.origin))

    def rows(self, basis: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._summed(RowSketch(pack(basis), self.origin.examples), row_shapes(self.layers, basis))

    def _summed(self, question: RangeSketch | RowSketch, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        answers = self.ask(question, self.clients)
        if self.origin.source != "public":
            self.up += sum(answer.up for answer in answers)
            self.down += (question.sides.nbytes * len(self.clients) if question.sides is not None else 0) + sum(
                answer.down for answer in answers
            )
        return _mean(answers, shapes)


def column_shapes(
    layers: Sequence[Layer], basis: Mapping[str, Tensor] | None, origin: Origin
) -> dict[str, tuple[int, int]]:
    """m x q of each layer's G Omega."""
    return {
        layer.name: (layer.m, basis[layer.name].shape[1] if basis else sketch_columns(layer, origin.oversample))
        for layer in layers
    }


def row_shapes(layers: Sequence[Layer], basis: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """q x n of each layer's Q^T G."""
    return {layer.name: (basis[layer.name].shape[1], layer.n) for layer in layers}


def _started_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    return {
        key(layer, factor): tuple(spec.adapter.shapes(layer)[factor])
        for layer in spec.layers
        for factor in spec.adapter.started
    }


class ShapesOfSketches:
    """Sketches without numbers, and how many numbers one client moves for them. `copies`: how many layers each of
    `layers` stands for."""

    def __init__(self, layers: Sequence[Layer], copies: Mapping[str, int], origin: Origin):
        self.layers, self.copies, self.origin = layers, copies, origin
        self.up = self.down = self.sums = 0

    def columns(self, basis: dict[str, Tensor] | None) -> dict[str, Tensor]:
        self.down += self._numbers(basis or {})
        return self._answered(column_shapes(self.layers, basis, self.origin))

    def rows(self, basis: dict[str, Tensor]) -> dict[str, Tensor]:
        self.down += self._numbers(basis)
        return self._answered(row_shapes(self.layers, basis))

    def _answered(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        answer = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        self.up += self._numbers(answer)
        self.sums += 1
        return answer

    def _numbers(self, tensors: Mapping[str, Tensor]) -> int:
        return sum(self.copies[name] * tensor.numel() for name, tensor in tensors.items())


def _sketched(spec: Spec, sketches: Sketches) -> Start:
    columns, Q, rows = find_range(sketches, sketches.origin.passes)
    B, A = spec.adapter.started
    tensors, kept, whole = {}, 0.0, 0.0
    for layer in spec.layers:
        name, z_qn = layer.name, rows[layer.name]
        U, S, Vt = torch.linalg.svd(z_qn, full_matrices=False)
        tensors[f"{name}.{B}"] = (Q[name] @ U[:, : layer.rank]).float().contiguous()
        tensors[f"{name}.{A}"] = Vt[: layer.rank].float().contiguous()
        kept += S[: layer.rank].square().sum().item()
        # ||G||^2 is what Q sees of it, exactly, and what it does not: E ||(1 - Q Q^T) G omega||^2 over the Gaussian
        # first sketch. Without power iterations Q spans that sketch, and the second part reads 0.
        left = columns[name] - Q[name] @ (Q[name].T @ columns[name])
        whole += S.square().sum().item() + left.square().sum().item() / left.shape[1]
    source = sketches.origin.source
    # Of a private gradient most of the energy is noise.
    energy = None if source == "private" else kept / whole if whole else 0.0
    return Start(tensors, source, sketches.up, sketches.down, energy)
