"""The protocols of a round: what a channel, its carrier and the client's side of both do. `plain` is the simplest of
each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from fedray.federation.failures import Needed
from fedray.federation.messages import Answered, Failure, Orders, Outcome, Trained
from fedray.federation.questions import Question
from fedray.federation.screening import Expected, Norms
from fedray.federation.wire import Message, Packet
from fedray.methods import Method, Spec, Update, View
from fedray.methods.shapes import Shapes
from fedray.privacy.keys import KeyStore

if TYPE_CHECKING:
    from fedray.config.sections import Config
    from fedray.errors import FedrayError
    from fedray.federation.buffered import Arrivals
    from fedray.federation.channels.orders import OneRun
    from fedray.federation.record import RoundRecord
    from fedray.privacy.private import Private, SketchNoise

Tensors = Mapping[str, Tensor]
#: So many whole numbers (int64) in steps of a ring.
Noise = Callable[[int], np.ndarray]


class Pool(Protocol):
    """The workers, whatever they are."""

    def publish(self, message: Message) -> Any:
        """Make a broadcast available to all workers; returns a handle."""

    def train(
        self,
        handle: Any,
        round: int,
        clients: Sequence[str],
        kept: Mapping[str, Any],
        deadline: float | None,
        orders: Mapping[str, Orders],
    ) -> list[Outcome]:
        """Run the clients' round; outcomes in the order of `clients`, with failures and late clients among them."""

    def ask(
        self, question: Question, clients: Sequence[str], kept: Mapping[str, Any], deadline: float | None
    ) -> list[Outcome]:
        """Put a question to the clients; answers are the outcomes' `update`."""

    def stream(self) -> Arrivals:
        """Training that goes on from round to round (`federation/buffered.py`)."""

    def fetch(self, update: Any) -> Packet:
        """One client's update, when it is its turn to be added. Raises LostError where it is gone."""

    def evaluate(self, handle: Any, part: str, client: str | None, kept: Any = None) -> tuple[list[dict], float]:
        """Statistics of all examples in a fixed order, and what the base's dtype lost."""


@dataclass(frozen=True)
class Context:
    """What a channel knows of its run. `folder`: of the checkpoints. `clients`: all, in the run's order."""

    config: Config
    clients: tuple[str, ...]
    pool: Pool
    method: Method
    folder: Path

    def ask(self, question: Question, clients: Sequence[str]) -> list[Outcome]:
        """Within the round's deadline."""
        return self.pool.ask(question, clients, {}, self.config.federation.deadline)

    def weight_of(self, examples: float) -> float:
        """What a client of so many examples counts with."""
        return examples if self.config.by_examples else 1.0


@dataclass(frozen=True)
class Admission:
    """Who takes part in a round. `left_out`: client and reason of those who may not. `failed`: who of the cohort could
    not even begin. `agreed`: what the carrier has agreed with the cohort."""

    cohort: list[str]
    left_out: list[dict[str, str]] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    agreed: Any = None


@dataclass(frozen=True)
class Training:
    """A round's call for training, the same for every attempt. `round` counts from 0; `kept`: by client; `expected`:
    what is to come of it; `norms`: of what came so far."""

    round: int
    message: Message
    handle: Any
    kept: Mapping[str, Any]
    admission: Admission
    expected: Expected
    norms: Norms


@dataclass(frozen=True)
class Answer:
    """One client's answer as the start takes it: what it counts with, a call that fetches it (one client's at a time is
    in memory), and the bytes that it moved."""

    client: str
    weight: float
    tensors: Callable[[], Mapping[str, Tensor]]
    up: int
    down: int = 0


@dataclass(frozen=True)
class Intake:
    """What of a round's updates reaches the method. `up`, `down`: bytes.

    `updates` may be read once, in the order of the clients; where they are one sum, `rounding` is a bound of what fixed
    point took from it (Frobenius norm), and `lost` that and fp32's rounding, relative to the mean that is sent.
    """

    updates: Iterable[Update]
    up: int
    down: int = 0
    rounding: float | None = None
    lost: float | None = None


class Carrier(Protocol):
    """How vectors travel from clients to the server."""

    def announce(self, round: int, message: Message) -> None:
        """Which round (from 0), from which broadcast, the next agreement is for."""

    def agree(self, cohort: Sequence[str]) -> tuple[Any, list[Failure]]:
        """Before the clients work: what was agreed with them, and who could not."""

    def seal(
        self, agreed: Any, orders: Mapping[str, Orders], weight: Callable[[str], float | None]
    ) -> dict[str, Orders]:
        """The orders for vectors that travel so. `weight`: what a client's vector counts with; None: only it knows."""

    def flaw(self, packet: Any, shapes: Shapes, look: Callable[[Packet], str | None]) -> str | None:
        """Why a vector is not what a client was to send; None where it is, as far as the carrier sees. `look`: at what
        it shows."""

    def collect(
        self, agreed: Any, round: int, outcomes: Sequence[Outcome], weight: Callable[[Outcome], float], mean: bool
    ) -> Intake:
        """The updates of those who reported. `mean`: whether what comes as one is to be their mean, or their sum."""

    def ask(self, question: Question, clients: Sequence[str], channel: Channel) -> list[Answer]:
        """Each client's answer, or one for their mean. Raises ClientError when a client fails."""

    def farewell(self, clients: Sequence[str]) -> Question | None:
        """The question that ends a run whose guarantee has none of its own."""


