"""What actors write to their logs: one JSON object a line, with run, round and client, for `ray logs` and whatever
collects a cluster's logs.

Of a private run's clients no line says more than that they were asked and that they answered: sizes, losses and
durations stay out.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import ray

LOGGER = logging.getLogger("fedray")


class _Lines(logging.Formatter):
    """Time, level, message, who says it, and the record's `fields`."""

    def __init__(self, who: dict[str, str]):
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {
            "time": when,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **self._who,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_lines(run: str, role: str) -> None:
    """Let this actor's process log as JSON lines to its standard error, which Ray keeps as a file."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines({"run": run, "role": role, "node": ray.get_runtime_context().get_node_id()}))
    LOGGER.handlers, LOGGER.propagate = [handler], False
    LOGGER.setLevel(logging.INFO)


def event(name: str, level: int = logging.INFO, **fields: Any) -> None:
    """One line."""
    LOGGER.log(level, name, extra={"fields": {k: v for k, v in fields.items() if v is not None}})
