"""Checkpoints in a second place: what is there after every kill, and a run that goes on from there alone."""

import dataclasses
import json
import shutil
from pathlib import Path

import fsspec
import pytest
from support import run, same_bits

from fedray.errors import ConfigError, RoundError
from fedray.federation import checkpoint, storage
from fedray.federation import round as rounds_of
from fedray.federation.folder import check_storage
from fedray.federation.prepare import prepare
from fedray.federation.storage import COMPLETE, Storage

OPTIONS = {"federation__rounds": 5, "federation__keep_optimizer": True}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(storage, "PAUSE", 0.0)


@pytest.fixture(params=["file", "memory"])
def place(request, tmp_path):
    """A URI that pyarrow knows, and one that only fsspec does."""
    yield f"file://{tmp_path}/far/away" if request.param == "file" else "memory://far/away"
    fsspec.filesystem("memory").store.clear()


def names(uri):
    return Storage(uri).rounds()


def with_output(config, **update):
    return config.model_copy(update={"output": config.output.model_copy(update=update)})


def stopped(config, after, monkeypatch):
    """The folder of a run that ends with its process after so many checkpoints."""
    real, saves = checkpoint.save, []

    def dies(*args):
        real(*args)
        saves.append(1)
        if len(saves) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    return Path(config.output.dir)


def test_a_run_whose_directory_is_gone_goes_on_from_the_second_place(make_config, place, monkeypatch):
    whole = run(make_config(**OPTIONS))
    config = with_output(make_config(**OPTIONS), checkpoints=place)
    folder = stopped(config, 3, monkeypatch)
    assert names(place) == ["round-00002", "round-00003"]
    shutil.rmtree(folder)
    same_bits(whole, run(with_output(config, resume=True)))
    assert names(place) == ["round-00004", "round-00005"]


def test_as_many_are_kept_as_are_asked_for_in_both_places(make_config, place):
    config = with_output(make_config(**OPTIONS), checkpoints=place, keep=3)
    folder = run(config)
    kept = ["round-00003", "round-00004", "round-00005"]
    assert names(place) == kept == sorted(p.name for p in (folder / "checkpoint").glob("round-*"))
    one = run(with_output(make_config(**OPTIONS), keep=1))
    assert [p.name for p in (one / "checkpoint").glob("round-*")] == ["round-00005"]


def test_what_was_not_completed_is_as_if_it_were_not_there(make_config, tmp_path, monkeypatch):
    place = f"file://{tmp_path}/far"
    config = with_output(make_config(**OPTIONS), checkpoints=place)
    folder = stopped(config, 3, monkeypatch)
    (tmp_path / "far" / "round-00003" / COMPLETE).unlink()  # killed while it was written
    (tmp_path / "far" / "round-00003" / "tensors.safetensors").write_bytes(b"half")
    shutil.rmtree(folder)
    assert names(place) == ["round-00002"]
    same_bits(run(make_config(**OPTIONS)), run(with_output(config, resume=True)))
    assert names(place) == ["round-00004", "round-00005"]


def failing(times):
    """pyarrow's copy, which the network fails so often."""
    from pyarrow import fs

    left, real = [times], fs.copy_files

    def copy(*args):
        if left[0]:
            left[0] -= 1
            raise OSError("connection reset by peer")
        return real(*args)

    return copy


def test_a_network_that_fails_a_few_times_costs_nothing(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr("pyarrow.fs.copy_files", failing(storage.ATTEMPTS - 1))
    place = f"file://{tmp_path}/far"
    run(with_output(make_config(**OPTIONS), checkpoints=place))
    assert names(place) == ["round-00004", "round-00005"]


def test_one_that_stays_away_ends_the_run_which_goes_on_from_its_own_directory(make_config, tmp_path, monkeypatch):
    config = with_output(make_config(**OPTIONS), checkpoints=f"file://{tmp_path}/far")
    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.fs.copy_files", failing(10**6))
        with pytest.raises(RoundError, match="could not be written to output.checkpoints .*connection reset"):
            run(config)
    assert names(config.output.checkpoints) == []
    same_bits(run(make_config(**OPTIONS)), run(with_output(config, resume=True)))


def test_another_runs_place_is_refused_before_anything_starts(make_config, place):
    config = with_output(make_config(**OPTIONS), checkpoints=place)
    run(config)
    other = with_output(make_config(**OPTIONS, seed=5), checkpoints=place, resume=True)
    with pytest.raises(ConfigError, match=r"holds a run with another seed \(0, now 5\)"):
        prepare(other)
    again = with_output(make_config(**OPTIONS), checkpoints=place)
    with pytest.raises(ConfigError, match="holds such a run: go on with it by --output.resume"):
        prepare(again)
    check_storage(with_output(again, resume=True), False)
    assert not Path(other.output.dir).exists() and not Path(again.output.dir).exists()


@pytest.mark.parametrize("uri, words", [("far/away", "is no URI"), ("nowhere://x/y", "cannot be reached")])
def test_a_place_that_nothing_reaches_is_refused(make_config, uri, words):
    with pytest.raises(ConfigError, match=words):
        prepare(with_output(make_config(), checkpoints=uri))


def test_a_private_run_keeps_its_ledger_where_it_is_charged(make_config):
    with pytest.raises(ConfigError, match="without the ledger"):
        make_config(privacy={"noise": 1.0}, output={"dir": "x", "checkpoints": "s3://b/x"})


def test_the_best_rounds_checkpoint_comes_back_too(make_config, tmp_path, monkeypatch):
    place, numbers = f"file://{tmp_path}/far", iter([9.0, 8.0, 7.0, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0])
    real = rounds_of.evaluate

    def evaluate(server):
        found = real(server)
        return dataclasses.replace(found, metrics=found.metrics | {"bits_per_byte": next(numbers)})

    monkeypatch.setattr(rounds_of, "evaluate", evaluate)
    options = {"federation__rounds": 8, "federation__best_round": True, "data__evaluate_on": "validation"}
    config = with_output(make_config(**options), checkpoints=place)
    folder = stopped(config, 6, monkeypatch)
    assert names(place) == ["round-00004", "round-00005", "round-00006"]
    shutil.rmtree(folder)
    folder = run(with_output(config, resume=True))
    assert json.loads((folder / "summary.json").read_text())["result_round"] == 4
    assert names(place) == ["round-00004", "round-00007", "round-00008"]


def test_an_older_directory_gives_way_to_a_newer_second_place(make_config, tmp_path, monkeypatch):
    place = f"file://{tmp_path}/far"
    config = with_output(make_config(**OPTIONS), checkpoints=place)
    folder = stopped(config, 3, monkeypatch)
    shutil.rmtree(folder / "checkpoint" / "round-00003")  # a copy from yesterday
    same_bits(run(make_config(**OPTIONS)), run(with_output(config, resume=True)))


def test_what_a_killed_process_was_writing_is_removed(make_config):
    config = make_config(**OPTIONS)
    left = Path(config.output.dir) / "checkpoint" / ".writing-1"
    real = checkpoint.save

    def save(folder, *args):
        left.mkdir(parents=True, exist_ok=True)
        real(folder, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        run(config)
    assert not list((Path(config.output.dir) / "checkpoint").glob(".writing-*"))
