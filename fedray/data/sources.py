"""Where examples come from: the hub, local files, the built-in corpus. Returns `datasets.Dataset`s, memory-mapped."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset

from fedray.config.sections import BUILTIN, Config, DataSection
from fedray.data import builtin
from fedray.errors import ConfigError

_LOADERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_TEXT_COLUMNS = ("text", "sentence", "content", "question", "instruction")


def load_splits(
    data: DataSection, source: str | None = None, split: str | None = None, trains: bool = True
) -> tuple[Dataset | None, Dataset | None]:
    """(training examples, held-out examples or None) of `data.source`, or of a client's own source; `split`: another than the test split.
    `trains=False`: only the held-out ones are wanted, and a folder may hold nothing else.

    Raises ConfigError when the source is missing, of an unknown kind, unreadable, or lacks the training split.
    """
    source, split = source or data.source, split or data.test_split
    disable_progress_bars()
    if source == BUILTIN:
        try:
            train, held_out = builtin.client_texts()
        except FileNotFoundError as error:
            raise ConfigError(str(error)) from None
        return Dataset.from_list(train), Dataset.from_list(held_out)
    path = Path(source)
    if data.subset is not None and path.exists():
        raise ConfigError(f"data.subset belongs to hub data sets, but '{source}' is local: leave it out")
    if path.is_dir():
        splits = DatasetDict(
            {
                name: _read(file)
                for name in ((data.train_split, split) if trains else (split,))
                if (file := _split_file(path, name))
            }
        )
        known = f"the folder holds no {data.train_split}{{{','.join(_LOADERS)}}}"
    elif path.is_file():
        splits, known = DatasetDict({data.train_split: _read(path)}), ""
    elif (
        path.suffix in _LOADERS
        or path.is_absolute()
        or source.startswith((".", "~"))
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
    ):
        raise ConfigError(f"data source '{source}' does not exist: give a file, a folder or a hub id")
    else:
        splits = _from_hub(source, data.subset)
        known = f"it has {', '.join(splits)}"
    if trains and data.train_split not in splits:
        raise ConfigError(f"data source '{source}' has no split '{data.train_split}': {known}")
    return splits.get(data.train_split), splits.get(split)


def _split_file(folder: Path, split: str) -> Path | None:
    return next((folder / f"{split}{suffix}" for suffix in _LOADERS if (folder / f"{split}{suffix}").is_file()), None)


def _read(file: Path) -> Dataset:
    if file.suffix not in _LOADERS:
        raise ConfigError(f"data source '{file}' must end in {', '.join(_LOADERS)}")
    options = {}
    if file.suffix in (".csv", ".tsv"):
        options["keep_default_na"] = False  # "null" and "NA" are words
    if file.suffix == ".tsv":
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    try:
        return load_dataset(_LOADERS[file.suffix], data_files=str(file), split="train", **options)
    except Exception as error:  # the readers below raise their own many kinds
        raise ConfigError(f"data source '{file}' cannot be read: {_first_line(error)}") from error


def _from_hub(name: str, subset: str | None) -> DatasetDict:
    try:
        return load_dataset(name, subset)
    except Exception as error:  # hub, network and reader errors alike
        raise ConfigError(
            f"data source '{name}' is neither a file nor a folder, and the hub did not give it: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def text_column(config: Config, dataset: Dataset) -> str:
    """The column `data.text` names, or the first usual one. Raises ConfigError when it is not there."""
    columns = dataset.column_names
    if config.data.text is not None:
        return require_column(dataset, config.data.text, "data.text")
    found = next((c for c in _TEXT_COLUMNS if c in columns), None)
    if found is None:
        raise ConfigError(f"data.text is not given and no usual column is there: choose one of {', '.join(columns)}")
    return found


def require_column(dataset: Dataset, column: str, key: str) -> str:
    """The column itself. Raises ConfigError, naming the key and the columns there are."""
    if column not in dataset.column_names:
        raise ConfigError(
            f"{key} '{column}' is not a column of the data: choose one of {', '.join(dataset.column_names)}"
        )
    return column
