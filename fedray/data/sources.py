"""Where examples come from: the hub, local files, the built-in corpus. Returns `datasets.Dataset`s, memory-mapped."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset

from fedray.config.sections import BUILTIN, DataSection
from fedray.data import builtin
from fedray.data.owned import owned_folder
from fedray.errors import ConfigError

_LOADERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_splits(
    data: DataSection, source: str | None = None, split: str | None = None
) -> tuple[Dataset, Dataset | None]:
    """(training examples, held-out examples or None) of `data.source`, or of a client's own source; `split`: another
    than the test split.

    Raises ConfigError when the source is missing, of an unknown kind, unreadable, or lacks the training split.
    """
    source, split = source or data.source, split or data.test_split
    if source == BUILTIN:
        return _builtin()
    splits, lacking = _open(data, source, (data.train_split, split))
    if data.train_split not in splits:
        raise ConfigError(f"data source '{source}' has no split '{data.train_split}': {lacking}")
    return splits[data.train_split], splits.get(split)


def load_held_out(data: DataSection, split: str) -> Dataset | None:
    """That split of `data.source`, which may hold nothing else; None where it is not there (the built-in corpus names
    none). Raises ConfigError as `load_splits`."""
    return None if data.source == BUILTIN else _open(data, data.source, (split,))[0].get(split)


def _builtin() -> tuple[Dataset, Dataset]:
    disable_progress_bars()
    try:
        train, held_out = builtin.client_texts()
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None
    return Dataset.from_list(train), Dataset.from_list(held_out)


def _open(data: DataSection, source: str, wanted: tuple[str, ...]) -> tuple[DatasetDict, str]:
    """The splits of a source (of a folder: those of `wanted` that are there), and what to say where the training
    split is lacking."""
    disable_progress_bars()
    path = Path(source)
    if data.subset is not None and path.exists():
        raise ConfigError(f"data.subset belongs to hub data sets, but '{source}' is local: leave it out")
    if path.is_dir():
        files = {name: _split_file(path, name) for name in wanted}
        splits = DatasetDict({name: _read(file) for name, file in files.items() if file is not None})
        return splits, f"the folder holds no {data.train_split}{{{','.join(_LOADERS)}}}"
    if path.is_file():
        return DatasetDict({data.train_split: _read(path)}), ""
    if _looks_local(source):
        raise ConfigError(f"data source '{source}' does not exist: give a file, a folder or a hub id")
    splits = _from_hub(source, data.subset)
    return splits, f"it has {', '.join(splits)}"


def _looks_local(source: str) -> bool:
    """Whether a source that does not exist here was meant as a path."""
    path = Path(source)
    if path.suffix in _LOADERS or path.is_absolute() or source.startswith((".", "~")):
        return True
    return not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)


def _split_file(folder: Path, split: str) -> Path | None:
    return next((folder / f"{split}{suffix}" for suffix in _LOADERS if (folder / f"{split}{suffix}").is_file()), None)


def _read(file: Path) -> Dataset:
    if file.suffix not in _LOADERS:
        raise ConfigError(f"data source '{file}' must end in {', '.join(_LOADERS)}")
    options: dict[str, Any] = {}
    if file.suffix in (".csv", ".tsv"):
        options["keep_default_na"] = False  # "null" and "NA" are words
    if file.suffix == ".tsv":
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    options["cache_dir"] = str(_copies())
    try:
        read: Dataset = load_dataset(_LOADERS[file.suffix], data_files=str(file), split="train", **options)
    except Exception as error:  # the readers below raise their own many kinds
        raise ConfigError(f"data source '{file}' cannot be read: {_first_line(error)}") from error
    _check_text(str(file), {"train": read})
    return read


def _check_text(source: str, splits: Mapping[str, Dataset]) -> None:
    """Raises ConfigError for text that is no UTF-8, which some readers let through. Reads every byte once."""
    for split, dataset in splits.items():
        for name, column in zip(dataset.data.table.column_names, dataset.data.table.columns, strict=True):
            try:
                column.validate(full=True)
            except pa.ArrowInvalid as error:
                raise ConfigError(
                    f"data source '{source}' cannot be read: column '{name}' of {split} holds text that is no UTF-8: "
                    "write the file anew in UTF-8 (iconv -f latin1 -t utf-8)"
                ) from error


def _copies() -> Path:
    """Where local files are kept in the form that is mapped: closed to others, since the copies outlive the run and are
    made for all to read, whatever their source allows."""
    place = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / f"fedray-{os.getuid()}"
    folder = owned_folder(place, "the data sets' cache (HF_DATASETS_CACHE)")
    folder.chmod(0o700)
    return folder


def _from_hub(name: str, subset: str | None) -> DatasetDict:
    try:
        read: DatasetDict = load_dataset(name, subset)
    except Exception as error:  # hub, network and reader errors alike
        raise ConfigError(
            f"data source '{name}' is neither a file nor a folder, and the hub did not give it: {_first_line(error)}"
        ) from error
    _check_text(name, read)
    return read


def _first_line(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
