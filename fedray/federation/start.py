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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedray import seeding
from fedray.adapters import Layer
from fedray.adapters.lora_sb import A, B
from fedray.federation.channels.base import Answer
from fedray.federation.messages import PUBLIC
from fedray.federation.questions import DenseGradient, Question, RangeSketch, RowSketch, StartFromWeights
from fedray.federation.wire import pack
from fedray.lowrank import top_svd
from fedray.methods import Spec

if TYPE_CHECKING:
    from fedray.config.sections import Config

#: Most numbers of dense gradient that a client sends at a time; a layer that has more, as those of real models do, goes
#: alone.
GROUP = 1 << 20
EXAMPLES, OVERSAMPLE, PASSES = 64, 16, 2

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


def make_start(config: Config, spec: Spec, clients: Sequence[str], ask: Ask) -> Start:
    """The started factors of an adapter that has some. Raises ClientError when a client fails: bases need all of
    them."""
    began = time.monotonic()
    source = (config.adapter.subspace or "weights") if spec.adapter.kind == "lora-sb" else "weights"
    if source == "weights":
        start = Start(dict(ask(StartFromWeights(), clients[:1])[0].tensors()), source)
    elif source == "gradient":
        start = _signed(config, spec, clients, ask)
    else:
        start = _sketched(config, spec, [PUBLIC] if source == "public" else clients, ask, source)
    return replace(start, seconds=round(time.monotonic() - began, 4))


def numbers(config: Config, spec: Spec) -> tuple[int, int]:
    """(up, down) of one client before round 1, in numbers of 4 bytes; what is sent once with round 1 is not among
    them."""
    source = config.adapter.subspace
    if spec.adapter.kind != "lora-sb" or source in (None, "weights", "public"):
        return 0, 0
    if source == "gradient":
        return sum(layer.m * layer.n for layer in spec.layers), 0
    oversample, passes = _range(config)
    up = down = 0
    for layer in spec.layers:
        q = min(layer.rank + oversample, layer.m, layer.n)
        up += (passes + 1) * q * (layer.m + layer.n)
        down += q * ((passes + 1) * layer.m + passes * layer.n)
    return up, down


def sums(config: Config, spec: Spec) -> int:
    """How many sums of sketches the bases take."""
    return (
        2 * (_range(config)[1] + 1)
        if spec.adapter.kind == "lora-sb" and config.adapter.subspace in ("gradient-raw", "private")
        else 0
    )


def _range(config: Config) -> tuple[int, int]:
    """(columns beyond the rank, power iterations) of the range finder. Every column adds noise and every pass a
    release, so a private one has neither."""
    oversample, passes = config.adapter.subspace_oversample, config.adapter.subspace_passes
    if config.adapter.subspace == "private":
        return 0, 0
    return OVERSAMPLE if oversample is None else oversample, PASSES if passes is None else passes


def _mean(answers: Sequence[Answer]) -> dict[str, Tensor]:
    """sum p_i of the answers, in fp64 in the order of the clients; one client's answer at a time."""
    total: dict[str, Tensor] = {}
    whole = sum(answer.weight for answer in answers)
    for answer in answers:
        for name, tensor in answer.tensors().items():
            part = tensor.double() * (answer.weight / whole)
            total[name] = total[name].add_(part) if name in total else part
    return total


def _examples(config: Config) -> int:
    """Of each client, without privacy."""
    return config.adapter.subspace_examples or EXAMPLES


def _signed(config: Config, spec: Spec, clients: Sequence[str], ask: Ask) -> Start:
    """The authors' choice: sign(sum p_i G_i), which is AdamW's first step, and its first singular vectors."""
    tensors: dict[str, Tensor] = {}
    up, kept, whole = 0, 0.0, 0.0
    for group in grouped(spec.layers):
        answers = ask(DenseGradient(tuple(layer.name for layer in group), _examples(config)), clients)
        up += sum(answer.up for answer in answers)
        mean = _mean(answers)
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


class _Sketches:
    """Asks for sketches of the clients' mean gradient, and counts what moves. `sent`: whether asking costs bytes."""

    def __init__(self, config: Config, clients: Sequence[str], ask: Ask, sent: bool):
        self.config, self.clients, self.ask, self.sent = config, clients, ask, sent
        self.up = self.down = 0

    def columns(self, basis: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """G times the bases (n x q). Without any, the clients draw them from the seed, and no bytes go down."""
        packet = pack(basis) if basis is not None else None
        return self._summed(RangeSketch(packet, _examples(self.config), _range(self.config)[0]))

    def rows(self, basis: dict[str, Tensor]) -> dict[str, Tensor]:
        """The bases' (m x q) transposes times G."""
        return self._summed(RowSketch(pack(basis), _examples(self.config)))

    def _summed(self, question: RangeSketch | RowSketch) -> dict[str, Tensor]:
        answers = self.ask(question, self.clients)
        if self.sent:
            self.up += sum(answer.up for answer in answers)
            self.down += (question.sides.nbytes * len(self.clients) if question.sides is not None else 0) + sum(
                answer.down for answer in answers
            )
        return _mean(answers)


def _bases(sketches: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.linalg.qr(sketch).Q for name, sketch in sketches.items()}


def _sketched(config: Config, spec: Spec, clients: Sequence[str], ask: Ask, source: str) -> Start:
    sketches = _Sketches(config, clients, ask, sent=source != "public")
    columns = sketches.columns(None)
    Q = _bases(columns)
    for _ in range(_range(config)[1]):
        rows = sketches.rows(Q)
        Q = _bases(sketches.columns(_bases({name: z.T for name, z in rows.items()})))
    tensors, kept, whole = {}, 0.0, 0.0
    rows = sketches.rows(Q)
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
    # Of a private gradient most of the energy is noise.
    energy = None if source == "private" else kept / whole if whole else 0.0
    return Start(tensors, source, sketches.up, sketches.down, energy)
