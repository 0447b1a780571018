"""What a client sends is judged by itself before it is used: whoever sends something else is left out, with the reason,
and the round goes on without it.

Judged are form (names, shapes, type, length), values (finite, no larger than training gives), what is said beside
them (the weight, the loss), and, where the config asks for it, how far the update moved. One pass over the numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fedray.federation.kept import factor_name, is_factor, is_rest, optimizer_name, rest_name
from fedray.federation.messages import Answered, Failure, Outcome, Trained
from fedray.federation.wire import Manifest, Opened, Packet, pack
from fedray.methods import Method, State
from fedray.methods.shapes import Shapes, answer_shapes, sent_shapes, trained, trained_shapes
from fedray.methods.state import Tensors, key

#: The largest norm of an update. No training comes near it, and products of four such factors (ABBA's) are still fp32.
LARGEST = 1e9

#: The largest loss, time or norm that is told: sums of such are finite.
LARGEST_SAID = 1e30

#: With fewer norms than these, their median says nothing of which is the odd one.
FEWEST_NORMS = 3

#: More than any tensor has, and few enough to be written out.
MOST_NUMBERS = 2**53
MOST_SIDES = 16

#: What an optimizer keeps of each tensor that it steps on.
OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")

_BLOCK = 1 << 20  # numbers widened at a time


class Expected:
    """What clients send of the round that starts from a state."""

    def __init__(self, method: Method, state: State):
        self._method, self._state = method, state
        self._by_rank: dict[int | None, Shapes] = {}
        self._answers: dict[int | None, Shapes] = {}

    def shapes(self, client: str) -> Shapes:
        """Of a client's upload, by name; one for all clients of a rank."""
        rank = self._state.spec.ranks.get(client)
        if rank not in self._by_rank:
            self._by_rank[rank] = sent_shapes(self._method, self._state, client)
        return self._by_rank[rank]

    def answer_shapes(self, client: str, question: Tensors) -> Shapes:
        """Of its answer to the method's second message, of which a round has one; one for all clients of a rank."""
        rank = self._state.spec.ranks.get(client)
        if rank not in self._answers:
            self._answers[rank] = answer_shapes(self._method, self._state, client, question)
        return self._answers[rank]

    def kept(self, client: str) -> Shapes:
        """Of the factors that stay with it, by the name under which they are kept."""
        spec = self._state.spec.of(client)
        keeps = self._method.keeps(spec)
        return {
            factor_name(key(layer, f)): tuple(spec.adapter.shapes(layer)[f]) for f in keeps for layer in spec.layers
        }

    @cached_property
    def trained(self) -> Shapes:
        """What each client's optimizer steps on: factors come whole, whatever a client's rank."""
        return trained_shapes(self._method, self._state, next(iter(self._state.spec.ranks), ""))

    @cached_property
    def unmoved(self) -> Tensors:
        """What a client would send that had not trained."""
        return self._unmoved(None)

    def unmoved_of(self, client: str) -> Tensors:
        """The same of one client, where clients start from different factors."""
        if self._method.personal or self._state.spec.ranks:
            return self._unmoved(client)
        return self.unmoved

    def _unmoved(self, client: str | None) -> Tensors:
        method, state = self._method, self._state
        view = method.view(state.spec, method.broadcast(state), client)
        return method.upload(state.spec, client or "", trained(view, state.heads), state.round)


