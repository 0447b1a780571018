"""What the two private channels share: the ledger, charged and on disk before anything is released, and the clients'
half of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.errors import ConfigError, PrivacyError
from fedray.federation.channels.base import Carrier, Context
from fedray.federation.channels.plain import UNIT_OPTIONS, Plain, PlainSide, cause_of, refusal
from fedray.federation.messages import PUBLIC, Answered, Failure, Outcome, Trained
from fedray.federation.questions import ForgetKeys, Question, Sketch, StartFromWeights, forget_keys
from fedray.federation.wire import Packet
from fedray.privacy.files import hashed, write_durably
from fedray.privacy.keys import KeyStore
from fedray.privacy.ledger import Ledger, new_ledger
from fedray.privacy.planning import clip_of, plans_for

if TYPE_CHECKING:
    from fedray.config.sections import Config, PrivacySection
    from fedray.federation.record import RoundRecord
    from fedray.federation.wire import Message
    from fedray.privacy.private import Private


# --- the config's check ------------------------------------------------------------------------------------------

#: Beside the checkpoints: the ledger, and the name of the run that has one.
LEDGER, BEGUN = "ledger.json", "ledger.run"


def check(config: Config) -> None:
    """Raises ValueError for what reads the clients' data without noise, or would say that it does not."""
    _check_options(config.privacy)
    _check_subspace(config)
    if config.data.client_held_out > 0:
        raise ValueError(
            "data.client_held_out would send metrics of the clients' own examples without noise: leave it out in a "
            "private run"
        )
    if not isinstance(config.adapter.rank, int):
        raise ValueError(
            "adapter.rank that differs between clients does not fit privacy: noise would fill what smaller clients do "
            "not have; use one rank"
        )


def _check_options(privacy: PrivacySection) -> None:
    """The section by itself: its budgets, and which of its keys belong to which unit."""
    for name in ("sweep_epsilon", "lifetime_epsilon"):
        of_all = getattr(privacy, name)
        if privacy.epsilon is not None and of_all is not None and privacy.epsilon > of_all:
            raise ValueError(
                f"privacy.epsilon {privacy.epsilon:g} of one run is above privacy.{name} {of_all:g} of all of them: "
                "lower it"
            )
    if privacy.lifetime_epsilon is not None:
        _check_lifetime(privacy)
    for option, unit in UNIT_OPTIONS.items():
        if getattr(privacy, option) is not None and privacy.unit != unit:
            raise ValueError(f"privacy.{option} belongs to privacy.unit {unit}, not to {privacy.unit}: leave it out")


def _check_lifetime(privacy: PrivacySection) -> None:
    """Raises ValueError where no client could hold it."""
    if privacy.unit == "client" and privacy.trust == "coordinator":
        raise ValueError(
            "privacy.lifetime_epsilon is held by clients that add their noise themselves, and with privacy.unit client "
            "a trusted coordinator does: set privacy.trust nobody, or leave it out"
        )
    if privacy.delta is None:
        raise ValueError(
            "privacy.lifetime_epsilon is over many runs, whose own deltas would follow from counts that each run "
            "noises anew, and a refusal would tell of them: give privacy.delta"
        )


def _check_subspace(config: Config) -> None:
    privacy, adapter = config.privacy, config.adapter
    if adapter.subspace in ("gradient", "gradient-raw"):
        raise ValueError(
            f"adapter.subspace {adapter.subspace} reads the clients' data without noise, and no noise in training "
            "takes that back: use private, public or weights"
        )
    if adapter.subspace != "private":
        if privacy.subspace_fraction is not None:
            raise ValueError("privacy.subspace_fraction belongs to adapter.subspace private: leave it out")
        return
    if privacy.unit == "client":
        raise ValueError(
            "adapter.subspace private protects examples, not clients: use public or weights with privacy.unit client"
        )
    for option in ("subspace_oversample", "subspace_passes"):
        if getattr(adapter, option) is not None:
            raise ValueError(
                f"adapter.{option} does not fit adapter.subspace private, which has no columns or passes beyond the "
                "needed: leave it out"
            )


def check_ledger(name: str | None, checkpoint: Path) -> None:
    """Raises ConfigError for a run that has begun and is without its ledger; `name`: of the run directory."""
    begun = (checkpoint / BEGUN).is_file() or any(checkpoint.glob("round-*"))
    if begun and not (checkpoint / LEDGER).is_file():
        raise ConfigError(
            f"output.dir '{name}' has lost its checkpoint/{LEDGER}, so nobody knows what it has spent: bring the file "
            "back, or start another run"
        )


# --- the server's half -------------------------------------------------------------------------------------------


