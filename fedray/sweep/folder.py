"""What a sweep leaves on disk, and what it says: the one place that knows a trial's files and its status.

OUT holds `sweep.json` (what was asked for), `keys/` (random stopping), `tune/` (Ray Tune's own state), the tables and
pictures, and under `trials/` for each trial NAME
    NAME/             its run directory
    NAME.json         written before it runs: its values, how it deals the data out, what it plans to release
    NAME.failed.json  why it cannot go on
    NAME.stopped      empty: a scheduler has ended it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.config.sections import Config
from fedray.errors import ConfigError
from fedray.federation.results import read_rounds, read_run_config
from fedray.privacy.accountant import Release
from fedray.privacy.ledger import Ledger

_PLAN, _FAILURE, _STOP = ".json", ".failed.json", ".stopped"
#: Every status that a trial may have, in the order in which they are looked for.
STATUSES = ("failed", "finished", "stopped", "unfinished", "unstarted")

Releases = dict[str, list[Release]]


@dataclass(frozen=True)
class TrialFolder:
    """One trial's files under `trials`, the folder of all of them. Nothing is kept: every look is at the disk."""

    trials: Path
    name: str

    @property
    def run(self) -> Path:
        """Its run directory."""
        return self.trials / self.name

    @property
    def _plan(self) -> Path:
        return self.trials / f"{self.name}{_PLAN}"

    @property
    def _failure(self) -> Path:
        return self.trials / f"{self.name}{_FAILURE}"

    @property
    def _stop(self) -> Path:
        return self.trials / f"{self.name}{_STOP}"

    # --- what is there ---

    @property
    def failed(self) -> bool:
        """Whether it ended for a reason of its own."""
        return self._failure.exists()

    @property
    def finished(self) -> bool:
        """Whether its run came to its end."""
        return (self.run / "summary.json").exists()

    @property
    def stopped(self) -> bool:
        """Whether a scheduler has ended it."""
        return self._stop.exists()

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.failed or self.finished or self.stopped

    @property
    def status(self) -> str:
        """One of `STATUSES`. unfinished: at least one round is done; a sweep that is resumed goes on with it."""
        if self.failed:
            return "failed"
        if self.finished:
            return "finished"
        if self.stopped:
            return "stopped"
        return "unfinished" if self.records else "unstarted"

    @property
    def has_run(self) -> bool:
        """Whether its run directory has a config, so that it may have read data."""
        return (self.run / "config.yaml").is_file()

    @property
    def config(self) -> Config:
        """The config of its run. Raises ConfigError before it has begun."""
        return read_run_config(self.run)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of its finished rounds, the first one first."""
        return read_rounds(self.run)

    @property
    def summary(self) -> dict[str, Any]:
        """`summary.json` of a finished trial."""
        return json.loads((self.run / "summary.json").read_text())

    @property
    def reason(self) -> str:
        """Why a failed trial failed."""
        return json.loads(self._failure.read_text())["reason"]

    @property
    def values(self) -> dict[str, Any]:
        """What sets it apart, as in the space, seed included."""
        return self._written["values"]

    @property
    def split(self) -> str:
        """How it deals the data out: equal words for equal splits."""
        return self._written["split"]

    @property
    def planned(self) -> Releases | None:
        """What it would release of each client's data by its plan; None of a run without privacy."""
        planned = self._written["planned"]
        return None if planned is None else {c: [Release(*r) for r in releases] for c, releases in planned.items()}

    @property
    def _written(self) -> dict[str, Any]:
        return json.loads(self._plan.read_text())

    @property
    def ledger(self) -> Ledger | None:
        """What it has charged; None before its first release."""
        return Ledger.load(self.run / "checkpoint" / "ledger.json")

    @property
    def is_public(self) -> bool:
        """Whether it is known to be a run without privacy."""
        return self.has_run and not self.config.privacy.on

    @property
    def lost_ledger(self) -> bool:
        """Whether it has released something, as its rounds or states show, and what that was is gone."""
        if self.is_public or self.ledger is not None:
            return False
        return self.finished or bool(self.records) or any((self.run / "checkpoint").glob("round-*"))

    @property
    def released(self) -> Releases | None:
        """What it has released so far, from its ledger; {} before the first release, None of a run without privacy.
        Raises ConfigError where it has lost its ledger: what nobody knows must not count as nothing."""
        if self.lost_ledger:
            raise ConfigError(
                f"trial '{self.name}' has lost its checkpoint/ledger.json, so nobody knows what it has told of the "
                f"data: bring the file back to {self.run}, or make another sweep"
            )
        ledger = self.ledger
        if ledger is not None:
            return {client: [entry.release for entry in entries] for client, entries in ledger.entries.items()}
        return None if self.is_public else {}

    # --- what is written ---

    def begin(self, values: Mapping[str, Any], split: str, planned: Mapping[str, Sequence[Release]] | None) -> None:
        """Write down what it is about to do, before it does it."""
        self.trials.mkdir(parents=True, exist_ok=True)
        releases = (
            None
            if planned is None
            else {client: [[r.what, r.noise, r.rate, r.steps] for r in each] for client, each in planned.items()}
        )
        write_json(self._plan, {"values": values, "split": split, "planned": releases})

    def withdraw(self) -> None:
        """Take back what `begin` wrote: it will release nothing."""
        self._plan.unlink()

    def fail(self, reason: str) -> None:
        """Write down why it cannot go on."""
        write_json(self._failure, {"reason": reason})

    def try_again(self) -> None:
        """Forget a failure."""
        self._failure.unlink(missing_ok=True)

    def stop(self) -> None:
        """Write down that a scheduler has ended it."""
        self._stop.touch()


