"""A run's numbers for Prometheus, through `ray.util.metrics`: every node of the cluster serves them at its metrics
port, with the prefix ray_.

`k8s/monitoring/` holds the Grafana dashboard that asks for them by these names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from fedray.federation.prepare import Prepared

#: Every metric: kind, what it says, and the tags beside run, method and adapter.
METRICS: dict[str, tuple[type, str, tuple[str, ...]]] = {
    "fedray_round": (Gauge, "Rounds that are done.", ()),
    "fedray_rounds_planned": (Gauge, "Rounds that the run was asked for.", ()),
    "fedray_clients": (Gauge, "Clients of the last round's cohort; absent where it is a secret.", ()),
    "fedray_metric": (Gauge, "Held-out metrics after the last evaluated round.", ("name",)),
    "fedray_train_loss": (Gauge, "Mean training loss of the last round; absent in private runs.", ()),
    "fedray_epsilon": (Gauge, "Largest epsilon over the clients so far.", ()),
    "fedray_exactness": (Gauge, "What the last round lost against the ideal sum, relative.", ()),
    "fedray_aggregation_error": (Gauge, "What averaging factors would have lost in the last round, relative.", ()),
    "fedray_bytes_total": (Counter, "Bytes moved, start included.", ("direction",)),
    "fedray_dropped_clients": (Gauge, "Times that a client was left out of a round, so far.", ()),
    "fedray_phase_seconds": (Histogram, "Seconds of a round by phase.", ("phase",)),
}

#: Seconds; a round takes from a fraction of one to hours.
BOUNDARIES = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000]


class RayMetrics:
    """A listener that keeps METRICS up to date. Needs a connection to Ray when the first record comes."""

    def __init__(self) -> None:
        self._made_so_far: dict[str, Any] = {}
        self._tags: dict[str, str] = {}
        self._dropped = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None

    def started(self, prepared: Prepared) -> None:
        config = prepared.config
        self._tags = {"run": prepared.folder.name, "method": config.method.name, "adapter": config.adapter.kind}
        self._planned = config.federation.rounds

    def evaluated(self, record: dict[str, Any]) -> None:
        self._set("fedray_rounds_planned", self._planned)
        self._set("fedray_round", 0)
        self._metrics(record)
        self._moved(record.get("start") or {})
        self._phases(record)

    def round(self, record: dict[str, Any]) -> None:
        self._set("fedray_round", record["round"])
        if record["cohort"] is not None:  # with privacy.unit client a secret
            self._set("fedray_clients", len(record["cohort"]))
            self._dropped += len(record["dropped"])
            self._set("fedray_dropped_clients", self._dropped)
        self._metrics(record)
        for name in ("train_loss", "exactness", "aggregation_error"):
            if record[name] is not None:
                self._set(f"fedray_{name}", record[name])
        if record["epsilon"]:
            self._set("fedray_epsilon", max(record["epsilon"].values()))
        self._moved(record)
        self._phases(record)

    def _moved(self, record: dict[str, Any]) -> None:
        for way in ("up", "down"):
            self._add("fedray_bytes_total", record.get(f"bytes_{way}", 0), direction=way)

    def _phases(self, record: dict[str, Any]) -> None:
        for phase, seconds in record["seconds"].items():
            self._observe(phase, seconds)

    def _metrics(self, record: dict[str, Any]) -> None:
        for name, value in (record["metrics"] or {}).items():
            self._set("fedray_metric", value, name=name)

    def _made(self, name: str) -> Any:
        if name not in self._made_so_far:
            kind, words, tags = METRICS[name]
            more = {"boundaries": BOUNDARIES} if kind is Histogram else {}
            self._made_so_far[name] = kind(
                name, description=words, tag_keys=("run", "method", "adapter", *tags), **more
            )
        return self._made_so_far[name]

    def _set(self, metric: str, value: float, /, **tags: str) -> None:
        self._made(metric).set(float(value), tags={**self._tags, **tags})

    def _add(self, metric: str, value: float, /, **tags: str) -> None:
        if value > 0:
            self._made(metric).inc(float(value), tags={**self._tags, **tags})

    def _observe(self, phase: str, seconds: float) -> None:
        self._made("fedray_phase_seconds").observe(float(seconds), tags={**self._tags, "phase": phase})
