"""The channel of rounds that wait for nobody in particular (`federation/buffered.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedray.federation.buffered import BufferedPool
from fedray.federation.channels.base import Admission
from fedray.federation.channels.plain import Plain
from fedray.federation.failures import Needed
from fedray.federation.wire import Message

if TYPE_CHECKING:
    from fedray.federation.record import RoundRecord


class Buffered(Plain):
    """A round's cohort is whoever arrives first."""

    @property
    def _pool(self) -> BufferedPool:
        pool = self.context.pool
        assert isinstance(pool, BufferedPool), "the coordinator makes it for federation.buffer"
        return pool

    def admit(self, round: int, message: Message) -> Admission | None:
        return Admission(list(self.context.clients))

    def needed(self, cohort: int) -> Needed:
        size = self.config.federation.buffer
        assert size is not None
        # Whoever is judged away leaves room for the next to arrive.
        return Needed(size, f"federation.buffer {size}", attempts=cohort + 1)

    def receivers(self, admission: Admission) -> tuple[Sequence[str], float]:
        """Of a broadcast the bytes are counted when its update arrives."""
        return [client for client, _ in self._pool.arrived], 1.0

    def annotate(self, record: RoundRecord, message: Message, last: bool) -> RoundRecord:
        """Who arrived, instead of who trains."""
        dropped = {one["client"] for one in record.dropped}
        arrived = {client: version for client, version in self._pool.arrived if client not in dropped}
        cohort = [client for client in self.context.clients if client in arrived]
        return record.replace(cohort=cohort, arrivals=[(client, arrived[client]) for client in cohort])