class Norms:
    """How far the updates of one round have moved, over all of its attempts, in Frobenius norm over all tensors.

    None may move further than `most`, or than `ratio` times the median of the round; None: as far as it likes.
    """

    def __init__(self, most: float | None, ratio: float | None):
        self.most, self.ratio = most, ratio
        self._norms: dict[str, float] = {}

    @property
    def on(self) -> bool:
        return self.most is not None or self.ratio is not None

    def add(self, client: str, packet: Packet, unmoved: Tensors) -> None:
        """`unmoved`: what the client would have sent had it not trained."""
        start = pack(unmoved).vector
        self._norms[client] = norm(packet.vector, start)

    def flaws(self) -> dict[str, str]:
        """The clients that moved too far, and how far that was."""
        most, why = self._most()
        return {
            client: f"its update has norm {norm:.3g}, above {why}"
            for client, norm in self._norms.items()
            if norm > most
        }

    def _most(self) -> tuple[float, str]:
        bounds = [(math.inf, "")]
        if self.most is not None:
            bounds.append((self.most, f"federation.max_update_norm {self.most:g}"))
        # A median of 0 is of clients that did not move; any other would be too far.
        if self.ratio is not None and len(self._norms) >= FEWEST_NORMS and (median := self._median()) > 0:
            words = f"federation.max_update_ratio {self.ratio:g} times the cohort's median {median:.3g}"
            bounds.append((self.ratio * median, words))
        return min(bounds)

    def _median(self) -> float:
        return statistics.median_low(self._norms.values())


def norm(vector: np.ndarray, start: np.ndarray | None = None) -> float:
    """Of a vector, or of its distance from another, in fp64; not finite where a value is not."""
    total = 0.0
    for first in range(0, len(vector), _BLOCK):
        block = vector[first : first + _BLOCK].astype(np.float64)
        if start is not None:
            block -= start[first : first + _BLOCK]
        total += float(np.square(block, out=block).sum())  # a product would wake BLAS's threads
    return math.sqrt(total) if total >= 0 else math.nan


# --- one update ------------------------------------------------------------------------------------------------------


def flaw_of_form(packet: Any, dtype: type, shapes: Shapes | None = None) -> str | None:
    """Why a packet is none that may be unpacked (as `shapes`, where they are given); None where it is."""
    # A subclass (a masked array) may do other things than a vector does.
    if type(packet) not in (Packet, Opened) or type(packet.vector) is not np.ndarray or packet.vector.ndim != 1:
        return "what it sent is no vector"
    if packet.vector.dtype != np.dtype(dtype):
        return f"it sent numbers of type {packet.vector.dtype}, and {np.dtype(dtype)} is due"
    sizes = _sizes(packet.manifest)
    if sizes is None:
        return "it sent a list of tensors that is none"
    if sum(sizes) != len(packet.vector):
        return f"it sent {len(packet.vector):,} numbers of tensors that have {sum(sizes):,}"
    return None if shapes is None else _difference(packet.manifest, shapes)


def flaw_of_kept(packet: Any, factors: Shapes, trained: Shapes, rest: Shapes) -> str | None:
    """Why what a client keeps may not be kept for it. `factors`: those that it has to keep; `trained`: what an
    optimizer may have a state of: a few tensors of each one's shape, and how many steps it took; `rest`: of what it
    has to keep the rest that rounding took on the way."""
    if packet is None and not factors and not rest:
        return None
    flaw = flaw_of_form(packet, np.float32) or flaw_of_values(packet)
    if flaw is None and {n: shape for n, shape in packet.manifest if is_factor(n)} != factors:
        flaw = "it sent other factors than its own"
    if flaw is None and {n: s for n, s in packet.manifest if is_rest(n)} != {rest_name(n): s for n, s in rest.items()}:
        flaw = "it sent another rest than that of its update"
    flaw = flaw or _flaw_of_optimizer(
        {n: shape for n, shape in packet.manifest if not is_factor(n) and not is_rest(n)}, trained
    )
    return flaw and f"of what stays with it: {flaw}"


def _flaw_of_optimizer(sent: Shapes, trained: Shapes) -> str | None:
    """`sent`: by the name under which each is kept."""
    for name, shape in sent.items():
        of, _, kind = optimizer_name(name).rpartition("/")
        steps = not of and kind == "step" and shape == (1,)
        if not steps and not (kind in OPTIMIZER_STATES and trained.get(of) == shape):
            return f"it sent {_short(name)} of shape {shape}, which no optimizer has"
    return None


