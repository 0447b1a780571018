"""No guarantee: every update comes to the coordinator as it is, one at a time. What the other channels change is
here."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedray import seeding
from fedray.errors import ClientError, FedrayError, LostError, PrivacyError, RoundError
from fedray.federation.channels.base import (
    Admission,
    Answer,
    Carriage,
    Carrier,
    Channel,
    Context,
    Intake,
    Noise,
    Sealer,
    Tensors,
    Training,
)
from fedray.federation.channels.orders import OneRun
from fedray.federation.coding import bytes_of, feeds_back
from fedray.federation.failures import Needed, needed_of
from fedray.federation.messages import NO_ORDERS, PUBLIC, Answered, Failure, Orders, Outcome, Trained
from fedray.federation.questions import (
    DenseGradient,
    ForgetKeys,
    MethodQuestion,
    Question,
    Sketch,
    StartFromWeights,
    ValueQuestion,
)
from fedray.federation.screening import Expected, flaw_of_form, flaw_of_kept, flaw_of_report, flaw_of_values, left_out
from fedray.federation.wire import Message, Packet, PacketView, pack, unpack
from fedray.methods import Method, Spec, Update, View
from fedray.methods.shapes import Shapes
from fedray.privacy.keys import KeyStore

if TYPE_CHECKING:
    from fedray.config.sections import Config
    from fedray.federation.record import RoundRecord
    from fedray.privacy.private import Private, SketchNoise


#: Which privacy keys belong to which unit.
UNIT_OPTIONS = {"count_noise": "example", "subspace_fraction": "example", "adaptive_clip": "client"}


def check(config: Config) -> None:
    """Raises ValueError for settings of a guarantee that would protect nothing, since none is asked for."""
    privacy = config.privacy
    given = [
        name for name in ("delta", "clip", "lifetime_epsilon", *UNIT_OPTIONS) if getattr(privacy, name) is not None
    ]
    usual = {"unit": "example", "trust": "coordinator"}
    given += [name for name, value in usual.items() if getattr(privacy, name) != value]
    if given:
        name = given[0]
        raise ValueError(
            f"privacy.{name} without privacy.epsilon would protect nothing: give privacy.epsilon (or privacy.noise)"
        )
    if config.adapter.subspace == "private":
        raise ValueError("adapter.subspace private needs privacy.epsilon, or privacy.noise")


#: What it does to vectors, and what the coordinator sees of updates; `secure` has others.
HOW, SEES = "", "sees each client's clipped update"


# --- the server's half -------------------------------------------------------------------------------------------


def carriage(config: Config) -> Carriage:
    """The wire's own (`wire.py`, `coding.py`)."""
    return Carriage(4, partial(bytes_of, config.federation.wire))


class AsIs:
    """The carrier that shows each vector: one client's at a time is in memory."""

    def __init__(self, context: Context):
        self.context = context

    def announce(self, round: int, message: Message) -> None:
        """It needs no word of it."""

    def agree(self, cohort: Sequence[str]) -> tuple[Any, list[Failure]]:
        return None, []

    def seal(
        self, agreed: Any, orders: Mapping[str, Orders], weight: Callable[[str], float | None]
    ) -> dict[str, Orders]:
        return dict(orders)

    def collect(
        self, agreed: Any, round: int, outcomes: Sequence[Outcome], weight: Callable[[Outcome], float], mean: bool
    ) -> Intake:
        # Bytes are counted before the packets are read, one at a time; they were held against them when judged.
        said = [o.report.nbytes for o in outcomes if isinstance(o.report, Trained)]

        def updates() -> Iterator[Update]:
            for outcome in outcomes:
                yield Update(outcome.client, weight(outcome), PacketView(self.context.pool.fetch(outcome.update)))

        return Intake(updates(), sum(said))

    def flaw(self, packet: Any, shapes: Shapes, look: Callable[[Packet], str | None]) -> str | None:
        return flaw_of_form(packet, np.float32, shapes) or flaw_of_values(packet) or look(packet)

    def ask(self, question: Question, clients: Sequence[str], channel: Channel) -> list[Answer]:
        answers = []
        for outcome in self.context.pool.ask(question, clients, {}, None):
            channel.note([outcome])
            report = raised(outcome)
            tensors = partial(self._fetched, outcome)
            answers.append(Answer(report.client, channel.answer_weight(report), tensors, report.nbytes))
        return answers

    def _fetched(self, outcome: Outcome) -> dict[str, Tensor]:
        """An answer's tensors, moved to the coordinator when they are asked for. Raises ClientError for what is
        none."""
        packet = self.context.pool.fetch(outcome.update)
        if flaw := flaw_of_form(packet, np.float32) or flaw_of_values(packet):
            raise start_error(Failure(outcome.client, flaw, ""))
        return unpack(packet)

    def farewell(self, clients: Sequence[str]) -> Question | None:
        return None


