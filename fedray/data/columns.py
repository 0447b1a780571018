"""Columns of the data by the config key that names them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedray.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

_TEXT_COLUMNS = ("text", "sentence", "content", "question", "instruction", "messages", "conversations")


def require_column(dataset: Dataset, column: str, key: str) -> str:
    """The column itself. Raises ConfigError, naming the key and the columns there are."""
    if column not in dataset.column_names:
        raise ConfigError(
            f"{key} '{column}' is not a column of the data: choose one of {', '.join(dataset.column_names)}"
        )
    return column


def text_column(text: str | None, dataset: Dataset) -> str:
    """The column that `data.text` names, or the first usual one. Raises ConfigError when it is not there."""
    columns = dataset.column_names
    if text is not None:
        return require_column(dataset, text, "data.text")
    usual = next((c for c in _TEXT_COLUMNS if c in columns), None)
    if usual is None:
        raise ConfigError(f"data.text is not given and no usual column is there: choose one of {', '.join(columns)}")
    return usual
