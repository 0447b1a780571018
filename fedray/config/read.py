"""How a config is read: from plain values, a YAML file, flags, or another config with some keys changed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedray.argv import flags
from fedray.config.checks import check
from fedray.config.sections import ClientSection, Config
from fedray.errors import ConfigError, nearest

# --- from values ------------------------------------------------------------------------------------------------


def from_dict(values: Mapping[str, Any]) -> Config:
    """A config from nested plain values: the one constructor that checks what goes together. Raises ConfigError."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise _sentence(error) from None
    try:
        check(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return config


def merged(config: Config, changes: Mapping[str, Any]) -> Config:
    """A config with some dotted keys (`section.key`, `clients.NAME.key`) set to plain values; None unsets.

    Raises ConfigError, as `from_dict` does and for an unknown key.
    """
    values = config.model_dump(mode="json", exclude_unset=True)
    for key, value in changes.items():
        values = _placed(values, _path(key), value)
    return from_dict(values)


def read_config(argv: Sequence[str]) -> Config:
    """The config that `[--config F.yaml] [--section.key value ...]` means; flags win over the file.

    `--flag=value` and a lone `--flag` (true) are read too; `null` unsets.
    Raises ConfigError with one sentence that names the fix.
    """
    values: dict[str, Any] = {}
    changes: list[tuple[list[str], str | None]] = []
    for key, value in flags(argv):
        if key == "config":
            values = _over(values, read_file(value))
        else:
            changes.append((_path(key), None if value in ("null", "none", "None") else value))
    for path, change in changes:
        values = _placed(values, path, change)
    return from_dict(values)


def read_file(path: str) -> dict[str, Any]:
    """A YAML config as nested plain values. Raises ConfigError when it is missing or not a mapping."""
    if not Path(path).is_file():
        raise ConfigError(f"config file '{path}' does not exist")
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file '{path}' is not YAML: {' '.join(str(error).split())}") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"config file '{path}' must hold sections such as 'model:' and 'data:'")
    return values or {}


def _path(key: str) -> list[str]:
    """The parts of a dotted key. Raises ConfigError for an unknown one."""
    # A client's name may hold dots itself; its keys do not.
    if client := re.fullmatch(r"clients\.(.+)\.(\w+)", key):
        return ["clients", client[1], client[2]]
    if key not in known_keys():
        raise _unknown(key)
    return key.split(".")


def _placed(values: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Nested values with one of them set, whatever stood there."""
    first, *rest = path
    if not rest:
        return {**values, first: value}
    below = values.get(first)
    return {**values, first: _placed(below if isinstance(below, dict) else {}, rest, value)}


def _over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with those of `over` in place of theirs."""
    values = dict(base)
    for name, value in over.items():
        below = values.get(name)
        values[name] = _over(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return values


def _unknown(key: str) -> ConfigError:
    return ConfigError(f"unknown key '{key}'{nearest(key, known_keys())}")


def _sentence(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if path.startswith("adapter.rank."):  # the rest names a branch of its union
        path = "adapter.rank"
    if first["type"] == "extra_forbidden":
        return _unknown(path)
    message = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{path}: {message[0].lower()}{message[1:]}, not {first['input']!r}" if path else message)


# --- its keys ---------------------------------------------------------------------------------------------------


class HelpLine(NamedTuple):
    """One key of the config: its default as text, and what it means."""

    key: str
    default: str
    doc: str


def known_keys() -> list[str]:
    """All dotted keys of a config."""
    return [line.key for line in help_lines()]


def help_lines() -> list[HelpLine]:
    """(key, default, doc) of every key, for `--help` and for the documentation."""
    return [line for _, line in _lines(Config)]


def help_groups() -> list[tuple[str, list[HelpLine]]]:
    """The lines in order, options under the names of the methods or adapters that have them, others under ''."""
    return [(group, [line for _, line in lines]) for group, lines in groupby(_lines(Config), key=lambda one: one[0])]


def _lines(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, HelpLine]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _lines(info.annotation, f"{prefix}{name}.")
        elif name == "clients" and model is Config:
            yield from _lines(ClientSection, "clients.NAME.")
        else:
            yield _line(prefix + name, info)


def _line(key: str, info: FieldInfo) -> tuple[str, HelpLine]:
    """A key's heading and its line."""
    extra, default = info.json_schema_extra, "" if info.default is None else str(info.default)
    group = str(extra["group"]) if isinstance(extra, dict) else ""
    return group, HelpLine(key, default, " ".join((info.description or "").split()))
