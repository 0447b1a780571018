"""What workers and the coordinator tell each other beside tensors. Apart from both, so that the coordinator need not import a model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fedray.federation.wire import Packet


class Ask(Enum):
    """What a client is asked for outside its local training; each is a function of its inputs alone."""

    WEIGHTS = "the adapter's start from the base weights"
    DENSE = "the gradient of a few layers"
    RANGE = "a sketch of the gradient's columns"
    ROWS = "a sketch of the gradient's rows"
    ANSWER = "an answer to the method's question"


@dataclass(frozen=True)
class Question:
    """An `Ask` and what belongs to it. `examples`: how many of the client's the gradient is taken over; `columns`: of a range sketch that
    comes without a packet, beyond the rank: the client draws it from the seed."""

    ask: Ask
    packet: Packet | None = None
    layers: tuple[str, ...] = ()
    examples: int = 0
    columns: int = 0


#: The client's name under which a worker serves the public data set.
PUBLIC = "(public data)"


@dataclass(frozen=True)
class Report:
    """What a client's round gives beside its update; no data, only sizes and means."""

    client: str
    examples: int
    train_loss: float
    base_lost: float
    seconds: float
    nbytes: int = 0
    """Of the answer to a question outside local training."""


@dataclass(frozen=True)
class Failure:
    """A client's error as a value, so that it reaches the person as a sentence and not as a remote traceback."""

    client: str
    cause: str
    details: str
