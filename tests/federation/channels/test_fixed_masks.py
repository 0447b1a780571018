"""A secure run whose masks a test's word has fixed says so wherever it says anything."""

import json
import os
from pathlib import Path

import pytest
import yaml
from private_runs import killed_after, resumed
from support import run

from fedray.cli import main
from fedray.privacy.keys import TEST_KEY

SECURE = dict(method__name="ffa", privacy={"secure_aggregation": True}, federation__rounds=2)


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def page_of(folder: Path) -> str:
    assert main(["report", str(folder)]) == 0
    return (folder / "report.html").read_text()


@pytest.mark.parametrize("fixed", [True, False])
def test_a_secure_run_alone_says_whether_its_masks_were_fixed(make_config, monkeypatch, tmp_path, capsys, fixed):
    if not fixed:
        monkeypatch.delenv(TEST_KEY)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(yaml.safe_load(make_config(**SECURE).to_yaml())))
    assert main(["run", "--config", str(tmp_path / "c.yaml")]) == 0
    folder = Path(yaml.safe_load((tmp_path / "c.yaml").read_text())["output"]["dir"])
    before, _, after = capsys.readouterr().out.partition("round   1")
    assert summary_of(folder)["masks_were_fixed"] is fixed
    for told in (before, after, page_of(folder)):
        assert (TEST_KEY in told and "not secure" in told.lower()) is fixed


@pytest.mark.parametrize("fixed_first", [True, False])
def test_masks_that_were_fixed_in_any_part_of_a_run_are_said(make_config, monkeypatch, fixed_first):
    config, word = make_config(**SECURE), os.environ[TEST_KEY]
    if not fixed_first:
        monkeypatch.delenv(TEST_KEY)
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    folder = Path(config.output.dir)
    assert (TEST_KEY in page_of(folder)) is fixed_first  # of a run that is not finished, too
    monkeypatch.delenv(TEST_KEY) if fixed_first else monkeypatch.setenv(TEST_KEY, word)
    assert summary_of(run(resumed(config)))["masks_were_fixed"] is True
    assert TEST_KEY in page_of(folder)


def test_a_run_without_secure_sums_says_nothing_of_masks(make_config):
    folder = run(make_config(method__name="ffa", federation__rounds=1))
    assert "masks_were_fixed" not in summary_of(folder) and TEST_KEY not in page_of(folder)