@dataclass(frozen=True)
class SweepFolder:
    """A sweep's own files: OUT, and the trials in it."""

    out: Path

    @property
    def trials(self) -> Path:
        """The folder of all trials; it may not be there yet."""
        return self.out / "trials"

    @property
    def settings(self) -> dict[str, Any]:
        """`sweep.json`: what was asked for. Raises ConfigError where there is none."""
        if not self._settings.is_file():
            raise ConfigError(f"'{self.out}' is no folder of a sweep: it holds no sweep.json")
        return json.loads(self._settings.read_text())

    @property
    def has_settings(self) -> bool:
        """Whether a sweep has passed its checks here."""
        return self._settings.is_file()

    @property
    def _settings(self) -> Path:
        return self.out / "sweep.json"

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write `sweep.json`, and the folder where it is not there yet."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self._settings, settings)

    @property
    def keys(self) -> Path:
        """Where the keys of random stopping lie."""
        return self.out / "keys"

    def trial(self, name: str) -> TrialFolder:
        """The trial of that name, whatever there is of it."""
        return TrialFolder(self.trials, name)

    def planned(self) -> list[TrialFolder]:
        """The trials that have written down what they are about to do, by name."""
        files = sorted(self.trials.glob(f"*{_PLAN}"))
        return [self.trial(f.name.removesuffix(_PLAN)) for f in files if not f.name.endswith(_FAILURE)]

    def begun(self) -> list[TrialFolder]:
        """The trials that have begun, those included that failed before they could say what they would do; by name."""
        names = {f.name.removesuffix(_FAILURE).removesuffix(_PLAN) for f in self.trials.glob(f"*{_PLAN}")}
        return [self.trial(name) for name in sorted(names)]

    def runs(self) -> list[TrialFolder]:
        """The trials that have a run directory, by name."""
        if not self.trials.is_dir():
            return []
        return [self.trial(path.name) for path in sorted(self.trials.iterdir()) if path.is_dir()]


def write_json(path: Path, value: Any) -> None:
    """Write it whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=2, default=str))
    part.replace(path)
