"""The ledger: the same whenever a run is killed, and a run without it does not go on."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from private_runs import CLIENTS, killed_after, ledger, resumed
from support import rounds, run, same_bits

from fedray.cli import main
from fedray.errors import ConfigError
from fedray.federation import round as rounds_of
from fedray.federation.channels.example import ExampleLevel
from fedray.federation.channels.plain import Plain
from fedray.federation.coordinator import Coordinator
from fedray.privacy.accountant import Release
from fedray.privacy.keys import TEST_KEY, KeyStore
from fedray.privacy.ledger import Ledger


def test_killed_at_any_moment_of_a_round_the_ledger_says_the_same(make_config, monkeypatch):
    """Before training (charged, not trained), between training and aggregation, and after aggregation without a
    checkpoint."""
    given = dict(method__name="ffa", privacy={"epsilon": 3.0}, federation__rounds=3)
    whole = run(make_config(**given))

    def dying(owner, name, which):
        calls, real = [], getattr(owner, name)

        def dies(*args, **kw):
            calls.append(1)
            if len(calls) == which:
                raise KeyboardInterrupt
            return real(*args, **kw)

        return dies

    # The last round takes the whole budget: it must be affordable again.
    for owner, name, which in (
        (ExampleLevel, "train", 2),
        (Plain, "collect", 2),
        (Coordinator, "publish", 3),
        (rounds_of, "evaluate", 2),
        (Coordinator, "_save", 2),
        (ExampleLevel, "train", 3),
        (Plain, "collect", 3),
        (Coordinator, "_save", 3),
    ):
        config = make_config(**given)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying(owner, name, which))
            with pytest.raises(KeyboardInterrupt):
                run(config)
        folder = run(resumed(config))
        same_bits(whole, folder)
        assert {c: [e.round for e in es] for c, es in ledger(folder).entries.items()} == {
            c: [0, 1, 2, 3] for c in CLIENTS
        }


def test_a_run_whose_ledger_is_gone_is_not_resumed(make_config, monkeypatch):
    config = make_config(method__name="ffa", privacy={"epsilon": 3.0})
    killed_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    (Path(config.output.dir) / "checkpoint" / "ledger.json").unlink()
    with pytest.raises(ConfigError, match="lost its checkpoint/ledger.json, so nobody knows what it has spent"):
        run(resumed(config))


@pytest.mark.parametrize("privacy", [{"epsilon": 3.0}, {"epsilon": 8.0, "unit": "client"}])
def test_a_ledger_from_an_older_copy_is_not_believed(make_config, monkeypatch, privacy):
    """It would say less than was spent: neither beside newer checkpoints, nor with checkpoints as old."""
    config = make_config(method__name="ffa", privacy=privacy)
    checkpoint, copies = Path(config.output.dir) / "checkpoint", Path(config.output.dir).parent / "copies"
    for again, round in ((config, 1), (resumed(config), 3)):
        with monkeypatch.context() as patch:
            killed_after(patch, round)
            with pytest.raises(KeyboardInterrupt):
                run(again)
        if again is config:
            shutil.copytree(checkpoint, copies)
    newest = (checkpoint / "ledger.json").read_bytes()
    shutil.copy(copies / "ledger.json", checkpoint / "ledger.json")
    with pytest.raises(ConfigError, match="is an older copy of the ledger, or was changed"):
        run(resumed(config))
    shutil.move(KeyStore().folder / "ledgers", copies / "witnesses")  # on another machine the checkpoint still knows
    with pytest.raises(ConfigError, match="is an older copy of the ledger, or was changed"):
        run(resumed(config))
    shutil.move(copies / "witnesses", KeyStore().folder / "ledgers")
    shutil.move(checkpoint, copies / "newer")
    shutil.copytree(copies, checkpoint, ignore=shutil.ignore_patterns("newer"))  # all of it brought back as it was
    with pytest.raises(ConfigError, match="is an older copy of the ledger, or was changed"):
        run(resumed(config))
    shutil.rmtree(checkpoint)
    shutil.move(copies / "newer", checkpoint)
    (checkpoint / "ledger.json").write_bytes(newest)
    assert len(rounds(run(resumed(config)))) == 3


def test_a_ledger_that_is_gone_before_the_first_checkpoint_is_missed(make_config, monkeypatch):
    config = make_config(privacy={"noise": 1.0})
    killed_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    checkpoint = Path(config.output.dir) / "checkpoint"
    assert not list(checkpoint.glob("round-*"))
    (checkpoint / "ledger.json").unlink()
    with pytest.raises(ConfigError, match="lost its checkpoint/ledger.json, so nobody knows what it has spent"):
        run(resumed(config))


def test_a_ledger_follows_what_it_was_and_nothing_else():
    old = Ledger("run")
    for round in range(5):
        old.charge("a", f"draw-{round}", Release("training", 1.0, 0.5, 2), round)
    mark = json.loads(json.dumps(old.mark()))
    newer = Ledger("run")
    for round in range(9):
        newer.charge("a", f"draw-{round}", Release("training", 1.0, 0.5, 2), round)
    assert newer.follows(mark) and old.follows(mark) and not old.follows(newer.mark())
    changed = Ledger("run", entries={"a": [dataclasses.replace(old.entries["a"][0], draw="x"), *old.entries["a"][1:]]})
    assert not changed.follows(mark) and not Ledger("other", entries=newer.entries).follows(mark)
    assert not Ledger("run").follows(mark)


def _keys(folder: Path) -> list[Path]:
    return [path for path in (folder / "keys").rglob("*") if path.is_file() and not path.suffix]


def test_forgetting_a_run_that_will_not_go_on_removes_its_keys(make_config, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv(TEST_KEY)
    for privacy, count in (({"epsilon": 3.0}, 3), ({"epsilon": 8.0, "unit": "client"}, 1)):
        config = make_config(method__name="ffa", privacy=privacy | {"key_dir": str(tmp_path / "keys")})
        with monkeypatch.context() as patch:
            killed_after(patch, 2)
            with pytest.raises(KeyboardInterrupt):
                run(config)
        folder = Path(config.output.dir)
        assert len(_keys(tmp_path)) == count
        journals = list((tmp_path / "keys").rglob("*.jsonl"))
        assert not [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size == 32]
        assert main(["forget", str(folder)]) == 0 and f"{count} noise key" in capsys.readouterr().out
        assert not _keys(tmp_path)
        assert all(journal.is_file() for journal in journals)  # nobody asks anew for what was answered
    assert (
        main(["forget", str(run(make_config(method__name="ffa")))]) == 2 and "no private run" in capsys.readouterr().err
    )
