"""The ledger: the same whenever a run is killed, and a run without it does not go on."""

from pathlib import Path

import pytest
from private_runs import CLIENTS, killed_after, ledger, resumed
from support import run, same_bits

from fedray.cli import main
from fedray.errors import ConfigError
from fedray.federation import round as rounds_of
from fedray.federation.channels.example import ExampleLevel
from fedray.federation.channels.plain import Plain
from fedray.federation.coordinator import Coordinator
from fedray.privacy.keys import TEST_KEY


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


def _keys(folder: Path) -> list[Path]:
    return [path for path in (folder / "keys").rglob("*") if path.is_file() and path.suffix != ".jsonl"]


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
