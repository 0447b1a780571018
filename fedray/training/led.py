"""The trainer at the first of a client's ranks: what all ranks must do together, it has the others do too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from torch import Tensor

from fedray.config.sections import Config
from fedray.data.partition import FederatedData
from fedray.methods import View
from fedray.privacy.private import Private
from fedray.ranks import Ranks
from fedray.training.local import LocalResult, LocalTrainer

T = TypeVar("T")


class Crew(Protocol):
    """The other ranks, as the first reaches them."""

    ranks: Ranks

    def do(self, call: str, arguments: tuple[Any, ...], own: Callable[[], T]) -> tuple[T, list[Any]]:
        """What `own` gives while the others do the same `LocalTrainer` call, and what theirs gave, by rank. Raises
        what `own` raises, or RankError for what another did."""


class LedTrainer(LocalTrainer):
    """A `LocalTrainer` whose calls another rank makes too. What the coordinator's questions ask before round 1 it
    answers alone: no engine has taken the model apart by then."""

    def __init__(
        self,
        crew: Crew,
        config: Config,
        device: str,
        threads: int,
        data: FederatedData | None = None,
        reads: Sequence[str] = (),
    ):
        super().__init__(config, device, threads, data, reads, crew.ranks)
        self._crew = crew
        self._told_base: Any = None

    def train(
        self,
        view: View,
        client: str,
        round: int,
        optimizer_state: dict[str, Tensor] | None = None,
        base_key: Any = None,
        private: Private | None = None,
    ) -> LocalResult:
        def own() -> LocalResult:
            return super(LedTrainer, self).train(view, client, round, optimizer_state, base_key, private)

        theirs = private.of_other_rank() if private is not None else None
        told = (self._told(view, base_key), client, round, optimizer_state, base_key, theirs)
        return self._crew.do("train", told, own)[0]

    def evaluate(
        self, view: View, part: str, client: str, share: tuple[int, int], base_key: Any = None
    ) -> list[list[dict]]:
        def own() -> list[list[dict]]:
            return super(LedTrainer, self).evaluate(view, part, client, share, base_key)

        mine, others = self._crew.do("evaluate", (self._told(view, base_key), part, client, share, base_key), own)
        shares = [mine, *others]
        return [shares[turn % len(shares)][turn // len(shares)] for turn in range(sum(map(len, shares)))]

    def reset(self) -> None:
        self._told_base = None
        self._crew.do("reset", (), super().reset)

    def _told(self, view: View, base_key: Any) -> View:
        """The view as the others need it: a base that they were told of last time is there."""
        known = base_key is not None and base_key == self._told_base
        self._told_base = base_key
        return replace(view, base={} if known else dict(view.base))  # a base may be worked out when it is asked for