class Accounted(Plain):
    """A channel whose every release is in a ledger. The ledger lies with the checkpoints; keys never do: a run
    directory may be given away."""

    tells = False

    def __init__(self, context: Context, carrier: Carrier, ledger: Ledger):
        super().__init__(context, carrier)
        self.ledger, self._path = ledger, context.folder / LEDGER
        self.store = KeyStore(self.config.privacy.key_dir)
        # With the keys, so that a run directory that is brought back from a copy does not bring its own witness.
        self._witness = self.store.folder / "ledgers" / f"{hashed(ledger.run)}.json"
        if self._witness.is_file():
            self._check_follows(json.loads(self._witness.read_text()))

    def save(self) -> None:
        """The ledger is on disk when this returns."""
        if not (begun := self._path.with_name(BEGUN)).is_file():
            write_durably(begun, self.ledger.run)
        self.ledger.save(self._path)
        write_durably(self._witness, json.dumps(self.ledger.mark()))

    def mark(self) -> dict[str, Any] | None:
        return self.ledger.mark()

    def resume(self, records: Sequence[Mapping[str, Any]], mark: dict[str, Any] | None) -> None:
        if mark is not None:
            self._check_follows(mark)

    def _check_follows(self, mark: dict[str, Any]) -> None:
        if not self.ledger.follows(mark):
            raise ConfigError(
                f"'{self._path}' is an older copy of the ledger, or was changed: it does not say what was spent since; "
                "bring the newest copy back, or start another run"
            )

    # --- before round 1 and after the last ---

    def begin(self) -> None:
        """Plans from counts, once. Raises ConfigError as `plans_for`, ClientError when a client fails."""
        if self.ledger.plans:
            return
        plans = plans_for(self.config, self.counts())
        self.ledger.plans, self.ledger.delta = plans, next(iter(plans.values())).delta
        self.ledger.clip = clip_of(self.config)
        self.save()

    def counts(self) -> Mapping[str, float]:
        """What the plans are made from, by client."""
        raise NotImplementedError

    def begun(self) -> dict[str, Any]:
        return {"epsilon": self.epsilons(), "delta": self.ledger.delta}

    def end(self) -> None:
        """Clients remove their noise keys, so that nobody can take the noise away again."""
        self.context.pool.ask(forget_keys(self.ledger.run, self.context.clients), self.context.clients, {}, None)

    # --- a round ---

    def spent(self, round: int, message: Message) -> list[dict[str, str]]:
        """The clients that a round would take over their budget, and why they are left out, in client order."""
        raise NotImplementedError

    def annotate(self, record: RoundRecord, message: Message, last: bool) -> RoundRecord:
        record = record.replace(epsilon=self.epsilons())
        spent = [] if last else self.spent(record.round, message)
        if len(spent) < len(self.context.clients):
            return record
        return record.replace(stopped=f"client '{spent[0]['client']}' and all others: {spent[0]['reason']}")

    def epsilons(self) -> dict[str, float]:
        """What each client has spent so far, at the ledger's delta."""
        raise NotImplementedError

    def beyond_budget(self, name: str) -> str:
        """Why an account may not be charged for another round."""
        budget, spent = self.ledger.plans[name].budget, self.ledger.epsilon(name)
        return f"another round would take it beyond its budget of epsilon {budget:g} (spent: {spent:.4g})"

    # --- keys ---

    def note(self, outcomes: Sequence[Outcome]) -> list[str]:
        """A key that a test has fixed voids the run's guarantee for good, whenever it was used. A client that has
        another key than the ledger knows draws other noise from now on: its next draw is another, and is charged."""
        before = self.ledger.fixed, dict(self.ledger.keys)
        reports = [o.report for o in outcomes]
        self.ledger.fixed |= any(r.key_is_fixed for r in reports if not isinstance(r, Failure))
        lost = {r.client: r.key for r in reports if isinstance(r, Failure) and r.key}
        self.ledger.keys |= lost
        if (self.ledger.fixed, self.ledger.keys) != before:
            self.save()
        return list(lost)


def open_ledger(context: Context) -> Ledger:
    """The run's ledger, or a new one with a name for the run that keys are filed under."""
    return Ledger.load(context.folder / LEDGER) or new_ledger()


def ledger_of(folder: Path) -> Ledger:
    """The ledger in a run directory. Raises ConfigError where there is none."""
    ledger = Ledger.load(Path(folder) / "checkpoint" / LEDGER)
    if ledger is None:
        raise ConfigError(f"'{folder}' is no private run: it has no ledger")
    return ledger


def forget(config: Config, folder: Path) -> int:
    """Remove this machine's noise keys of the run in a run directory; how many there were. Raises ConfigError for a run
    without privacy."""
    return KeyStore(config.privacy.key_dir).forget_run(ledger_of(folder).run)


# --- the client's half -------------------------------------------------------------------------------------------


class PrivateSide(PlainSide):
    """A client whose sizes, losses, times and errors' words stay where they are, and that answers no question that its
    own config does not have."""

    #: Errors whose words say nothing of data.
    own_words: tuple[type[Exception], ...] = (PrivacyError,)

    def admitted(self, client: str) -> tuple[type[Question], ...]:
        """The questions that this run has, beside its carrier's."""
        if client == PUBLIC:
            return (Sketch,) if self.config.adapter.subspace == "public" else ()
        return (ForgetKeys, StartFromWeights) if self.spec.adapter.started else (ForgetKeys,)

    def check_question(self, client: str, question: Question) -> None:
        if not isinstance(question, self.admitted(client)) and not self.sealer.answers(question):
            raise refusal(question)

    def report(self, client: str, result: Any, nbytes: int, private: Private | None) -> Trained:
        fixed = private is not None and private.key.fixed
        return Trained(client, 0, None, result.base_lost, 0.0, nbytes, fixed)

    def answered(self, client: str, question: Question, packet: Packet) -> Answered:
        return Answered(client, 0, packet.nbytes)

    def check_evaluation(self, part: str) -> None:
        if part != "test":
            raise PrivacyError(f"the coordinator asked for metrics of {part} examples, which this run keeps private")

    def failure(self, client: str, error: Exception) -> Failure:
        """An error's own words stay here, in the worker's log: they may quote data."""
        if isinstance(error, self.own_words):
            return Failure(client, cause_of(error), "")
        who = f"client {client}" if self.logs_clients else "a client"
        logging.getLogger("fedray").error("%s failed", who, exc_info=error)
        kind = type(error).__name__
        words = "its words are in the log of the worker that served it, since they may quote data"
        return Failure(client, f"{kind}; {words}", "")
