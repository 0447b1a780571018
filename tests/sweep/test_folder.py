"""What a trial's files say of it: every status, and what is written and read back."""

import json
import math
from types import SimpleNamespace

import pytest

from fedray.config.read import from_dict
from fedray.errors import ConfigError
from fedray.privacy.accountant import Release
from fedray.privacy.ledger import Entry, Ledger
from fedray.report.sweep.privacy import privacy_of
from fedray.report.sweep.summary import sweep_privacy
from fedray.sweep.budget import check_affordable
from fedray.sweep.folder import STATUSES, SweepFolder

NAME = "000,ffa,lr=0.01,seed=0"
RELEASES = {"a": [Release("count", 20.0), Release("training", 1.25, 0.1, 30)]}


@pytest.fixture
def sweep(tmp_path):
    return SweepFolder(tmp_path / "out")


@pytest.fixture
def trial(sweep):
    """A trial that has begun and done nothing yet."""
    trial = sweep.trial(NAME)
    trial.begin({"entry": "ffa", "seed": 0}, "one split", RELEASES)
    return trial


def run(trial, rounds: int = 1, **privacy) -> None:
    """A run directory with so many finished rounds."""
    trial.run.mkdir(parents=True, exist_ok=True)
    config = from_dict({"privacy": privacy, "method": {"name": "ffa"}, "output": {"dir": str(trial.run)}})
    (trial.run / "config.yaml").write_text(config.to_yaml())
    (trial.run / "rounds.jsonl").write_text("".join(json.dumps({"round": i + 1}) + "\n" for i in range(rounds)))


def finish(trial) -> None:
    (trial.run / "summary.json").write_text(json.dumps({"final": 0.5}))


def nothing(trial) -> None:
    pass


def one_round(trial) -> None:
    run(trial)


def no_round(trial) -> None:
    run(trial, 0)


def done(trial) -> None:
    run(trial)
    finish(trial)


def stopped(trial) -> None:
    run(trial)
    trial.stop()


def failed(trial) -> None:
    run(trial)
    trial.fail("the loss became nan")


def stopped_when_it_was_done(trial) -> None:
    done(trial)
    trial.stop()


def failed_after_a_stop(trial) -> None:
    stopped(trial)
    trial.fail("it was tried 3 times")


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        (nothing, "unstarted"),
        (no_round, "unstarted"),
        (one_round, "unfinished"),
        (done, "finished"),
        (stopped, "stopped"),
        (failed, "failed"),
        (stopped_when_it_was_done, "finished"),
        (failed_after_a_stop, "failed"),
    ],
)
def test_every_status(steps, status, trial):
    steps(trial)
    assert trial.status == status and status in STATUSES
    assert trial.ended == (status in ("failed", "finished", "stopped"))


def test_a_failure_can_be_forgotten_and_then_the_rounds_count_again(trial):
    failed(trial)
    assert trial.reason == "the loss became nan"
    trial.try_again()
    trial.try_again()  # nothing to forget
    assert not trial.failed and trial.status == "unfinished" and len(trial.records) == 1


def test_what_is_written_before_a_trial_is_read_back(trial):
    assert (trial.values, trial.split, trial.planned) == ({"entry": "ffa", "seed": 0}, "one split", RELEASES)
    trial.begin({"seed": 1}, "another", None)
    assert (trial.values, trial.split, trial.planned) == ({"seed": 1}, "another", None)
    assert [path.name for path in trial.trials.iterdir()] == [f"{NAME}.json"]  # written whole, nothing beside it
    trial.withdraw()
    assert not list(trial.trials.iterdir())


def test_what_was_released_is_what_the_ledger_says(trial):
    assert trial.ledger is None and trial.released == {}  # nobody knows yet whether it is private
    run(trial)
    assert trial.released is None  # without privacy: nothing bounds it
    run(trial, 0, noise=1.25)
    assert trial.released == {} and trial.has_run
    ledger = Ledger("run", 1e-5, entries={"a": [Entry("draw", release, 1) for release in RELEASES["a"]]})
    (trial.run / "checkpoint").mkdir()
    ledger.save(trial.run / "checkpoint" / "ledger.json")
    assert trial.released == RELEASES


def private_done(trial) -> None:
    run(trial, noise=1.25, delta=1e-5, sweep_epsilon=9.0)
    finish(trial)


def private_stopped(trial) -> None:
    run(trial, noise=1.25, delta=1e-5, sweep_epsilon=9.0)
    trial.stop()


def private_with_a_state_alone(trial) -> None:
    run(trial, 0, noise=1.25, delta=1e-5, sweep_epsilon=9.0)
    (trial.run / "checkpoint" / "round-0000").mkdir(parents=True)
    trial.fail("it was tried 3 times")


LOST = [private_done, private_stopped, private_with_a_state_alone]


@pytest.mark.parametrize("steps", LOST)
def test_a_trial_that_has_lost_its_ledger_has_not_released_nothing(steps, trial):
    steps(trial)
    with pytest.raises(ConfigError, match=f"trial '{NAME}' .*ledger.json.* bring the file back"):
        _ = trial.released


@pytest.mark.parametrize("steps", LOST)
def test_no_trial_begins_beside_one_that_has_lost_its_ledger(steps, sweep, trial):
    steps(trial)
    new = sweep.trial("001,ffa,lr=0.1,seed=0")
    new.begin({"seed": 0}, "one split", RELEASES)
    prepared = SimpleNamespace(config=trial.config)  # all that is asked of it
    with pytest.raises(ConfigError, match=f"trial '{NAME}'"):
        check_affordable(prepared, new)
    Ledger("run", 1e-5).save(trial.run / "checkpoint" / "ledger.json")
    check_affordable(prepared, new)


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("steps", LOST)
def test_what_a_sweep_has_told_is_not_known_where_a_ledger_is_lost(steps, others, sweep, trial):
    steps(trial)
    sweep.write_settings({"random_stopping": None})
    if others:
        other = sweep.trial("001,ffa,lr=0.1,seed=0")
        other.begin({"seed": 0}, "one split", RELEASES)
        private_done(other)
        entries = {"a": [Entry("draw", release, 1) for release in RELEASES["a"]]}
        Ledger("run", 1e-5, entries=entries).save(other.run / "checkpoint" / "ledger.json")
    told = privacy_of(sweep.out)
    assert set(told["composed"].values()) == {math.inf} and told["lost"] == [NAME]
    words = sweep_privacy(told)
    assert words.startswith("privacy: not known") and f"'{NAME}'" in words and "ledger.json" in words


def test_a_sweep_lists_what_has_begun_what_is_planned_and_what_has_run(sweep):
    assert sweep.begun() == sweep.planned() == sweep.runs() == []
    with pytest.raises(ConfigError, match="is no folder of a sweep: it holds no sweep.json"):
        _ = sweep.settings
    sweep.write_settings({"mode": "max"})
    assert sweep.has_settings and sweep.settings == {"mode": "max"}
    planned, both, early = (sweep.trial(name) for name in ("002,c", "001,b", "000,a"))
    for each in (planned, both):
        each.begin({}, "", None)
    both.fail("no")
    early.fail("it failed before it could say what it would do")
    run(both)
    names = {what: [each.name for each in getattr(sweep, what)()] for what in ("begun", "planned", "runs")}
    assert names == {"begun": ["000,a", "001,b", "002,c"], "planned": ["001,b", "002,c"], "runs": ["001,b"]}
