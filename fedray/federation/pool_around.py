"""A pool around another one: passes everything on, for those that change a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedray.federation.messages import Outcome
from fedray.federation.questions import Question

if TYPE_CHECKING:
    from fedray.federation.buffered import Arrivals
    from fedray.federation.channels.base import Pool


class PoolAround:
    """Questions, evaluation and streams are the inner pool's; `publish`, `train` and `fetch` are a subclass's."""

    def __init__(self, pool: Pool):
        self._pool = pool

    def ask(
        self, question: Question, clients: Sequence[str], kept: Mapping[str, Any], deadline: float | None
    ) -> list[Outcome]:
        return self._pool.ask(question, clients, kept, deadline)

    def stream(self) -> Arrivals:
        return self._pool.stream()

    def evaluate(self, handle: Any, part: str, client: str | None, kept: Any = None) -> tuple[list[dict], float]:
        return self._pool.evaluate(handle, part, client, kept)
