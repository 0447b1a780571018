"""What a client is asked for outside its local training: a class a question, with the client's answer to it.

Each answer follows from the question, the client's data, its key and what it kept. Questions that one guarantee alone
has stand in its file under `channels/`. A question travels to all clients as one object; `orders` say, by client, how
its answer is made private.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from fedray.errors import PrivacyError
from fedray.federation.kept import factors_kept
from fedray.federation.messages import Orders
from fedray.federation.wire import Packet, unpack
from fedray.privacy.keys import words

if TYPE_CHECKING:
    from fedray.federation.channels.base import ClientSide


@dataclass(frozen=True)
class Question:
    """Base of all. `name`: in logs, and part of what a draw of noise is for. `what`: for a person. `tells_size`:
    whether the number of the client's examples comes with the answer, in a run that keeps it no secret."""

    name: ClassVar[str]
    what: ClassVar[str]
    tells_size: ClassVar[bool] = True
    #: Whether all clients get the same of it.
    common: ClassVar[bool] = True

    orders: Mapping[str, Orders] = field(default_factory=dict, kw_only=True)

    def of(self, client: str) -> Question:
        """What one client gets of it."""
        return self

    def answer(self, side: ClientSide, client: str, kept: Packet | None) -> Mapping[str, Tensor]:
        """Named tensors, which travel as an update does. `kept`: what the client kept from its round."""
        raise NotImplementedError


@dataclass(frozen=True)
class ValueQuestion(Question):
    """A question whose answer is no tensors: it travels as it is."""

    def value(self, side: ClientSide, client: str) -> Any:
        """The answer."""
        raise NotImplementedError


@dataclass(frozen=True)
class StartFromWeights(Question):
    """The adapter's started factors, from the base weights alone."""

    name = "WEIGHTS"
    what = "the adapter's start from the base weights"
    tells_size = False

    def answer(self, side: ClientSide, client: str, kept: Packet | None) -> Mapping[str, Tensor]:
        return side.trainer.start_from_weights(side.spec.adapter)


@dataclass(frozen=True)
class DenseGradient(Question):
    """The gradient of a few layers' weights, m x n each, over so many of the client's examples."""

    name = "DENSE"
    what = "the gradient of a few layers"

    layers: tuple[str, ...]
    examples: int

    def answer(self, side: ClientSide, client: str, kept: Packet | None) -> Mapping[str, Tensor]:
        from fedray.training import subspace  # imports the model's libraries, which the coordinator does without

        return subspace.dense(side.trainer, side.plain_examples(client, self.examples), self.layers)


@dataclass(frozen=True)
class Sketch(Question):
    """A linear sketch of the gradient of every layer's weights: sums of clients' sketches are sketches of the sum.

    `sides`: what each layer's gradient is multiplied by; where there are none, the client draws them from the seed,
    `columns` beyond the rank. `examples`: how many of the client's it is taken over, where the orders do not say which.
    """

    along: ClassVar[Literal["m", "n"]]  # how long the sides are

    sides: Packet | None
    examples: int
    columns: int = 0

    def digest(self) -> str:
        """SHA-256 of all that the answer follows from beside the client's data and its orders. Worked out at every
        call, of the numbers themselves: whoever asks says nothing of it."""
        sides = "" if self.sides is None else self.sides.again().digest
        return hashlib.sha256(words(self.name, self.examples, self.columns, sides)).hexdigest()

    def given(self, side: ClientSide) -> Mapping[str, Tensor]:
        """The sides as tensors. Raises PrivacyError for what is none of every layer: it would fail only where there is
        an example that it is multiplied with, and that would tell of a sample that nobody may know."""
        assert self.sides is not None, f"{self.name} without sides"
        sides = unpack(self.sides)
        lengths = {layer.name: (getattr(layer, self.along), min(layer.m, layer.n)) for layer in side.spec.layers}
        fits = sides.keys() == lengths.keys() and all(
            t.ndim == 2 and t.shape[0] == lengths[name][0] and 1 <= t.shape[1] <= lengths[name][1]
            for name, t in sides.items()
        )
        if not fits:
            raise PrivacyError("the coordinator sent sides of a sketch that are none of the model's: it sends nothing")
        return sides


@dataclass(frozen=True)
class RangeSketch(Sketch):
    """G Omega (m x q) a layer."""

    name = "RANGE"
    along = "n"
    what = "a sketch of the gradient's columns"

    def given(self, side: ClientSide) -> Mapping[str, Tensor]:
        from fedray.training import subspace

        if self.sides is None:
            return subspace.gaussian_tests(side.spec.layers, self.columns, side.spec.seed)
        return super().given(side)

    def answer(self, side: ClientSide, client: str, kept: Packet | None) -> Mapping[str, Tensor]:
        from fedray.training import subspace

        examples, tests_nq, noise = side.sketched(self, client)
        return subspace.range_sketch(side.trainer, examples, tests_nq, noise)


@dataclass(frozen=True)
class RowSketch(Sketch):
    """Q^T G (q x n) a layer."""

    name = "ROWS"
    along = "m"
    what = "a sketch of the gradient's rows"

    def answer(self, side: ClientSide, client: str, kept: Packet | None) -> Mapping[str, Tensor]:
        from fedray.training import subspace

        examples, bases_mq, noise = side.sketched(self, client)
        return subspace.row_sketch(side.trainer, examples, bases_mq, noise)


@dataclass(frozen=True)
class MethodQuestion(Question):
    """The method's own second message to a cohort, answered from the factors that the client trained in this round."""

    name = "ANSWER"
    what = "an answer to the method's question"

    tensors: Packet

    def answer(self, side: ClientSide, client: str, kept: Packet | None) -> Mapping[str, Tensor]:
        assert kept is not None, "a method that asks has its clients keep their factors"
        return side.method.answer(side.spec, unpack(self.tensors), factors_kept(unpack(kept)))


@dataclass(frozen=True)
class ForgetKeys(Question):
    """The run is over: the client removes its noise key."""

    name = "FORGET"
    what = "nothing: it removes its keys"
    tells_size = False

    def answer(self, side: ClientSide, client: str, kept: Packet | None) -> Mapping[str, Tensor]:
        side.forget(client, self.orders[client])
        return {}


def forget_keys(run: str, clients: Sequence[str]) -> ForgetKeys:
    """The question for all clients of a run."""
    return ForgetKeys(orders=dict.fromkeys(clients, Orders(run)))
