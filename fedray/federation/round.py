"""One round, as `Coordinator.run_round` does it: who takes part, training, one update out of many, evaluation, record.

Nothing here asks which guarantee holds, only what its parts answer: the server's channel does its part of each step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedray.errors import RoundError
from fedray.federation.best import out_of_patience
from fedray.federation.channels.base import Admission, Intake, Training
from fedray.federation.clocks import aggregation_threads, threads, timed
from fedray.federation.evaluation import evaluate
from fedray.federation.failures import ROUND_ATTEMPTS, Action, after_round
from fedray.federation.messages import Failure, Outcome, Trained, failures
from fedray.federation.questions import MethodQuestion
from fedray.federation.record import RoundRecord
from fedray.federation.screening import Expected, Norms
from fedray.federation.wire import pack, unpack
from fedray.methods import Diagnostics, State, Update

if TYPE_CHECKING:
    from fedray.federation.coordinator import Coordinator


@dataclass(frozen=True)
class Attendance:
    """Who reported, in cohort order, and who was left out, with the reason."""

    outcomes: list[Outcome]
    dropped: list[dict[str, str]]

    @property
    def reports(self) -> list[Trained]:
        return [o.report for o in self.outcomes if isinstance(o.report, Trained)]

    @property
    def shortened(self) -> dict[str, int]:
        """By client, rows that do not train whole."""
        return {r.client: r.shortened for r in self.reports if r.shortened}

    @property
    def train_loss(self) -> float | None:
        """The mean of the losses that were told, by examples."""
        losses = [r.train_loss * r.examples for r in self.reports if r.train_loss is not None]
        return sum(losses) / sum(r.examples for r in self.reports) if losses else None

    @property
    def wire_error(self) -> float | None:
        """What rounding took on the way of all that was meant to be sent, relative Frobenius norm; None where updates
        travel whole."""
        meant = math.fsum(r.meant for r in self.reports)
        return math.sqrt(math.fsum(r.lost for r in self.reports) / meant) if meant else None


def run_round(server: Coordinator) -> RoundRecord | None:
    """The next round's record; None when it may not be done. Raises ClientError when a failing client costs the
    quorum, RoundError when the round cannot be completed."""
    if server.stopped:
        return None
    seconds: dict[str, float] = {}

    # Who takes part; then the broadcast goes out, and each client of the cohort trains.
    with timed(seconds, "train"):
        server.channel.announce(server.state.round, server.message)
        if (admission := server.channel.admit(server.state.round, server.message)) is None:
            return None
        call = called(server, admission)
        attendance = train(server, call)
    down = server.count_bytes_down(*server.channel.receivers(admission))  # of this broadcast: the next comes below

    # The updates come in and become the next state, which is published.
    with timed(seconds, "aggregate"), threads(aggregation_threads(server.state.spec.layers)):
        intake = server.channel.collect(call, attendance.outcomes)
        state, attendance, intake = second_upload(server, call, attendance, intake)
        next_state, diagnostics = server.method.aggregate(state, intake.updates, server.config.federation.exact_report)
        server.publish(next_state)
    server.keep(attendance.outcomes)

    # What is written down; the state is measured and saved.
    record = described(admission, attendance, intake, judged(server, intake, diagnostics), call, down)
    record = ended(server, server.channel.annotate(record, server.message, last=server.done))
    if server.done or record.stopped or record.round % server.config.federation.evaluate_every == 0:
        with timed(seconds, "evaluate"):
            record = judged_by_metric(server, record.replace(evaluation=evaluate(server)))
    return server.write_down(record.replace(seconds=seconds))


# --- training ----------------------------------------------------------------------------------------------------


def called(server: Coordinator, admission: Admission) -> Training:
    """The call for training of those who take part."""
    section = server.config.federation
    norms = Norms(section.max_update_norm, section.max_update_ratio)
    expected = Expected(server.method, server.state)
    return Training(server.state.round, server.message, server.handle, server.kept, admission, expected, norms)


def train(server: Coordinator, call: Training) -> Attendance:
    """The cohort's training, those who failed asked again where the quorum needs them. Raises as `run_round`."""
    admission, done = call.admission, dict[str, Outcome]()
    failed_by = {f.client: f for f in admission.failed}
    unable = set(failed_by)
    for attempt in itertools.count(1):
        missing = [c for c in admission.cohort if c not in unable | done.keys()]
        outcomes = server.channel.train(call, missing)
        done |= {o.client: o for o in outcomes if not o.failed}
        failed_by |= {f.client: f for f in failures(outcomes)}
        failed = [f for client, f in failed_by.items() if client not in done]
        reasons = [server.channel.reason(f) for f in failed]
        needed = server.channel.needed(len(admission.cohort))
        decision = after_round(len(admission.cohort), len(done), needed, attempt, reasons)
        if decision.action is Action.AGGREGATE:
            break
        if decision.action is Action.FAIL:
            raise server.channel.error(call.round, decision.reason, failed)
    reported = [done[c] for c in admission.cohort if c in done]
    return Attendance(reported, [*admission.left_out, *dropped(failed)])


