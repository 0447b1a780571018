"""SIGTERM, as `ray job stop` and Kubernetes send it, ends a run as Ctrl-C does: finished rounds are in the checkpoint,
actors are ended."""

from __future__ import annotations

import signal
import threading
from types import FrameType

_terminated = threading.Event()


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM."""


def stop_on_sigterm() -> None:
    """Take SIGTERM over (main thread only; nothing elsewhere). To be called again after `ray.init`, which sets a
    handler of its own."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)


def interruption() -> KeyboardInterrupt:
    """What to raise for a run that was stopped in between: says which signal it was."""
    return Terminated() if _terminated.is_set() else KeyboardInterrupt()


def _stop(number: int, frame: FrameType | None) -> None:
    _terminated.set()
    interrupt = signal.getsignal(signal.SIGINT)
    if callable(interrupt) and interrupt is not signal.default_int_handler:
        interrupt(number, frame)  # Ray Tune's: it saves the sweep's state first
    else:
        raise Terminated
