"""The checkpoint: the server's state and what the round loop needs, written whole or not at all after every round.

`checkpoint/round-00003/` holds `tensors.safetensors` and `state.json`. It is written under another name, flushed to
disk and renamed, so a kill at any moment leaves the previous one; the last few are kept, and that of the run's result;
all of them in a second place too, where the run has one (`storage.py`).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedray.errors import RoundError
from fedray.federation.storage import Storage
from fedray.methods import Increment, Spec, State
from fedray.privacy.files import flush


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round, the increments each client has seen, what clients keep (optimizer states, own
    factors), the run's records, and what the adapter's start cost."""

    state: State
    seen: dict[str, int]
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    records: tuple[dict[str, Any], ...] = ()
    start: dict[str, Any] | None = None
    mark: dict[str, Any] | None = None
    """What the run's channel must find again: how far its ledger had come."""


def save(
    folder: Path, checkpoint: Checkpoint, result: int | None = None, keep: int = 2, storage: Storage | None = None
) -> None:
    """Write atomically; older ones than the last `keep` are removed afterwards, but for that of round `result`. Raises
    RoundError where it cannot be written: the previous one is as it was."""
    for unfinished in folder.glob(".writing-*"):  # of processes that were killed
        shutil.rmtree(unfinished, ignore_errors=True)
    part = folder / f".writing-{os.getpid()}"
    try:
        _write(part, checkpoint)
        final = _path(folder, checkpoint.state.round)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        left = rounds[-1].name if (rounds := _rounds(folder)) else "none"
        raise RoundError(
            f"the checkpoint of round {checkpoint.state.round} could not be written to {folder} ({_words(error)}): the "
            f"last one that is whole is {left}; make room there, and go on with output.resume"
        ) from error
    for old in _rounds(folder)[:-keep]:
        if result is None or old != _path(folder, result):
            shutil.rmtree(old)
    if storage is not None:
        storage.save(final, [path.name for path in _rounds(folder)])


def _words(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _path(folder: Path, round: int) -> Path:
    return folder / f"round-{round:05d}"


def _write(part: Path, checkpoint: Checkpoint) -> None:
    """The files of a checkpoint in a folder that is not there yet, on disk when this returns."""
    state = checkpoint.state
    part.mkdir(parents=True)
    tensors = {f"tensors/{n}": t for n, t in state.tensors.items()}
    for increment in state.increments:
        tensors |= {f"increments/{increment.version}/{n}": t for n, t in increment.tensors.items()}
    tensors |= {f"memory/{n}": t for n, t in state.memory.items()}
    for i, kept in enumerate(checkpoint.kept.values()):
        tensors |= {f"kept/{i}/{n}": t for n, t in kept.items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, part / "tensors.safetensors")
    plain = {
        "round": state.round,
        "trained": state.trained,
        "draw": state.draw,
        "plain": state.plain,
        "heads": state.heads,
        "increments": [[i.version, i.resets] for i in state.increments],
        "seen": checkpoint.seen,
        "kept": list(checkpoint.kept),
        "records": checkpoint.records,
        "start": checkpoint.start,
        "mark": checkpoint.mark,
    }
    (part / "state.json").write_text(json.dumps(plain))
    for path in (part / "tensors.safetensors", part / "state.json", part):
        flush(path)


def _rounds(folder: Path) -> list[Path]:
    """The complete checkpoints, the oldest first."""
    return sorted(folder.glob("round-*")) if folder.is_dir() else []


def latest(folder: Path, spec: Spec, storage: Storage | None = None) -> Checkpoint | None:
    """The last complete checkpoint (of the storage, where that has a newer one), or None. `spec` is not stored: it
    follows from config and model."""
    if storage is not None:
        storage.fetch(folder)
    rounds = _rounds(folder)
    return _read(rounds[-1], spec) if rounds else None


def of_round(folder: Path, round: int, spec: Spec) -> Checkpoint:
    """The checkpoint of a round, one that is kept; `spec`: as in `latest`."""
    return _read(_path(folder, round), spec)


def _read(path: Path, spec: Spec) -> Checkpoint:
    plain = json.loads((path / "state.json").read_text())
    by_kind: dict[str, dict[str, Tensor]] = {"tensors": {}, "increments": {}, "memory": {}, "kept": {}}
    for name, tensor in load_file(path / "tensors.safetensors").items():
        kind, rest = name.split("/", 1)
        by_kind[kind][rest] = tensor
    increments = tuple(
        Increment(v, {n.split("/", 1)[1]: t for n, t in by_kind["increments"].items() if n.startswith(f"{v}/")}, resets)
        for v, resets in plain["increments"]
    )
    kept: dict[str, dict[str, Tensor]] = {client: {} for client in plain["kept"]}
    for name, tensor in by_kind["kept"].items():
        number, rest = name.split("/", 1)
        kept[plain["kept"][int(number)]][rest] = tensor
    state = State(
        plain["round"],
        by_kind["tensors"],
        increments,
        tuple(plain["trained"]),
        plain["draw"],
        plain["plain"],
        spec=spec,
        heads=tuple(plain["heads"]),
        memory=by_kind["memory"],
    )
    return Checkpoint(state, plain["seen"], kept, tuple(plain["records"]), plain["start"], plain["mark"])
