"""`privacy.lifetime_epsilon`: whatever runs a coordinator begins, a client's releases of all of them stay within it."""

import pytest
from support import run

from fedray.errors import ClientError, ConfigError, RoundError
from fedray.federation.channels.example import NoisedCount
from fedray.federation.messages import Answered, Orders
from fedray.federation.worker import Worker
from fedray.privacy.accountant import Release, epsilon
from fedray.privacy.journal import ANSWERED, Journal
from fedray.privacy.keys import TEST_KEY
from fedray.privacy.lifetime import _ahead

CLIENT = "client-0"
EXAMPLE = {"epsilon": 3.0, "delta": 1e-5}
NOBODY = {"unit": "client", "trust": "nobody", "secure_aggregation": True, "epsilon": 3.0, "delta": 0.01, "clip": 0.5}


@pytest.fixture
def keys(tmp_path, monkeypatch):
    monkeypatch.delenv(TEST_KEY, raising=False)
    return tmp_path / "keys"


def spent(keys, delta):
    """Of all runs of a key folder together, by client."""
    by_client = {}
    for path in (keys / ANSWERED).glob("*/*.jsonl"):
        by_client.setdefault(path.name, []).extend(Journal(path).releases)
    return [epsilon(releases, delta) for releases in by_client.values()]


def test_fresh_workers_that_are_each_told_another_run_answer_within_one_budget(make_config, keys):
    privacy = EXAMPLE | {"count_noise": 4.0, "lifetime_epsilon": 3.0, "key_dir": str(keys)}
    told = []
    for i in range(9):
        worker = Worker(make_config(privacy=privacy), "cpu", 1)  # the pin of one run is in a worker's memory
        told.append(worker.ask(CLIENT, NoisedCount(orders={CLIENT: Orders(f"run-{i}")}), None)[2])
    answered = [report for report in told if isinstance(report, Answered)]
    assert 0 < len(answered) < 9 and told[: len(answered)] == answered
    assert (
        "more than its privacy.lifetime_epsilon 3, over all runs of its key folder: it sends nothing" in told[-1].cause
    )
    (of_all,) = spent(keys, 1e-5)
    assert of_all <= 3.0
    # One more would have been too many.
    assert epsilon([Release("count", 4.0, steps=len(answered) + 1)], 1e-5) > 3.0


@pytest.mark.parametrize(("method", "privacy"), [("fedit", EXAMPLE), ("ffa", NOBODY)], ids=["example", "nobody"])
def test_a_second_run_that_would_pass_it_is_refused_before_it_trains(make_config, tmp_path, keys, method, privacy):
    privacy = privacy | {"lifetime_epsilon": 3.2, "key_dir": str(keys)}
    first = make_config(method__name=method, privacy=privacy, output__dir=str(tmp_path / "first"))
    run(first)
    before = spent(keys, privacy["delta"])
    assert len(before) == 3 and all(0 < each <= 3.0 for each in before)
    with pytest.raises((RoundError, ClientError), match="privacy.lifetime_epsilon 3.2"):
        run(make_config(method__name=method, privacy=privacy, output__dir=str(tmp_path / "second")))
    after = spent(keys, privacy["delta"])
    assert all(each <= 3.2 for each in after)
    # In the first round, and not when the budget is used up: nothing was trained of it.
    said = [Journal(path).said for path in (keys / ANSWERED).glob("*/*.jsonl")]
    assert sum(any(one.what == "round 1" for one in journal) for journal in said) == 3
    # Without it each run has a budget of its own.
    run(make_config(method__name=method, privacy=privacy | {"lifetime_epsilon": None}, output__dir=str(tmp_path / "x")))
    assert all(each > 3.2 for each in spent(keys, privacy["delta"]))


def test_what_is_repeated_costs_nothing(make_config, keys):
    privacy = EXAMPLE | {"count_noise": 2.0, "lifetime_epsilon": 3.0, "key_dir": str(keys)}
    told = []
    for _ in range(4):
        worker = Worker(make_config(privacy=privacy), "cpu", 1)
        told.append(worker.ask(CLIENT, NoisedCount(orders={CLIENT: Orders("the same")}), None)[2])
    assert all(isinstance(report, Answered) for report in told)
    assert len(list((keys / ANSWERED).glob("*/*.jsonl"))) == 1


def test_of_a_plan_only_what_is_not_made_is_ahead():
    training = Release("training", 1.0, 0.5, 10)
    assert _ahead([Release("count", 2.0), Release("training", 1.0, 0.5, 4)], [training])[0].steps == 6
    assert _ahead([Release("training", 1.0, 0.5, 12)], [training])[0].steps == 0


@pytest.mark.parametrize(
    ("privacy", "reason"),
    [
        ({"lifetime_epsilon": 3.0}, "would protect nothing"),
        ({"lifetime_epsilon": 3.0, "epsilon": 1.0, "unit": "client"}, "set privacy.trust nobody, or leave it out"),
        ({"lifetime_epsilon": 3.0, "epsilon": 4.0}, "is above privacy.lifetime_epsilon 3"),
        ({"lifetime_epsilon": 3.0, "epsilon": 1.0}, "give privacy.delta"),
    ],
)
def test_where_nothing_would_hold_it_it_is_refused(make_config, privacy, reason):
    with pytest.raises(ConfigError, match=reason):
        make_config(method__name="ffa", privacy=privacy)