def _sizes(manifest: Any) -> list[int] | None:
    """How many numbers each tensor has; None for what is no manifest."""
    if not isinstance(manifest, tuple) or not all(_is_entry(entry) for entry in manifest):
        return None
    return [math.prod(shape) for _, shape in manifest]


def _is_entry(entry: Any) -> bool:
    """Whether it is a name and a shape that a tensor may have."""
    if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
        return False
    shape = entry[1]
    if not (isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)):
        return False
    # Sides of a tensor without numbers must not overflow either.
    return len(shape) <= MOST_SIDES and math.prod(max(side, 1) for side in shape) <= MOST_NUMBERS


def _difference(manifest: Manifest, shapes: Shapes) -> str | None:
    """How the tensors differ from those that are due."""
    sent = dict(manifest)
    for name, shape in shapes.items():
        if name not in sent:
            return f"its update has no {name}"
        if sent[name] != shape:
            return f"its update has {_short(name)} of shape {sent[name]}, and {shape} is due"
    if extra := next((name for name in sent if name not in shapes), None):
        return f"its update has {_short(extra)}, which is not asked for"
    if tuple(manifest) != tuple(shapes.items()):
        return "its update has its tensors in another order, or twice"
    return None


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def flaw_of_values(packet: Packet) -> str | None:
    """Why values of fp32 are none that training gives."""
    if _largest(packet.vector) * math.sqrt(max(1, len(packet.vector))) <= LARGEST:
        return None  # a tenth of the time that the norm takes, which is below this
    size = norm(packet.vector)
    if not math.isfinite(size):
        return f"it sent a value that is not finite in {_first_not_finite(packet)}: lower its learning rate"
    if size > LARGEST:
        return f"its update has norm {size:.3g}, and no training gives more than {LARGEST:g}: lower its learning rate"
    return None


def _largest(vector: np.ndarray) -> float:
    """The largest absolute value; not a number where one is none."""
    return float(max(-vector.min(), vector.max())) if len(vector) else 0.0


def _first_not_finite(packet: Packet) -> str:
    place = int(np.flatnonzero(~np.isfinite(packet.vector))[0])
    offset = 0
    for name, shape in packet.manifest:
        offset += math.prod(shape)
        if place < offset:
            return _short(name)
    raise AssertionError("the manifest is as long as the vector")


def flaw_of_report(report: Any, packet: Packet, tells: bool) -> str | None:
    """Why what is said beside an update is none of it. `tells`: whether clients of the run tell of their data."""
    if not isinstance(report, (Trained, Answered)):
        return "what it said of its work is no report"
    if type(report.nbytes) is not int or report.nbytes != packet.nbytes:
        return f"it sent {packet.nbytes:,} bytes and said something else"
    said = (report.examples, getattr(report, "shortened", 0))
    if not tells and (any(said) or getattr(report, "train_loss", None) is not None):
        return "it told of its data, which clients of this run keep to themselves"
    # Where it may tell of its loss, it tells of its size too.
    least = 1 if isinstance(report, Trained) and report.train_loss is not None else 0
    if any(type(n) is not int or not 0 <= n < 2**53 for n in said) or report.examples < least:
        return "it said that it has a number of examples that nobody has"
    if isinstance(report, Trained) and not _are_numbers(report):
        return "its loss or its times are no numbers"
    return None


def _are_numbers(report: Trained) -> bool:
    losses = [] if report.train_loss is None else [report.train_loss]
    said = (*losses, report.base_lost, report.seconds, report.lost, report.meant)
    return all(type(n) in (int, float) and abs(n) <= LARGEST_SAID for n in said) and min(report.lost, report.meant) >= 0


def left_out(outcomes: Sequence[Outcome], flaws: Mapping[str, str]) -> list[Outcome]:
    """The same outcomes, with those of flawed clients as failures."""
    return [Outcome(o.client, Failure(o.client, flaws[o.client], "")) if o.client in flaws else o for o in outcomes]