def raised(outcome: Outcome) -> Answered:
    """What came with an answer before round 1. Raises ClientError for a failure: the start needs every client."""
    report = outcome.report
    if isinstance(report, Failure):
        raise start_error(report)
    assert isinstance(report, Answered)
    return report


def start_error(failure: Failure) -> ClientError:
    """A failure before round 1, as a person reads it."""
    return ClientError(failure.client, f"{failure.cause} (before round 1)", failure.details)


class Plain:
    """The channel without a guarantee, and what the others share."""

    tells = True  # whether clients say how many examples they have, and their loss

    def __init__(self, context: Context, carrier: Carrier):
        self.context, self.config, self.carrier = context, context.config, carrier

    # --- before round 1 and after the last ---

    def mark(self) -> dict[str, Any] | None:
        return None

    def resume(self, records: Sequence[Mapping[str, Any]], mark: dict[str, Any] | None) -> None:
        """Nothing of it is in the records."""

    def begin(self) -> None:
        """Nothing is needed."""

    def begun(self) -> dict[str, Any]:
        return {}

    def ask(self, question: Question, clients: Sequence[str]) -> list[Answer]:
        return self.carrier.ask(question, clients, self)

    def end(self) -> None:
        if (question := self.carrier.farewell(self.context.clients)) is not None:
            self.context.pool.ask(question, self.context.clients, {}, None)

    # --- a round ---

    def announce(self, round: int, message: Message) -> None:
        self.carrier.announce(round, message)

    def admit(self, round: int, message: Message) -> Admission | None:
        return self.with_agreement(Admission(self.drawn(round, self.context.clients)))

    def drawn(self, round: int, clients: Sequence[str]) -> list[str]:
        """The cohort out of those clients, in their order: a function of the seed and the round."""
        size = min(self.config.federation.cohort or len(clients), len(clients))
        generator = seeding.generator(self.config.seed, "cohort", round)
        order = torch.randperm(len(clients), generator=generator)[:size]
        return [clients[i] for i in sorted(order.tolist())]

    def with_agreement(self, admission: Admission) -> Admission:
        """The admission with what the carrier has agreed with its cohort."""
        agreed, failed = self.carrier.agree(admission.cohort)
        return replace(admission, agreed=agreed, failed=failed)

    def needed(self, cohort: int) -> Needed:
        return needed_of(cohort, self.config.federation.quorum)

    def receivers(self, admission: Admission) -> tuple[Sequence[str], float]:
        return admission.cohort, 1.0

    def train(self, call: Training, clients: Sequence[str]) -> list[Outcome]:
        return self.train_by(call, dict.fromkeys(clients, NO_ORDERS))

    def train_by(self, call: Training, orders: Mapping[str, Orders]) -> list[Outcome]:
        """The outcomes of clients that were told to train by these orders."""
        orders = self.carrier.seal(call.admission.agreed, orders, self.sealed_weight)
        deadline = self.config.federation.deadline
        outcomes = self.context.pool.train(call.handle, call.round, list(orders), call.kept, deadline, orders)
        return self.judged(call, outcomes)

    def judged(self, call: Training, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The outcomes, with the clients whose update is none, or moved too far, as failures. One update at a time is
        in memory, and is read once more when it is added."""

        def flaw(outcome: Outcome) -> str | None:
            sent = self._flaw(outcome, self.shapes(call, outcome.client), self.look)
            return sent or self._flaw_of_kept(outcome, call.expected)

        flaws = self._flaws(outcomes, flaw)
        sound = [o for o in outcomes if not o.failed and o.client not in flaws]
        flaws |= {
            o.client: f"it counts with a weight of {w:g}" for o in sound if not 0 < (w := self.weight(o)) < math.inf
        }
        for outcome in sound if call.norms.on else ():
            unmoved = call.expected.unmoved_of(outcome.client)
            call.norms.add(outcome.client, self.context.pool.fetch(outcome.update), unmoved)
        return left_out(outcomes, call.norms.flaws() | flaws)

    def shapes(self, call: Training, client: str) -> Shapes:
        """What a client is to send."""
        return call.expected.shapes(client)

    def look(self, packet: Packet) -> str | None:
        """What is wrong with an update of the right shapes, for the guarantee's sake."""
        return None

    def answers(self, call: Training, question: Tensors, outcomes: Sequence[Outcome]) -> list[Outcome]:
        def flaw(outcome: Outcome) -> str | None:
            return self._flaw(outcome, call.expected.answer_shapes(outcome.client, question), lambda packet: None)

        return left_out(outcomes, self._flaws(outcomes, flaw))

    @staticmethod
    def _flaws(outcomes: Sequence[Outcome], flaw: Callable[[Outcome], str | None]) -> dict[str, str]:
        """What is wrong with what came, by client; what is lost by now is wrong, too."""
        flaws = {}
        for outcome in (o for o in outcomes if not o.failed):
            try:
                found = flaw(outcome)
            except LostError as error:
                found = str(error)
            if found is not None:
                flaws[outcome.client] = found
        return flaws

    def _flaw(self, outcome: Outcome, shapes: Shapes, look: Callable[[Packet], str | None]) -> str | None:
        packet = self.context.pool.fetch(outcome.update)
        return self.carrier.flaw(packet, shapes, look) or flaw_of_report(outcome.report, packet, self.tells)

    def _flaw_of_kept(self, outcome: Outcome, expected: Expected) -> str | None:
        """What is wrong with what stays with a client, where anything stays beyond the round."""
        factors, section = expected.kept(outcome.client), self.config.federation
        rest = expected.shapes(outcome.client) if feeds_back(section, self.context.method) else {}
        if not factors and not rest and not section.keep_optimizer:
            return None
        kept = None if outcome.kept is None else self.context.pool.fetch(outcome.kept)
        return flaw_of_kept(kept, factors, expected.trained, rest)

    def weight(self, outcome: Outcome) -> float:
        """What a client's update counts with."""
        assert isinstance(outcome.report, Trained)
        return self.context.weight_of(float(outcome.report.examples))

    def sealed_weight(self, client: str) -> float | None:
        return None if self.config.by_examples else 1.0

    def answer_weight(self, report: Answered) -> float:
        return self.context.weight_of(float(report.examples)) if report.examples else 1.0

    def collect(self, call: Training, outcomes: Sequence[Outcome]) -> Intake:
        return self.carrier.collect(call.admission.agreed, call.round, outcomes, self.weight, mean=True)

    def annotate(self, record: RoundRecord, message: Message, last: bool) -> RoundRecord:
        return record

    # --- failures and keys ---

    def note(self, outcomes: Sequence[Outcome]) -> list[str]:
        return []

    def reason(self, failure: Failure) -> str:
        return f"client '{failure.client}': {failure.cause}"

    def error(self, round: int, decision: str, failures: Sequence[Failure]) -> FedrayError:
        if len(failures) == 1 and self.config.federation.quorum == 1.0:
            cause = f"{failures[0].cause} (round {round + 1})"
            return ClientError(failures[0].client, cause, failures[0].details)
        return RoundError(f"round {round + 1}: {decision}", "\n".join(f.details for f in failures))


# --- the client's half -------------------------------------------------------------------------------------------


class Packed:
    """Vectors as they are."""

    def __init__(self) -> None:
        self.one_run = OneRun()

    def expect(self, client: str, inputs: Callable[[], str], orders: Orders) -> None:
        """Whatever it is."""

    def members(self, client: str, orders: Orders) -> tuple[str, ...]:
        return ()

    @property
    def step(self) -> float:
        raise PrivacyError("numbers that travel as they are have no step that noise could be a multiple of")

    def seal(
        self, client: str, tensors: Tensors, orders: Orders, asked: Question | int, noise: Noise | None = None
    ) -> Packet:
        assert noise is None, "whole numbers are added in a ring"
        return pack(tensors)

    def rounding(self, numbers: int) -> float:
        return 0.0

    def answers(self, question: Question) -> bool:
        return False


class PlainSide:
    """A client that keeps nothing to itself."""

    logs_clients = True

    def __init__(self, trainer: Any, method: Method, spec: Spec, keys: KeyStore, sealer: Sealer):
        self.trainer, self.method, self.spec, self.keys, self.sealer = trainer, method, spec, keys, sealer
        self.config: Config = trainer.config

    def protect(self, client: str, round: int, inputs: Callable[[], str], orders: Orders) -> Private | None:
        self.sealer.expect(client, inputs, orders)
        return None

    def trained(self, client: str, view: View, steps: Callable[[], Any]) -> Any:
        """What the local steps give."""
        return steps()

    def changed(self, client: str, round: int, view: View, trained: Tensors, orders: Orders) -> Tensors:
        """What is sent of what was trained."""
        return self.method.upload(self.spec, client, dict(trained), round)

    def send(self, client: str, round: int, view: View, trained: Tensors, orders: Orders) -> Packet:
        return self.sealer.seal(client, self.changed(client, round, view, trained, orders), orders, round)

    def report(self, client: str, result: Any, nbytes: int, private: Private | None) -> Trained:
        return Trained(
            client, result.examples, result.loss, result.base_lost, result.seconds, nbytes, shortened=result.shortened
        )

    def respond(self, client: str, question: Question, kept: Packet | None) -> tuple[Packet | None, Answered]:
        self.check_question(client, question)
        if isinstance(question, ValueQuestion):
            return None, Answered(client, value=question.value(self, client))
        tensors, orders = question.answer(self, client, kept), question.orders.get(client, NO_ORDERS)
        packet = self.sealer.seal(client, tensors, orders, question)
        return packet, self.answered(client, question, packet)

    def answered(self, client: str, question: Question, packet: Packet) -> Answered:
        """What is said beside an answer."""
        tells = question.tells_size and client != PUBLIC
        return Answered(client, len(self.trainer.examples("train", client)) if tells else 0, packet.nbytes)

    def check_question(self, client: str, question: Question) -> None:
        """Raises PrivacyError for a question that this run does not have: the coordinator may not bring it up."""
        if not isinstance(question, _ASKED) and not self.sealer.answers(question):
            raise PrivacyError(
                f"the coordinator asked for {question.what}, which this run does not have: it sends nothing"
            )

    def plain_examples(self, client: str, count: int) -> Sequence[Any]:
        return self.trainer.gradient_examples(client if client != PUBLIC else None, count)

    def sketched(self, question: Any, client: str) -> tuple[Sequence[Any], Mapping[str, Tensor], SketchNoise | None]:
        return self.plain_examples(client, question.examples), question.given(self), None

    def forget(self, client: str, orders: Orders) -> None:
        self.keys.forget(orders.run, client)

    def check_evaluation(self, part: str) -> None:
        """All metrics may leave."""

    def failure(self, client: str, error: Exception) -> Failure:
        return Failure(client, cause_of(error), traceback.format_exc())


#: What a run without a guarantee may ask.
_ASKED = (StartFromWeights, DenseGradient, Sketch, MethodQuestion, ForgetKeys)


def refusal(question: Question) -> PrivacyError:
    """For a question that the client's own config does not have."""
    return PrivacyError(f"the coordinator asked for {question.what}, which this run keeps private: it sends nothing")


def cause_of(error: Exception) -> str:
    """An error in one line: its own words where they are a sentence for a person, else with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (FloatingPointError, ValueError)) and text else f"{type(error).__name__}: {text}"