class Channel(Protocol):
    """The server's half of a guarantee. Rounds count from 0."""

    def mark(self) -> dict[str, Any] | None:
        """What a run that goes on from here must find again, for the checkpoint."""

    def resume(self, records: Sequence[Mapping[str, Any]], mark: dict[str, Any] | None) -> None:
        """Go on after these records. Raises ConfigError where what was marked is not there."""

    def begin(self) -> None:
        """Before anything is asked: keys, counts, plans. A second call changes nothing."""

    def announce(self, round: int, message: Message) -> None:
        """The round that comes next, before its cohort is admitted."""

    def admit(self, round: int, message: Message) -> Admission | None:
        """The round's cohort; None when no client may take part in another round."""

    def needed(self, cohort: int) -> Needed:
        """How many of a cohort must report."""

    def receivers(self, admission: Admission) -> tuple[Sequence[str], float]:
        """Of which clients the bytes of a broadcast are counted, and what share of them receives it."""

    def train(self, call: Training, clients: Sequence[str]) -> list[Outcome]:
        """One attempt: an outcome for each client, charged before anything of it is released, and judged by itself."""

    def ask(self, question: Question, clients: Sequence[str]) -> list[Answer]:
        """Answers before round 1. Raises ClientError when a client fails."""

    def answers(self, call: Training, question: Tensors, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The answers to the method's second message, those that are none as failures."""

    def collect(self, call: Training, outcomes: Sequence[Outcome]) -> Intake:
        """The updates that the method sees."""

    def annotate(self, record: RoundRecord, message: Message, last: bool) -> RoundRecord:
        """What the guarantee says of a round, and withholds. `message`: of the next round, which there is none of if
        `last`."""

    def begun(self) -> dict[str, Any]:
        """What record 0 says of the guarantee."""

    def sealed_weight(self, client: str) -> float | None:
        """What a client multiplies a vector by that goes into a sum; None: by its own number of examples, which is no
        secret."""

    def answer_weight(self, report: Answered) -> float:
        """What an answer before round 1 counts with."""

    def reason(self, failure: Failure) -> str:
        """A failure as a person may read it."""

    def error(self, round: int, decision: str, failures: Sequence[Failure]) -> FedrayError:
        """What to raise when a round is given up."""

    def note(self, outcomes: Sequence[Outcome]) -> list[str]:
        """Look at what clients say of their keys; who has another key now."""

    def end(self) -> None:
        """The run is over."""


class Sealer(Protocol):
    """The client's half of a carrier. `one_run`: the run that the client is in."""

    one_run: OneRun

    def expect(self, client: str, inputs: Callable[[], str], orders: Orders) -> None:
        """Before a client trains: what it trains from. `inputs`: gives a digest of it."""

    def members(self, client: str, orders: Orders) -> tuple[str, ...]:
        """The clients of the sum that the orders are for; none where there is no sum."""

    @property
    def step(self) -> float:
        """What numbers are rounded to a multiple of. Raises PrivacyError where they are not."""

    def seal(
        self, client: str, tensors: Tensors, orders: Orders, asked: Question | int, noise: Noise | None = None
    ) -> Packet:
        """The vector as it travels. `asked`: the round that it is of (from 0), or the question that it answers.
        `noise`: to be added, in steps. Raises PrivacyError for orders that would show it where the client's own config
        hides it."""

    def rounding(self, numbers: int) -> float:
        """How far at most (Frobenius norm) so many numbers are moved by how they travel."""

    def answers(self, question: Question) -> bool:
        """Whether the question is one of the carrier's own."""


class ClientSide(Protocol):
    """The client's half of a guarantee, at its worker. Raises PrivacyError where it is asked to break it."""

    trainer: Any
    method: Method
    spec: Spec
    keys: KeyStore
    sealer: Sealer
    #: Whether logs may say which client was asked: not where that is a secret sample.
    logs_clients: bool

    def protect(self, client: str, round: int, inputs: Callable[[], str], orders: Orders) -> Private | None:
        """How the steps of a round are to be made private. `inputs`: gives a digest of all that they follow from."""

    def trained(self, client: str, view: View, steps: Callable[[], Any]) -> Any:
        """What the client's local steps give, once they are taken."""

    def send(self, client: str, round: int, view: View, trained: Tensors, orders: Orders) -> Packet:
        """What is sent of what was trained, as it travels."""

    def report(self, client: str, result: Any, nbytes: int, private: Private | None) -> Trained:
        """What is said beside it."""

    def respond(self, client: str, question: Question, kept: Packet | None) -> tuple[Packet | None, Any]:
        """The answer to a question as it travels, and what is said beside it."""

    def plain_examples(self, client: str, count: int) -> Sequence[Any]:
        """The client's examples that a gradient without noise is taken over."""

    def sketched(self, question: Any, client: str) -> tuple[Sequence[Any], Tensors, SketchNoise | None]:
        """The examples that a sketch is taken over, its sides, and its noise."""

    def forget(self, client: str, orders: Orders) -> None:
        """The run is over: its key goes."""

    def check_evaluation(self, part: str) -> None:
        """Whether metrics of these examples may leave."""

    def failure(self, client: str, error: Exception) -> Failure:
        """An error as it is told."""


@dataclass(frozen=True)
class Carriage:
    """What a channel makes of one client's numbers: bytes of each on the way up, and of an update of so many; how many
    more an update has; and bytes of keys and shares (up, down) with every vector of a sum."""

    width: int
    update: Callable[[int], int]
    more: int = 0
    beside: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Released:
    """A line of `privacy.json`: something that crosses a client's border, when, under which guarantee, and made
    where."""

    what: str
    when: str
    guarantee: str
    place: str


@dataclass(frozen=True)
class Limit:
    """A line of `privacy.json`: something that is not guaranteed, how much it matters, and where it follows from."""

    severity: str
    what: str
    place: str
