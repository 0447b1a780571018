"""Private runs of every kind: budgets kept, the same bits after a kill and on Ray, and what plan and report say."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from private_runs import CLIENTS, PRIVATE, killed_after, ledger, resumed
from support import rounds, run, sabotaged, same_bits

from fedray.cli import main
from fedray.privacy.ledger import EVERYONE

# A whole run costs seconds: those that share no code with another here, the others marked slow.
OFTEN = ("fedit", "fed-sb, private subspace", "abba, kept", "clients", "secure, clients")


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in PRIVATE])
def test_a_private_run_keeps_its_budget_and_a_resumed_one_ends_in_the_same_bits_and_epsilons(
    make_config, name, monkeypatch
):
    given = {"federation__clients": 3, "federation__rounds": 4, **PRIVATE[name]}
    config = make_config(**given)
    whole = run(config)
    spent = [r["epsilon"] for r in rounds(whole)]
    summary = json.loads((whole / "summary.json").read_text())
    assert len(spent) == 4 and all(list(e) == [f"client-{i}" for i in range(3)] for e in spent)
    assert all(before[c] <= after[c] for before, after in pairwise(spent) for c in before)
    assert summary["epsilon"] == max(spent[-1].values()) and 0 < summary["delta"] < 1
    if config.privacy.epsilon:
        assert 0.98 * config.privacy.epsilon < summary["epsilon"] <= config.privacy.epsilon
    assert all(r["train_loss"] is None and r["metrics"] for r in rounds(whole))

    config = make_config(**given)
    killed_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    folder = Path(config.output.dir)
    assert len(rounds(folder)) == 2
    assert run(resumed(config)) == folder
    same_bits(whole, folder)  # records too, epsilons among them
    names = [EVERYONE] if config.privacy.unit == "client" else spent[-1]
    for client in names:
        entries = ledger(folder).entries[client]
        training = [e.round for e in entries if e.release.what == "training"]
        assert training == [1, 2, 3, 4] and ledger(folder).epsilon(client) == ledger(whole).epsilon(client)


ENGINES = {
    "fed-sb, private subspace": PRIVATE["fed-sb, private subspace"],
    "clients": PRIVATE["clients"],
    "secure": {
        "method__name": "fed-sb",
        "adapter": {"kind": "lora-sb", "rank": 2, "subspace": "private"},
        "privacy": {"epsilon": 8.0, "secure_aggregation": True},
    },
}


@pytest.mark.parametrize("name", [n if n == "secure" else pytest.param(n, marks=pytest.mark.slow) for n in ENGINES])
def test_private_runs_have_the_same_bits_on_ray(make_config, ray_session, name):
    inline, on_ray = run(make_config(**ENGINES[name])), run(make_config(**ENGINES[name], engine="ray"))
    same_bits(inline, on_ray)
    said = [json.loads((folder / "summary.json").read_text()).get("masks_were_fixed") for folder in (inline, on_ray)]
    assert said == [True if name == "secure" else None] * 2  # tests fix the keys


@pytest.mark.parametrize("secure", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "secure"])
def test_a_worker_that_dies_repeats_its_draw_and_is_charged_once(make_config, ray_session, monkeypatch, secure):
    given = dict(method__name="ffa", privacy={"epsilon": 3.0, "secure_aggregation": secure})
    whole = run(make_config(**given))
    folder = run(sabotaged(make_config, monkeypatch, "dies", **given))
    assert (folder / "flag").exists()
    same_bits(whole, folder)
    assert {c: [e.round for e in es] for c, es in ledger(folder).entries.items()} == {c: [0, 1, 2, 3] for c in CLIENTS}


def test_report_of_a_run_that_is_not_finished(make_config, monkeypatch, tmp_path, capsys):
    config = make_config(method__name="ffa")
    killed_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    folder = Path(config.output.dir)
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "not finished: 2 rounds so far" in page and "<svg" in page and "Privacy" not in page
    assert main(["report", str(tmp_path)]) == 2 and "no run directory with a finished round" in capsys.readouterr().err
    assert main(["report"]) == 2


def test_plan_shows_noise_steps_epsilon_and_signal_before_anything_runs(make_config, tmp_path, capsys):
    config = make_config(
        method__name="ffa",
        privacy={"epsilon": 2.0},
        clients={"client-1": {"local_steps": 5}, "client-0": {}, "client-2": {}},
    )
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert main(["plan", "--config", str(tmp_path / "c.yaml"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["privacy"]
    assert list(told) == list(CLIENTS) and [told[c]["steps"] for c in CLIENTS] == [6, 15, 6]
    for p in told.values():
        assert p["noise"] > 0 and 1.95 < p["epsilon"] <= 2.0 and 0 < p["signal_to_noise"] < 10 and p["delta"] == 1e-3
    assert main(["plan", "--config", str(tmp_path / "c.yaml")]) == 0
    assert "privacy by example" in capsys.readouterr().out
    assert not Path(config.output.dir).exists()
