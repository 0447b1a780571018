"""Copies of a client's data that a run leaves on disk are no more readable than the data."""

import os
import stat
from pathlib import Path

import datasets
import pytest
from support import run

from fedray.config.sections import DataSection
from fedray.data.sources import load_splits
from fedray.errors import ConfigError

PEOPLE = stat.S_IRWXG | stat.S_IRWXO


def open_to_others(folder: Path) -> list[Path]:
    """Every file that someone else could come to and read: by its own mode, and by that of each folder above it."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if Path(place, f).stat().st_mode & PEOPLE]
        found += [Path(place, f) for f in files if Path(place, f).stat().st_mode & PEOPLE]
    return found


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The data sets' cache, as if it were empty and open to all."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o755)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    return folder


@pytest.fixture(params=["jsonl", "csv"])
def secret(request, tmp_path) -> Path:
    """A file that its owner alone may read."""
    file = tmp_path / f"ward.{request.param}"
    file.write_text({"jsonl": '{"text": "flu"}\n', "csv": "text\nflu\n"}[request.param] * 3)
    file.chmod(0o600)
    return file


def test_what_is_copied_of_a_source_is_its_owners_alone(secret, cache):
    rows, _ = load_splits(DataSection(source=str(secret)))
    copies = [Path(file["filename"]) for file in rows.cache_files]
    assert copies and all(cache in copy.parents for copy in copies)  # there is one, and it is seen below
    assert open_to_others(cache) == []
    assert load_splits(DataSection(source=str(secret)))[0][:] == rows[:]  # from the copy


def test_a_whole_run_leaves_no_copy_for_others(make_config, tiny, tmp_path, cache):
    source = tmp_path / "texts.jsonl"
    source.write_text((tiny / "text.jsonl").read_text())
    source.chmod(0o600)
    run(make_config(data={"source": str(source), "max_length": 48}, federation__rounds=1))
    assert any(cache.rglob("*.arrow")) and open_to_others(cache) == []


def test_a_folder_of_copies_that_could_be_read_is_closed(secret, cache):
    load_splits(DataSection(source=str(secret)))
    (folder,) = cache.iterdir()
    folder.chmod(0o755)
    load_splits(DataSection(source=str(secret)))
    assert open_to_others(cache) == []


@pytest.mark.parametrize("planted", ["link", "writable", "other owner"])
def test_a_folder_of_copies_that_another_could_change_is_refused(secret, cache, monkeypatch, planted):
    load_splits(DataSection(source=str(secret)))
    (folder,) = cache.iterdir()
    if planted == "link":
        folder.rename(cache / "elsewhere")
        folder.symlink_to(cache / "elsewhere")
    elif planted == "writable":
        folder.chmod(0o777)
    else:
        there = folder.name.replace(str(os.getuid()), str(os.getuid() + 1))
        folder.rename(cache / there)
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        (cache / there).chmod(0o700)
        assert (cache / there).stat().st_uid != other
    with pytest.raises(ConfigError, match=r"HF_DATASETS_CACHE\) .* give another place"):
        load_splits(DataSection(source=str(secret)))
