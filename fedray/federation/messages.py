"""What workers and the coordinator say to each other beside tensors. Apart from both: the coordinator imports no
model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedray.privacy.secure_sum import Advert, Session

#: The client's name under which a worker serves the public data set.
PUBLIC = "(public data)"

#: Characters of a failure's cause, and of its details, that are kept.
MOST_WORDS, MOST_DETAILS = 2_000, 20_000


@dataclass(frozen=True)
class SumStep:
    """What one client learns at a step of a secure sum: the run that its keys are filed under and the session's `name`;
    then the session itself, its neighbours' keys and what everyone signs with (`roster`), who shared or sent (`listed`,
    as bits in the members' order), and who signed that and what others encrypted to this client."""

    run: str
    name: str
    session: Session | None = None
    adverts: Mapping[str, Advert] = field(default_factory=dict)
    roster: Mapping[str, bytes] = field(default_factory=dict)
    listed: bytes = b""
    signatures: Mapping[str, bytes] = field(default_factory=dict)
    sealed: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Orders:
    """How one client makes private what it sends: the run and the identity of the key that its noise must come from
    (empty: whichever it has), the Poisson rate, the noise multiplier, the clip, and the divisor of a sum.

    `sum`: the secure sum that it is to be masked for, after it is multiplied by `weight` (None: by its number of
    examples).
    """

    run: str = ""
    key: str = ""
    rate: float = 1.0
    noise: float = 1.0
    clip: float = 1.0
    expected: float = 1.0
    sum: SumStep | None = None
    weight: float | None = None

    def shape(self) -> tuple[str, ...]:
        """What of the orders shapes an answer: other orders must not meet the same noise."""
        numbers = (self.rate, self.noise, self.clip, self.expected)
        return (*(float(n).hex() for n in numbers), "" if self.weight is None else float(self.weight).hex())


#: Of a client that makes nothing private.
NO_ORDERS = Orders()


@dataclass(frozen=True)
class Trained:
    """What a client's round gives beside its update; no data, only sizes and means. In a private run neither:
    `examples` is 0, `train_loss` None, `seconds` 0. `base_lost`: what the base's dtype could not hold of the base
    update (Frobenius norm). `nbytes`: of the update. `key_is_fixed`: whether its noise key is one that a test has
    fixed. `lost`, `meant`: squared norms of what rounding took from the update on its way, and of the whole.
    `shortened`: rows that `data.max_length` cut, 0 in a private run."""

    client: str
    examples: int
    train_loss: float | None
    base_lost: float
    seconds: float
    nbytes: int
    key_is_fixed: bool = False
    lost: float = 0.0
    meant: float = 0.0
    shortened: int = 0


@dataclass(frozen=True)
class Answered:
    """What comes with the answer to a question outside local training. `examples`: how many the client holds, where it
    says so, else 0. `key`: identity of its noise key. `value`: an answer that is no tensors."""

    client: str
    examples: int = 0
    nbytes: int = 0
    key: str = ""
    key_is_fixed: bool = False
    value: Any = None


@dataclass(frozen=True)
class Failure:
    """A client's error as a value, so that it reaches the person as a sentence and not as a remote traceback. `key`:
    the identity of the noise key that the client has now, where it is not the one it was to use."""

    client: str
    cause: str
    details: str
    key: str = ""


@dataclass(frozen=True)
class Outcome:
    """How one client's round, or its answer, ended: `update` and `kept` are handles for `Pool.fetch` and the next
    round, or None. `kept`: what stays with the client (`kept.py`)."""

    client: str
    report: Trained | Answered | Failure
    update: Any = None
    kept: Any = None

    def __post_init__(self) -> None:
        """Who it is from is known, and is not what it says; a failure's words are words."""
        report = self.report
        if isinstance(report, Failure):
            details = _word(report.details)[-MOST_DETAILS:]  # the end of a traceback says most
            report = Failure(self.client, _word(report.cause)[:MOST_WORDS], details, _word(report.key)[:MOST_WORDS])
        elif isinstance(report, (Trained, Answered)) and report.client != self.client:
            report = replace(report, client=self.client)
        object.__setattr__(self, "report", report)

    @property
    def failed(self) -> bool:
        return isinstance(self.report, Failure)


def _word(said: Any) -> str:
    """Words that may be written and shown anywhere: control characters, but for a traceback's lines, are spaces."""
    if not isinstance(said, str):
        return "(no words)"
    sound = said.encode("utf-8", "replace").decode()
    return "".join(c if c == "\n" or c.isprintable() else " " for c in sound)


def failures(outcomes: list[Outcome]) -> list[Failure]:
    """The failures among the outcomes, in order."""
    return [o.report for o in outcomes if isinstance(o.report, Failure)]
