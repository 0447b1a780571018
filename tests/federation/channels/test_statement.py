"""What `privacy.json` and the terminal say of a run."""

import json
import os
from pathlib import Path

import pytest
from private_runs import killed_after, resumed
from support import ROOT, run

from fedray.cli import main
from fedray.federation.prepare import prepare
from fedray.privacy.keys import TEST_KEY


def test_the_run_directory_says_what_left_and_what_is_not_guaranteed(make_config, monkeypatch):
    monkeypatch.delenv(TEST_KEY)
    config = make_config(
        task="classification",
        method__name="fed-sb",
        adapter={"kind": "lora-sb", "rank": 2, "subspace": "private"},
        privacy={"epsilon": 4.0, "secure_aggregation": True},
    )
    (Path(config.output.dir).parent / "c.yaml").write_text(config.to_yaml())
    assert main(["run", "--config", str(Path(config.output.dir).parent / "c.yaml")]) == 0
    folder = Path(config.output.dir)
    told = json.loads((folder / "privacy.json").read_text())
    assert told["guarantee"]["epsilon"] == json.loads((folder / "summary.json").read_text())["epsilon"] <= 4.0
    assert (
        told["guarantee"]["void"] is None
        and told["guarantee"]["relation"] == "add-or-remove-one"
        and told["rounds"] == 3
    )
    assert {r["what"] for r in told["releases"]["client-0"]} == {"count", "subspace", "training"}
    words = json.dumps(told["left_each_client"])
    assert all(
        w in words for w in ("number of examples", "sketches", "trained factors", "secure sum", "identity of its key")
    )
    here = ROOT / "fedray"
    for entry in [*told["left_each_client"], *told["not_guaranteed"]]:
        place, _, name = entry["place"].partition(", ")
        source = (here / place).read_text()  # every place it names is there
        assert all(part in source for part in name.split(".") if part), entry
    assert {e["severity"] for e in told["not_guaranteed"]} == {"high", "medium", "low"}
    page = (folder / "report.html").read_text()
    assert (
        "What left each client" in page
        and "What is not guaranteed" in page
        and "<svg" in page
        and "epsilon spent" in page
    )
    # No count of anybody's examples stands anywhere: rates are of noised ones.
    counts = {
        c: len(d)
        for c, d in prepare(
            config.model_copy(update={"output": config.output.model_copy(update={"dir": None})})
        ).data.train.items()
    }
    noised = json.loads((folder / "checkpoint" / "ledger.json").read_text())["counts"]
    assert set(noised) == set(counts) and any(noised[c] != counts[c] for c in counts)


@pytest.mark.parametrize("privacy", [{"epsilon": 3.0}, {"epsilon": 8.0, "unit": "client"}], ids=["example", "client"])
@pytest.mark.parametrize("fixed_first", [True, False])
def test_a_key_that_was_fixed_for_any_part_of_a_run_voids_the_guarantee(make_config, monkeypatch, privacy, fixed_first):
    config = make_config(method__name="ffa", privacy=privacy, federation__rounds=3)
    word = os.environ[TEST_KEY]
    if not fixed_first:
        monkeypatch.delenv(TEST_KEY)
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    monkeypatch.delenv(TEST_KEY) if fixed_first else monkeypatch.setenv(TEST_KEY, word)
    told = json.loads((run(resumed(config)) / "privacy.json").read_text())["guarantee"]
    assert told["epsilon"] is None and TEST_KEY in told["void"]


def test_what_is_called_private_is(make_config, capsys):
    from fedray.report.console import run_privacy

    summary = {"epsilon": 3.0, "delta": 1e-5, "keys_were_fixed": False}
    assert run_privacy(summary).startswith("private: epsilon 3 at delta 1e-05")
    assert run_privacy(summary | {"epsilon": 2e6}).startswith("hardly private: epsilon 2e+06")
    assert run_privacy(summary | {"keys_were_fixed": True}).startswith("not private")
    told = json.loads((run(make_config(method__name="ffa", privacy={"noise": 1e-2})) / "privacy.json").read_text())
    assert told["guarantee"]["void"]


def test_a_fixed_key_voids_the_guarantee(make_config):
    folder = run(make_config(method__name="ffa", privacy={"epsilon": 4.0}))
    told = json.loads((folder / "privacy.json").read_text())
    assert os.environ[TEST_KEY] and TEST_KEY in told["guarantee"]["void"] and told["guarantee"]["epsilon"] is None
