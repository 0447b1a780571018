"""Who follows a run while it goes on: a person's terminal, trackers, metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fedray.federation.prepare import Prepared


class Listener(Protocol):
    """What a person's side is told while a run goes on."""

    def started(self, prepared: Prepared) -> None: ...
    def evaluated(self, record: dict[str, Any]) -> None: ...
    def progress(self, round: int, done: int, cohort: int) -> None: ...
    def round(self, record: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """A listener that says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


def unheard(client: str) -> None:
    """Progress that nobody follows."""
