"""Where a run's results go, and whether a run may go on there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fedray.config.read import from_dict
from fedray.config.sections import BUILTIN, Config
from fedray.errors import ConfigError
from fedray.federation.buffered import read_log
from fedray.federation.channels.registry import check_resumable
from fedray.federation.results import read_run_config
from fedray.federation.storage import storage_of

#: Set by Ray for the entrypoint of a submitted job.
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def rooted(config: Config) -> Config:
    """The config with absolute local paths: a run directory can then be read from anywhere."""

    def full(path: str | None) -> str | None:
        return os.path.abspath(path) if path is not None and path != BUILTIN and Path(path).exists() else path

    clients = config.clients
    if not config.siloed:  # a path of a client with node_labels is of its own nodes
        clients = {n: c.model_copy(update={"source": full(c.source)}) for n, c in clients.items()}
    adapter = config.adapter.model_copy(update={"subspace_source": full(config.adapter.subspace_source)})
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": full(config.model.path)}),
            "data": config.data.model_copy(update={"source": full(config.data.source)}),
            "adapter": adapter,
            "federation": config.federation.model_copy(update={"replay": full(config.federation.replay)}),
            "clients": clients,
        }
    )


def check_lasting(key: str, path: str | None) -> None:
    """Raises ConfigError for results of a submitted job that would lie in its unpacked package, which Ray removes."""
    if JOB in os.environ and (path is None or not os.path.isabs(path)):
        raise ConfigError(
            f"{key} of a submitted job must be an absolute path on storage that stays: its working directory is "
            "removed by Ray"
        )


def run_folder(config: Config) -> tuple[Path, bool]:
    """The run directory and whether a run there goes on. Raises ConfigError when it holds anything else."""
    if config.output.dir is None:
        if config.output.resume:
            raise ConfigError("output.resume needs output.dir, the directory of the run that is to go on")
        name = f"{config.method.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        return Path("runs", name).absolute(), False
    folder = Path(config.output.dir).absolute()
    _check_place(folder, config.output.dir)
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder, False
    _check_same_run(folder, config)
    return folder, True


def _check_place(folder: Path, name: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output.dir '{name}' is a file: choose a directory")
    parent = next(p for p in folder.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"output.dir '{name}' cannot be made: {parent} is no directory that can be written to")


def check_storage(config: Config, resuming: bool) -> None:
    """Raises ConfigError for a second place of checkpoints that has another run's, or this one's and nobody said that
    it goes on."""
    storage = storage_of(config.output.checkpoints)
    if storage is None or (text := storage.config()) is None:
        return
    different, uri = differences(from_dict(yaml.safe_load(text)), config), config.output.checkpoints
    if different:
        key, before, now = different
        raise ConfigError(
            f"output.checkpoints '{uri}' holds a run with another {key} ({before}, now {now}): give another place"
        )
    if not (resuming or config.output.resume) and storage.rounds():
        raise ConfigError(
            f"output.checkpoints '{uri}' holds such a run: go on with it by --output.resume, or give another place"
        )


def _check_same_run(folder: Path, config: Config) -> None:
    name = config.output.dir
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"output.dir '{name}' is not empty and holds no run: choose another")
    if not config.output.resume:
        raise ConfigError(f"output.dir '{name}' holds another run: choose another, or go on with it by --output.resume")
    different = differences(read_run_config(folder), config)
    check_resumable(config, folder / "checkpoint")
    if different:
        key, before, now = different
        raise ConfigError(
            f"output.dir '{name}' holds a run with another {key} ({before}, now {now}): give the same to resume it, or "
            "another directory"
        )


def check_replay(config: Config, resuming: bool) -> None:
    """Raises ConfigError for a log of another run than the config's, or one that is to be gone on with."""
    if (log := config.federation.replay) is None:
        return
    read_log(log)
    live = config.federation.model_copy(update={"replay": None})
    different = differences(read_run_config(Path(log)), config.model_copy(update={"federation": live}))
    if different:
        key, before, now = different
        raise ConfigError(
            f"federation.replay '{log}' is of a run with another {key} ({before}, now {now}): give the same"
        )
    if resuming:
        raise ConfigError(
            f"output.dir '{config.output.dir}' holds a replay, which begins at the first round: choose another"
        )


#: What a client's own section says of where it trains.
_PLACED = {"node_labels", "gpus", "ranks", "zero_stage"}


def differences(old: Config, new: Config) -> tuple[str, Any, Any] | None:
    """The first key that a resumed run may not change, with both values: where it runs and writes may, what it computes
    may not."""
    where: Any = {"output": True, "worker": True, "engine": True, "clients": {"__all__": _PLACED}}
    before, now = (dict(_flat(c.model_dump(mode="json", exclude=where))) for c in (old, new))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values under dotted keys."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