def dropped(failed: Sequence[Failure]) -> list[dict[str, str]]:
    """Failures as a record has them."""
    return [{"client": f.client, "reason": f.cause} for f in failed]


# --- updates -----------------------------------------------------------------------------------------------------


def second_upload(
    server: Coordinator, call: Training, attendance: Attendance, intake: Intake
) -> tuple[State, Attendance, Intake]:
    """Where the method asks, its question and the cohort's answers: the state with what was asked, who answered, and
    both uploads in one. A client that fails now is left out as far as the quorum allows; raises RoundError beyond."""
    state, method = server.state, server.method
    if not method.asks:
        return state, attendance, intake
    updates = list(intake.updates)
    question = method.question(state, updates)
    packet = pack(question)
    kept = {o.client: o.kept for o in attendance.outcomes}
    deadline = server.config.federation.deadline
    answers = server.pool.ask(MethodQuestion(packet), list(kept), kept, deadline)
    answers = server.channel.answers(call, question, answers)
    answered = _answered(server, answers, len(call.admission.cohort))
    both = [
        Update(u.client, u.weight, {**u.tensors, **unpack(answered[u.client])}) for u in updates if u.client in answered
    ]
    rest = [o for o in attendance.outcomes if o.client in answered]
    up = intake.up + sum(p.nbytes for p in answered.values())
    return (
        state.replace(memory=state.memory | unpack(packet)),
        Attendance(rest, [*attendance.dropped, *dropped(failures(answers))]),
        replace(intake, updates=both, up=up, down=intake.down + packet.nbytes * len(kept)),
    )


def _answered(server: Coordinator, answers: list[Outcome], cohort: int) -> Mapping[str, Any]:
    """The packets of those who answered."""
    failed = failures(answers)
    packets = {a.client: server.pool.fetch(a.update) for a in answers if not a.failed}
    reasons = [server.channel.reason(f) for f in failed]
    decision = after_round(cohort, len(packets), server.channel.needed(cohort), ROUND_ATTEMPTS, reasons)
    if decision.action is Action.FAIL:
        raise RoundError(f"round {server.state.round + 1}, second upload: {decision.reason}")
    return packets


def judged(server: Coordinator, intake: Intake, diagnostics: Diagnostics) -> Diagnostics:
    """What averaging lost cannot be told from a sum; a method that is exact loses what rounding the sum loses."""
    if intake.lost is None:
        return diagnostics
    return Diagnostics(None, intake.lost if server.method.exact == "yes" else None, diagnostics.ideal_norm)


# --- the record --------------------------------------------------------------------------------------------------


def described(
    admission: Admission,
    attendance: Attendance,
    intake: Intake,
    diagnostics: Diagnostics,
    call: Training,
    down: int,
) -> RoundRecord:
    """The record before it is evaluated. `down`: bytes of the broadcast."""
    return RoundRecord(
        round=call.round + 1,
        cohort=admission.cohort,
        dropped=attendance.dropped,
        train_loss=attendance.train_loss,
        bytes_up=intake.up,
        bytes_down=down + intake.down,
        aggregation_error=diagnostics.aggregation_error,
        exactness=diagnostics.exactness,
        ideal_norm=diagnostics.ideal_norm,
        standard_error=diagnostics.standard_error,
        wire_error=attendance.wire_error,
        shortened=attendance.shortened,
    )


def judged_by_metric(server: Coordinator, record: RoundRecord) -> RoundRecord:
    """The record with the reason, if patience is at its end."""
    reason = None if server.done else out_of_patience(server.config, [*server.records, record.to_json()])
    return record if record.stopped or reason is None else record.replace(stopped=reason)


def ended(server: Coordinator, record: RoundRecord) -> RoundRecord:
    """The record with the reason, if bytes allow no round after it."""
    most, now = server.config.federation.max_bytes, record.bytes_up + record.bytes_down
    moved = now + server.bytes_moved()
    if server.done or most is None or moved + now <= most:
        return record
    words = f"another round like this one would move {moved + now:,} bytes in all"
    return record.replace(stopped=f"{words}, and federation.max_bytes is {most:,.0f}")
