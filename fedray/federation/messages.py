"""What workers and the coordinator tell each other beside tensors. Apart from both, so that the coordinator need not import a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fedray.federation.wire import Packet
from fedray.privacy.secure_sum import Advert, Session


class Ask(Enum):
    """What a client is asked for outside its local training; each is a function of its inputs alone."""

    WEIGHTS = "the adapter's start from the base weights"
    DENSE = "the gradient of a few layers"
    RANGE = "a sketch of the gradient's columns"
    ROWS = "a sketch of the gradient's rows"
    ANSWER = "an answer to the method's question"
    KEY = "the identity of its noise key"
    COUNT = "its noised number of examples"
    FORGET = "nothing: it removes its keys"
    ADVERTISE = "its public keys of a secure sum"
    SHARE = "encrypted shares of its secrets of a secure sum"
    REVEAL = "its shares of what must be taken out of a secure sum"


@dataclass(frozen=True)
class Secure:
    """What clients are told at a step of a secure sum: the run that their keys are filed under, the session, the keys of who takes part,
    to each client what others encrypted to it, and who sent a masked vector."""

    run: str
    session: Session
    adverts: Mapping[str, Advert] = field(default_factory=dict)
    sealed: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    sent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Orders:
    """How one client makes private what it sends: the run and the identity of the key that its noise must come from (empty: whichever
    it has), the Poisson rate, the noise multiplier, the clip, and the divisor of a sum. `secure`: the sum it is to be masked for, after it
    is multiplied by `weight` (None: by its number of examples)."""

    run: str
    key: str = ""
    rate: float = 1.0
    noise: float = 1.0
    clip: float = 1.0
    expected: float = 1.0
    secure: Secure | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Question:
    """An `Ask` and what belongs to it. `orders`: by client, where the answer is to be private. `examples`: how many of the client's the gradient is taken over; `columns`: of a range sketch that
    comes without a packet, beyond the rank: the client draws it from the seed."""

    ask: Ask
    packet: Packet | None = None
    layers: tuple[str, ...] = ()
    examples: int = 0
    columns: int = 0
    orders: Mapping[str, Orders] = field(default_factory=dict)
    secure: Secure | None = None


#: The client's name under which a worker serves the public data set.
PUBLIC = "(public data)"


@dataclass(frozen=True)
class Report:
    """What a client's round gives beside its update; no data, only sizes and means. In a private run no size and no mean either."""

    client: str
    examples: int
    train_loss: float | None
    base_lost: float
    seconds: float
    nbytes: int = 0
    """Of the answer to a question outside local training."""
    nbytes_down: int = 0
    """Of a secure sum's keys and shares."""
    key: str = ""
    """Identity of the client's noise key."""
    sealed: Any = None
    """The answer to a step of a secure sum."""
    key_is_fixed: bool = False
    """Whether that key is one that a test has fixed."""


@dataclass(frozen=True)
class Failure:
    """A client's error as a value, so that it reaches the person as a sentence and not as a remote traceback."""

    client: str
    cause: str
    details: str
    key: str = ""
    """Identity of the noise key that the client has now, where it is not the one it was told to use."""
