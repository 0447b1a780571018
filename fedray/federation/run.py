"""One federated run, from what `prepare` checked to a run directory: start an engine, do the rounds, write the results.

A run directory holds `config.yaml`, `rounds.jsonl`, `summary.json`, `checkpoint/`, `adapter/`, and `privacy.json` of a
private run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.util.placement_group import PlacementGroup

from fedray.config.sections import Config
from fedray.errors import ConfigError
from fedray.federation.channels import fixed_masks
from fedray.federation.channels.registry import hides_cohort
from fedray.federation.channels.statement import read_statement, spent
from fedray.federation.coordinator import Coordinator
from fedray.federation.exports import Form, write
from fedray.federation.listening import Listener, Silent, unheard
from fedray.federation.pool_inline import InlinePool
from fedray.federation.prepare import Prepared
from fedray.federation.results import load_checkpoint, summarise
from fedray.federation.run_ray import RayRun, why_ended
from fedray.federation.storage import storage_of
from fedray.federation.worker import Worker


def execute(
    prepared: Prepared, listener: Listener | None = None, group: PlacementGroup | None = None
) -> dict[str, Any]:
    """Run (or resume) and return the summary. `group`: a placement group with a bundle for each worker (default: the
    run makes its own).

    Raises ClientError and RoundError with a sentence for the person.
    """
    listener = listener or Silent()
    started = time.monotonic()
    _begin(prepared)
    listener.started(prepared)
    records: list[dict[str, Any]] = []
    for record in _rounds(prepared, listener, group):
        records.append(record)
        _write_records(prepared, records)  # before it is told: who is told may end the process
        if record["round"] == 0:
            listener.evaluated(record)
        else:
            listener.round(record)
    return _finish(prepared, records, time.monotonic() - started)


def _begin(prepared: Prepared) -> None:
    """The run directory and its config. Raises ConfigError where it cannot be made."""
    try:
        prepared.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output.dir '{prepared.folder}' cannot be made: {error.strerror}") from error
    if not prepared.resuming:
        (prepared.folder / "config.yaml").write_text(prepared.config.to_yaml())
    if (storage := storage_of(prepared.config.output.checkpoints)) is not None:
        storage.claim(prepared.config.to_yaml())


def _rounds(prepared: Prepared, listener: Listener, group: PlacementGroup | None) -> Iterator[dict[str, Any]]:
    """Every record, the evaluation before round 1 first, those of a resumed run again."""
    output = prepared.config.output.model_copy(update={"dir": str(prepared.folder)})
    config = prepared.config.model_copy(update={"output": output})
    if config.engine == "ray":
        yield from RayRun(config, prepared, listener, group).rounds()
    else:
        yield from _inline_rounds(config, prepared, listener)


def _inline_rounds(config: Config, prepared: Prepared, listener: Listener) -> Iterator[dict[str, Any]]:
    worker = Worker(config, prepared.placement.device, prepared.placement.cpus, prepared.data)
    if words := fixed_masks.warning(config, prepared.folder, lambda: [fixed_masks.fixed_here()]):
        listener.note(words)
    done: list[str] = []

    def progress(client: str) -> None:
        done.append(client)
        listener.progress(coordinator.rounds_done + 1, len(done), prepared.cohort)

    pool = InlinePool(worker, unheard if hides_cohort(config) else progress)
    coordinator = Coordinator(config, str(prepared.folder), worker.describe(), pool, prepared.data)
    yield coordinator.evaluate_start()
    yield from list(coordinator.records[1:])
    while not coordinator.done:
        done.clear()
        record = coordinator.run_round()
        if record is None:
            listener.note(why_ended(coordinator.records))
            break
        yield record
    coordinator.finish()


# --- what is written ---------------------------------------------------------------------------------------------


def _write_records(prepared: Prepared, records: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(r) + "\n" for r in records if r["round"] > 0)
    _write(prepared.folder / "rounds.jsonl", lines)
    statement = read_statement(prepared.config, prepared.folder, prepared.data.clients, records)
    if statement is not None:
        _write(prepared.folder / "privacy.json", json.dumps(statement, indent=2))


def _finish(prepared: Prepared, records: list[dict[str, Any]], wall_seconds: float) -> dict[str, Any]:
    """The adapter and the summary."""
    folder, config, classes = prepared.folder, prepared.config, len(prepared.data.classes)
    if prepared.resuming and (folder / "summary.json").is_file():
        return json.loads((folder / "summary.json").read_text())  # it was finished
    write(config, load_checkpoint(folder, config, classes), folder, folder / "adapter", Form(), classes)
    summary = summarise(config, prepared.trainable, len(prepared.data.clients), records, wall_seconds)
    summary |= spent(config, folder) | fixed_masks.masks(config, folder)
    _write(folder / "summary.json", json.dumps(summary, indent=2))
    return summary


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)
