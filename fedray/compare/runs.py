"""The runs of a comparison: each a process of its own, taken from its directory where it is there already."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedray.config.read import read_config
from fedray.errors import ConfigError, FedrayError
from fedray.federation.folder import differences, rooted
from fedray.federation.results import read_run_config
from fedray.stopping import Terminated


class Runs:
    """Starts runs, several at a time where it is asked to by several threads, and ends all of them together."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen] = []
        self._stopped = False

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Ctrl-C or SIGTERM in the comparison ends its runs too, each with its last round kept, and starts no other."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in previous:
            signal.signal(number, self._stop)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        self._stopped = True
        for child in self._children:
            child.terminate()
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def final(self, flags: Sequence[str], folder: Path) -> dict[str, Any]:
        """The summary of a run that must succeed. Raises FedrayError, with the last line of its log, where it does
        not, and ConfigError when the directory holds a run of another config."""
        summary = _there(flags, folder)
        if summary is not None:
            return summary
        code = self._run(flags, folder)
        if code:
            raise FedrayError(f"a run failed: {_last_line(_log(folder))} (see {_log(folder)})")
        return json.loads((folder / "summary.json").read_text())

    def tuning(self, flags: Sequence[str], folder: Path) -> dict[str, Any] | None:
        """The summary of a run, or None where it fails. Raises ConfigError when the directory holds a run of another
        config."""
        summary = _there(flags, folder)
        failed = folder.parent / f"{folder.name}.failed"
        if summary is not None:
            return summary
        if failed.is_file():  # the same config would fail again
            return None
        if self._run(flags, folder) == 0:
            return json.loads((folder / "summary.json").read_text())
        reason = _last_line(_log(folder))
        if "the loss became" in reason or "not finite" in reason:  # any other failure may pass
            failed.write_text(reason)
        return None

    def _run(self, flags: Sequence[str], folder: Path) -> int:
        """Run it to its end; the exit code. Raises ConfigError where the run says that its input is bad."""
        if self._stopped:
            raise FedrayError("the comparison was stopped")
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "fedray.cli", "run", *flags, "--output.dir", str(folder), "--output.resume"]
        with _log(folder).open("w") as file:
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            self._children.append(child)
            try:
                code = child.wait()
            finally:
                self._children.remove(child)
        if code == ConfigError.exit_code:
            raise ConfigError(f"{_last_line(_log(folder))} (see {_log(folder)})")
        return code


def _there(flags: Sequence[str], folder: Path) -> dict[str, Any] | None:
    """The summary that is there already, if the run has ended. Raises ConfigError for a run of another config."""
    if folder.is_dir() and (other := differences(read_run_config(folder), rooted(read_config(list(flags))))):
        key, before, now = other
        raise ConfigError(f"'{folder}' holds a run with another {key} ({before}, now {now}): give another --out")
    summary = folder / "summary.json"
    return json.loads(summary.read_text()) if summary.is_file() else None


def _log(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.log"


def _last_line(log: Path) -> str:
    """What a run that failed said last."""
    return (log.read_text().strip().splitlines() or ["it said nothing"])[-1].removeprefix("fedray: ")
