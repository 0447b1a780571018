"""Uploads in fewer bytes than fp32: bf16, or int8 in steps of their own for every block of numbers.

What a client sends so is how far it has moved from what it was sent, so that rounding is relative to the change and
not to the factors. What rounding took stays with the client and is added to its next change (error feedback: Seide
et al., Interspeech 2014; Karimireddy et al., ICML 2019, arXiv 1901.09847), where the method's broadcast is the mean of
what was sent, of the same factors in every round: others give clients new factors, in which the last round's rest means
nothing. As all that a client keeps, the rest (fp32) passes through the object store and the checkpoint and is not
counted: where the line to a client is what costs, `federation.wire_feedback false` leaves it out.

| `federation.wire` | bytes a number | largest error of a number          |
|-------------------|----------------|------------------------------------|
| fp32              | 4              | none                               |
| bf16              | 2              | 2^-9 of the number                 |
| int8              | 1 + 4 / BLOCK  | 1/254 of the largest in its block  |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedray.federation.kept import rest_of, rest_tensors
from fedray.federation.messages import Orders, Outcome
from fedray.federation.pool_around import PoolAround
from fedray.federation.starts import Starts, unmoved
from fedray.federation.wire import Manifest, Message, Opened, Packet, pack, unpack
from fedray.methods import Method, Spec, View

if TYPE_CHECKING:
    from fedray.config.sections import FederationSection
    from fedray.federation.channels.base import Pool

#: Numbers that share a step.
BLOCK = 256
_MOST = 127  # of an int8's steps to either side


@dataclass(frozen=True)
class Coded:
    """A change as it travels: `codes` (uint16 of bf16, or int8), one for each number of the manifest, and for int8 the
    step of each block (fp32)."""

    manifest: Manifest
    codes: np.ndarray
    steps: np.ndarray

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.steps.nbytes)


class Code(Protocol):
    """One of the forms. `code` and `number` take and give vectors."""

    def code(self, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes and steps of fp32 numbers."""

    def number(self, codes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """The numbers (fp32) that they stand for. Raises ValueError for what is no such code."""


class BFloat16:
    """The upper half of an fp32 number, rounded to nearest even."""

    def code(self, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rounded = torch.from_numpy(vector).to(torch.bfloat16).view(torch.int16)
        return rounded.numpy().view(np.uint16), np.empty(0, np.float32)

    def number(self, codes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        if codes.dtype != np.uint16 or len(steps):
            raise ValueError("it sent other codes than bf16's")
        return (codes.astype(np.uint32) << 16).view(np.float32)


class Int8:
    """Multiples, from -127 to 127, of each block's own step."""

    def code(self, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks = _blocks(vector)
        steps = (np.abs(blocks).max(axis=1) / np.float32(_MOST)).astype(np.float32)
        codes = np.rint(blocks / np.where(steps > 0, steps, np.float32(1.0))[:, None])
        return np.clip(codes, -_MOST, _MOST).astype(np.int8).reshape(-1)[: len(vector)], steps

    def number(self, codes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        if codes.dtype != np.int8 or steps.dtype != np.float32 or len(steps) != -(-len(codes) // BLOCK):
            raise ValueError("it sent other codes than int8's")
        numbers = _blocks(codes.astype(np.float32)) * steps[:, None]
        return numbers.reshape(-1)[: len(codes)]


def _blocks(vector: np.ndarray) -> np.ndarray:
    """As rows of BLOCK numbers, the last filled up with zeros."""
    whole = np.zeros(-(-len(vector) // BLOCK) * BLOCK, vector.dtype)
    whole[: len(vector)] = vector
    return whole.reshape(-1, BLOCK)


CODES: dict[str, Code] = {"bf16": BFloat16(), "int8": Int8()}


def bytes_of(wire: str, numbers: int) -> int:
    """What an update of so many numbers is on the way up."""
    return {"fp32": 4 * numbers, "bf16": 2 * numbers, "int8": numbers + 4 * -(-numbers // BLOCK)}[wire]


def feeds_back(section: FederationSection, method: Method) -> bool:
    """Whether what rounding took comes with a client's next change: where that is of the same numbers."""
    means = method.linear and not method.alternates and (method.robust is None or method.robust.linear)
    return section.wire in CODES and section.wire_feedback and means


# --- the client's end --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """A client's update as it travels, what of it stays (to be kept), and the squared norms of what rounding took and
    of what was to be sent."""

    update: Any
    rest: Mapping[str, Tensor]
    lost: float = 0.0
    meant: float = 0.0


class Coder(Protocol):
    """How a worker's clients send their updates."""

    def encode(self, client: str, update: Packet, view: View, round: int, held: Mapping[str, Tensor]) -> Sent:
        """`update`: what was trained, as it would travel whole; `held`: what the client kept."""


class Whole:
    """As it is."""

    def encode(self, client: str, update: Packet, view: View, round: int, held: Mapping[str, Tensor]) -> Sent:
        return Sent(update, {})


class Rounded:
    """In one of the codes."""

    def __init__(self, section: FederationSection, method: Method, spec: Spec, heads: Sequence[str]):
        self._code, self._feeds_back = CODES[section.wire], feeds_back(section, method)
        self._method, self._spec, self._heads = method, spec, tuple(heads)

    def encode(self, client: str, update: Packet, view: View, round: int, held: Mapping[str, Tensor]) -> Sent:
        change = update.vector - pack(unmoved(self._method, self._spec, client, view, self._heads, round)).vector
        if earlier := rest_of(held):
            change += pack(earlier).vector
        codes, steps = self._code.code(change)
        left = change - self._code.number(codes, steps)
        rest = rest_tensors(unpack(Packet(update.manifest, left))) if self._feeds_back else {}
        return Sent(Coded(update.manifest, codes, steps), rest, _squared(left), _squared(change))


def make_coder(section: FederationSection, method: Method, spec: Spec, heads: Sequence[str]) -> Coder:
    """The worker's end of `federation.wire`. `heads`: names of the heads, which train with the factors."""
    return Rounded(section, method, spec, heads) if section.wire in CODES else Whole()


def _squared(vector: np.ndarray) -> float:
    return float(np.square(vector, dtype=np.float64).sum())


# --- the coordinator's end ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _From:
    """The handle of a client's coded update."""

    client: str
    handle: Any


class OpeningPool(PoolAround):
    """A pool whose clients send codes: whoever fetches an update gets numbers."""

    def __init__(self, pool: Pool, code: Code, starts: Starts):
        super().__init__(pool)
        self._code, self._starts = code, starts

    def publish(self, message: Message) -> Any:
        self._starts.publish(message)
        return self._pool.publish(message)

    def train(
        self,
        handle: Any,
        round: int,
        clients: Sequence[str],
        kept: Mapping[str, Any],
        deadline: float | None,
        orders: Mapping[str, Orders],
    ) -> list[Outcome]:
        outcomes = self._pool.train(handle, round, clients, kept, deadline, orders)
        return [o if o.failed else replace(o, update=_From(o.client, o.update)) for o in outcomes]

    def fetch(self, update: Any) -> Any:
        """What is no code is given as it came, and judged by who asks for it."""
        if not isinstance(update, _From):
            return self._pool.fetch(update)
        sent: Any = self._pool.fetch(update.handle)
        start = self._starts.of(update.client)
        if type(sent) is not Coded or sent.manifest != start.manifest or not _fits(sent, len(start.vector)):
            return None
        try:
            change = self._code.number(sent.codes, sent.steps)
        except ValueError:
            return None
        return Opened(start.manifest, start.vector + change, sent.nbytes)


def _fits(sent: Coded, numbers: int) -> bool:
    """Whether the arrays are vectors, of as many codes as there are numbers."""
    arrays = (sent.codes, sent.steps)
    return all(type(a) is np.ndarray and a.ndim == 1 for a in arrays) and len(sent.codes) == numbers


def opening(pool: Pool, wire: str, starts: Starts) -> Pool:
    """The coordinator's end of `federation.wire`: the pool, or one around it."""
    return OpeningPool(pool, CODES[wire], starts) if wire in CODES else pool
