"""What happens when something fails. A pure function of what happened; nothing here acts.

| event             | first times                     | then                                            |
|-------------------|---------------------------------|-------------------------------------------------|
| a worker dies     | the client's round is repeated, by itself | the client is left out                |
| a client raises   | it is left out (its inputs are fixed, so it would raise again)                    |
| a client does not fit on its device | it is left out; the reason says how many of its sequences do fit          |
| the deadline ends | the client is left out                                                            |
| below the quorum  | the missing clients are tried again once | the run fails, naming clients and causes |
| a second upload (fedask) fails | as above, with a deadline of its own; below the quorum the run fails at once      |
| the start before round 1 (lora-sb) fails at a client | the run fails, naming it: bases need every client |
| an update is not finite, of other shapes, too large (`screening.py`) | as a client that raises, with the reason   |
| an update is beyond the clip (unit client)     | the same                                         |
| fewer clients than a secure sum's threshold    | the run fails: the sum stays closed              |
| a client's budget is spent                     | it is left out of all later rounds               |
| everybody's budget is spent, or `max_bytes` or `patience` is | the run ends                       |
| a checkpoint cannot be written (a full disk)   | the run fails; it goes on from the last whole one |
| one of a client's ranks dies, or fails alone   | as a worker that dies, or a client that raises (`crew_ray.py`) |
| a worker cannot start again                    | the others take its clients; whom only it serves is left out |
| the driver's own node dies                     | the run fails; it goes on with output.resume     |
| an update is late (`federation.buffer`)        | it counts less (`buffered.py`)                   |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

WORKER_ATTEMPTS = 3
ROUND_ATTEMPTS = 2


class ClientState(Enum):
    """Where a client's round stands; `terminal` states do not change any more."""

    WAITING = "waiting"
    TRAINING = "training"
    REPORTED = "reported"
    RAISED = "raised"
    LATE = "late"
    WORKER_DIED = "worker died"

    @property
    def terminal(self) -> bool:
        return self not in (ClientState.WAITING, ClientState.TRAINING)


class Action(Enum):
    """What to do next."""

    REPEAT = "repeat"
    LEAVE_OUT = "leave out"
    AGGREGATE = "aggregate"
    RETRY_ROUND = "retry round"
    FAIL = "fail"


@dataclass(frozen=True)
class Decision:
    """An action and the reason a person reads."""

    action: Action
    reason: str


def after_client(state: ClientState, client: str, attempt: int, cause: str = "") -> Decision:
    """After a client's attempt (from 1) ended without an update."""
    if state is ClientState.WORKER_DIED and attempt < WORKER_ATTEMPTS:
        return Decision(
            Action.REPEAT, f"the worker of client '{client}' died ({cause}): its round is repeated from the same inputs"
        )
    if state is ClientState.WORKER_DIED:
        return Decision(Action.LEAVE_OUT, f"the worker of client '{client}' died {attempt} times: {cause}")
    if state is ClientState.LATE:
        return Decision(Action.LEAVE_OUT, f"client '{client}' was not done by the deadline")
    if state is ClientState.RAISED:
        return Decision(Action.LEAVE_OUT, f"client '{client}' failed: {cause}")
    raise ValueError(f"{state} asks for no decision")


@dataclass(frozen=True)
class Needed:
    """How many clients must report, what of the config asks for it, and how often a round is tried."""

    clients: int
    asked: str
    attempts: int = ROUND_ATTEMPTS


def needed_of(cohort: int, quorum: float) -> Needed:
    """Of a cohort, as a share."""
    return Needed(math.ceil(quorum * cohort), f"federation.quorum {quorum:g}")


def after_round(cohort: int, reported: int, needed: Needed, attempt: int, reasons: list[str]) -> Decision:
    """After all clients of a round's attempt (from 1) are in terminal states."""
    if reported >= needed.clients:
        return Decision(Action.AGGREGATE, f"{reported} of {cohort} clients reported")
    why = (
        f"{reported} of {cohort} clients reported and {needed.clients} are needed ({needed.asked}): "
        f"{'; '.join(reasons)}"
    )
    return Decision(Action.RETRY_ROUND if attempt < needed.attempts else Action.FAIL, why)
