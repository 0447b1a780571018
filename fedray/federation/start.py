"""Before round 1: the factors that come neither from the seed nor from training. LoRA-SB's bases, ABBA's first pair.

| `adapter.subspace` | what the clients send, per layer                | what the bases are the SVD of      |
|--------------------|-------------------------------------------------|------------------------------------|
| weights            | nothing: a worker computes it                   | W0                                 |
| gradient           | their gradient, a few layers at a time          | sign of the weighted sum           |
| gradient-raw       | G_i Omega, then Q^T G_i: m q and q n numbers    | the weighted sum, never formed     |
| public             | nothing: a worker reads the public data set     | its gradient, never formed         |
| private            | the same two sketches, of normalised gradients of a Poisson sample, summed and noised by each client | their weighted sum |

The sketches are linear in the clients' gradients: the coordinator needs only their sums. q is the rank and `subspace_oversample`; each
of `subspace_passes` power iterations costs one more upload of either kind (Halko, Martinsson, Tropp, 2011, algorithm 4.4).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fedray import seeding
from fedray.adapters import Layer
from fedray.adapters.lora_sb import A, B
from fedray.config.sections import Config
from fedray.errors import ClientError
from fedray.federation.guard import Guard
from fedray.federation.messages import PUBLIC, Ask, Failure, Question, Report
from fedray.federation.wire import pack
from fedray.lowrank import top_svd
from fedray.methods import Spec

#: Most numbers of dense gradient that a client sends at a time; a layer that has more, as those of real models do, goes alone.
GROUP = 1 << 20
EXAMPLES, OVERSAMPLE, PASSES = 64, 16, 2

#: For each client asked, in order: its report, a call that fetches its answer (one client's at a time is in memory), and the answer's bytes.
Answers = Callable[[Question, Sequence[str]], list[tuple[Report, Callable[[], dict[str, Tensor]], int]]]


@dataclass(frozen=True)
class Start:
    """`tensors`: the started factors. Bytes are the clients', all together. `energy`: what share of the squared norm of the decomposed
    matrices the bases capture (about, for sketched gradients: their norm is estimated from the sketch); None for weights."""

    tensors: dict[str, Tensor]
    source: str
    bytes_up: int = 0
    bytes_down: int = 0
    energy: float | None = None
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """All but the tensors."""
        return {k: v for k, v in asdict(self).items() if k != "tensors"}


def start(
    config: Config, spec: Spec, clients: Sequence[str], answers: Answers, guard: Guard | None = None
) -> Start | None:
    """None when the adapter starts from the seed alone. `guard`: of a private run. Raises ClientError when a client fails: bases need
    all of them."""
    if not spec.adapter.started:
        return None
    began = time.monotonic()
    source = (config.adapter.subspace or "weights") if spec.adapter.kind == "lora-sb" else "weights"
    if source == "weights":
        found = Start(answers(Question(Ask.WEIGHTS), clients[:1])[0][1](), source)
    elif source == "gradient":
        found = _signed(config, spec, clients, answers)
    else:
        found = _sketched(config, spec, [PUBLIC] if source == "public" else clients, answers, source, guard)
    return Start(**vars(found) | {"seconds": round(time.monotonic() - began, 4)})


def numbers(config: Config, spec: Spec) -> tuple[int, int]:
    """(up, down) of one client before round 1, in numbers of 4 bytes; what is sent once with round 1 is not among them."""
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
    """(columns beyond the rank, power iterations) of the range finder. Every column adds noise and every pass a release, so a private one
    has neither."""
    oversample, passes = config.adapter.subspace_oversample, config.adapter.subspace_passes
    if config.adapter.subspace == "private":
        return 0, 0
    return OVERSAMPLE if oversample is None else oversample, PASSES if passes is None else passes


def _shares(config: Config, reports: Sequence[Report]) -> list[float]:
    weights = [float(r.examples) if config.by_examples and r.examples else 1.0 for r in reports]
    return [w / sum(weights) for w in weights]


def _total(config: Config, told) -> dict[str, Tensor]:
    """sum p_i of the answers, in fp64 in the order of the clients; one client's answer at a time."""
    total: dict[str, Tensor] = {}
    for (_, fetch, _), share in zip(told, _shares(config, [report for report, _, _ in told]), strict=True):
        for name, tensor in fetch().items():
            part = tensor.double() * share
            total[name] = total[name].add_(part) if name in total else part
    return total


def _examples(config: Config) -> int:
    """Of each client, without privacy."""
    return config.adapter.subspace_examples or EXAMPLES


def _signed(config: Config, spec: Spec, clients: Sequence[str], answers: Answers) -> Start:
    """The authors' choice: sign(sum p_i G_i), which is AdamW's first step, and its first singular vectors (METHODS.md 1.2)."""
    tensors, up, kept, whole = {}, 0, 0.0, 0.0
    for group in grouped(spec.layers):
        told = answers(
            Question(Ask.DENSE, layers=tuple(layer.name for layer in group), examples=_examples(config)), clients
        )
        up += sum(size for _, _, size in told)
        total = _total(config, told)
        for layer in group:
            signed = total[layer.name].sign().float()
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


def _sketched(
    config: Config, spec: Spec, clients: Sequence[str], answers: Answers, source: str, guard: Guard | None
) -> Start:
    oversample, passes = _range(config)
    up = down = 0

    def summed(ask: Ask, sides: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """sum p_i of the clients' sketches. Without sides the clients draw Omega from the seed, and no bytes go down."""
        nonlocal up, down
        packet = pack(sides) if sides is not None else None
        orders = guard.subspace_orders(ask, packet.digest if packet else "") if source == "private" else {}
        told = answers(Question(ask, packet, examples=_examples(config), columns=oversample, orders=orders), clients)
        if source != "public":
            up += sum(size for _, _, size in told)
            down += (packet.nbytes * len(clients) if packet else 0) + sum(report.nbytes_down for report, _, _ in told)
        return _total(config, told)

    def basis(sketches: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.linalg.qr(sketch).Q for name, sketch in sketches.items()}

    columns = summed(Ask.RANGE, None)
    Q = basis(columns)
    for _ in range(passes):
        rows = summed(Ask.ROWS, Q)
        Q = basis(summed(Ask.RANGE, basis({name: z.T for name, z in rows.items()})))
    tensors, kept, whole = {}, 0.0, 0.0
    rows = summed(Ask.ROWS, Q)
    for layer in spec.layers:
        name, z_qn = layer.name, rows[layer.name]
        U, S, Vt = torch.linalg.svd(z_qn, full_matrices=False)
        tensors |= {
            f"{name}.{B}": (Q[name] @ U[:, : layer.rank]).float().contiguous(),
            f"{name}.{A}": Vt[: layer.rank].float().contiguous(),
        }
        kept += S[: layer.rank].square().sum().item()
        # ||G||^2 is what Q sees of it, exactly, and what it does not: E ||(1 - Q Q^T) G omega||^2 over the Gaussian first sketch. Without
        # power iterations Q spans that sketch, and the second part reads 0.
        left = columns[name] - Q[name] @ (Q[name].T @ columns[name])
        whole += S.square().sum().item() + left.square().sum().item() / left.shape[1]
    # Of a private gradient most of the energy is noise.
    energy = None if source == "private" else kept / whole if whole else 0.0
    return Start(tensors, source, up, down, energy)


def raise_failure(failure: Failure) -> None:
    """As ClientError, with the moment it happened in."""
    raise ClientError(failure.client, f"{failure.cause} (before round 1)", failure.details)
