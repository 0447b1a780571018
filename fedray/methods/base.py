"""What a method is: a value with `init`, `broadcast`, `aggregate`, and `view` and `upload` for the client's side of
the wire.

Symbols: k clients with weights p_i (sum 1), factors B_i (m x r) and A_i (r x n), scale s, Bbar = sum p_i B_i,
Abar = sum p_i A_i, delta_i = s B_i A_i, and the ideal sum p_i delta_i. With another adapter (B, A) is its `pair`, and
s B A stands for whatever delta its factors mean. Sums run in fp64 in the order of the updates, so they do not depend
on who came first; results return to the updates' own dtype.

No code here asks for shapes alone, and none may let a number decide what is sent: `traffic` runs it on tensors that
have no numbers. Where a number must decide (a rank chosen by energy), the algebra in `lowrank` says what holds
without any.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedray.adapters import PAIRED
from fedray.adapters.base import Adapter
from fedray.errors import RoundError
from fedray.methods.diagnose import diagnose
from fedray.methods.gathering import Gathering, checked
from fedray.methods.increments import base_total, is_base, live_increments
from fedray.methods.robust import RobustRule
from fedray.methods.server import ServerOptimizer
from fedray.methods.state import (
    Broadcast,
    Cohort,
    Deltas,
    Diagnostics,
    Increment,
    Spec,
    State,
    Tensors,
    Update,
    View,
    factor_of,
)

#: What every method's class says itself: a subclass that inherited `linear` could be admitted to a sum that it is not.
STATED = ("exact", "linear", "kept")


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. A subclass says what it trains and sends at first, and how a cohort becomes one (`merge`).

    `adapters`: those it is sound with, its own first.
    """

    name: ClassVar[str]
    adapters: ClassVar[tuple[str, ...]] = PAIRED
    exact: ClassVar[str]  # "yes", "no", or what it is exact up to; for tables
    linear: ClassVar[bool]  # the aggregate is the mean of the uploads: a server optimizer may step on it
    kept: ClassVar[tuple[Literal["B", "A"], ...]]  # which factors of the pair stay with the client; see `keeps`
    personal: ClassVar[bool] = False  # whether `view` differs from client to client
    mixed_ranks: ClassVar[bool] = False  # whether clients may have different ranks
    alternates: ClassVar[bool] = False  # whether each round trains other factors than the last one
    asks: ClassVar[bool] = False  # whether the cohort is asked a second time (`question`, `answer`)
    server: ServerOptimizer | None = field(default=None, kw_only=True)
    robust: RobustRule | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Raises TypeError for a class whose own body leaves open what secure sums and privacy rely on."""
        super().__init_subclass__(**arguments)
        if missing := [name for name in STATED if name not in vars(cls)]:
            raise TypeError(
                f"{cls.__name__} must state {' and '.join(missing)} in its own body: an inherited one could be false"
            )
        if not isinstance(cls.exact, str) or not isinstance(cls.linear, bool) or not set(cls.kept) <= set("BA"):
            raise TypeError(f"{cls.__name__}: exact is a word, linear True or False, kept some of 'B' and 'A'")

    # --- from a config -----------------------------------------------------------------------------------------

    @classmethod
    def configured(cls, options: Mapping[str, Any], rounds: int, adapter: str) -> Method:
        """The method with a config's `options` (those that are set, `server` and `robust` among them).

        It is for a run of so many rounds with an adapter of that kind. Raises ValueError, with the reason, for options
        that do not go together.
        """
        return cls(**options)

    @classmethod
    def why_not(cls, adapter: type[Adapter]) -> str | None:
        """The reason why the method is not sound with an adapter, and what to use; None when it is."""
        return None if adapter.kind in cls.adapters else cls.unfit(adapter)

    @classmethod
    def unfit(cls, adapter: type[Adapter]) -> str:
        """The reason, for an adapter that is not among `adapters`."""
        if adapter.unpaired:
            return adapter.unpaired
        needed = f"it needs adapter.kind {' or '.join(cls.adapters)}, or use fra"
        if cls.mixed_ranks:
            return f"cutting {adapter.kind}'s factors to a client's rank has no meaning: {needed}"
        return f"it is not known to be sound there: {needed}"

    # --- what travels ------------------------------------------------------------------------------------------

    def trained(self, spec: Spec) -> tuple[str, ...]:
        """The factors that train in the first round: the adapter's own choice unless a method says otherwise."""
        return spec.adapter.trains

    def drawn(self, spec: Spec) -> dict[str, int]:
        """The factors that clients draw from the seed instead of receiving them."""
        return {name: 0 for name in spec.names if name not in (*self.trained(spec), *spec.adapter.started)}

    @property
    def fresh(self) -> bool:
        """Whether every round starts from the drawn and started factors again, so that none of them travels."""
        return False

    @property
    def moves_base(self) -> bool:
        """Whether clients train over a base that a round has moved, so that they must keep the original weights."""
        return False

    @property
    def turns_after(self) -> int:
        """The number of rounds after which the method changes for good what is sent; 0: never. Before the last of
        them, and after them, the shapes of a state follow from those of the state before it, whatever the number of
        the round."""
        return 0

    def keeps(self, spec: Spec) -> tuple[str, ...]:
        """Names of the factors that stay with the client from round to round: each client has a model of its own."""
        pair = dict(zip("BA", spec.adapter.pair or (), strict=False))
        return tuple(pair[side] for side in self.kept)

    def init(self, spec: Spec, heads: Tensors | None = None, start: Tensors | None = None) -> State:
        """The state before round 1. `heads`: initial values of modules trained whole; `start`: the adapter's
        `started` factors (fp32).

        What trains and is neither drawn nor kept travels every round; started factors that rest are an increment.
        """
        draw, heads, start = self.drawn(spec), dict(heads or {}), dict(start or {})
        travels = self._travels(spec, draw)
        sent = {name: t for f in travels if f not in spec.adapter.started for name, t in spec.drawn(f, 0).items()}
        sent |= {name: t for name, t in start.items() if factor_of(name) in travels}
        once = {name: t for name, t in start.items() if name not in sent}
        increments = (Increment(1, once),) if once else ()
        draw |= dict.fromkeys(self.keeps(spec), 0)
        return State(
            round=0,
            tensors=sent | heads,
            increments=increments,
            trained=self.trained(spec),
            draw=draw,
            spec=spec,
            heads=tuple(heads),
        )

    def _travels(self, spec: Spec, draw: dict[str, int]) -> list[str]:
        """The factors that are sent with every broadcast, from the first one on."""
        if self.fresh:
            return []
        return [f for f in self.trained(spec) if f not in draw and f not in self.keeps(spec)]

    def broadcast(self, state: State) -> Broadcast:
        """The message of the next round."""
        return Broadcast(**{f.name: getattr(state, f.name) for f in dataclasses.fields(Broadcast)})

    def view(self, spec: Spec, message: Broadcast, client: str | None) -> View:
        """What a client makes of a broadcast; `client=None` is the global model. Factors come whole: zeros beyond a
        client's own rank."""
        tensors = {name: t for factor, draw in message.draw.items() for name, t in spec.drawn(factor, draw).items()}
        live = live_increments(message.increments)
        for increment in live:
            tensors |= {name: t for name, t in increment.tensors.items() if not is_base(name)}
        tensors |= message.tensors
        if spec.ranks:
            tensors = spec.whole(spec.cut(client, tensors))
        return View(tensors, base_total(spec, live), message.trained)

    def upload(self, spec: Spec, client: str, tensors: Tensors, round: int) -> dict[str, Tensor]:
        """What a client sends in a round (from 0) of its trained factors and heads: all that it does not keep, at its
        own rank."""
        keeps = self.keeps(spec)
        return spec.cut(client, {name: t for name, t in tensors.items() if factor_of(name) not in keeps})

    def question(self, state: State, updates: Sequence[Update]) -> dict[str, Tensor]:
        """A second message to the same cohort, once its updates are in, where the method `asks`. Raises RoundError
        for a value that is not finite."""
        return self.ask(state, list(checked(updates)))

    def ask(self, state: State, updates: Sequence[Update]) -> dict[str, Tensor]:
        """The `question`, of updates that are not looked at first."""
        raise NotImplementedError(f"{self.name} asks nothing")

    def answer(self, spec: Spec, question: Tensors, trained: Tensors) -> dict[str, Tensor]:
        """A client's answer to it, from the factors it trained in this round."""
        raise NotImplementedError(f"{self.name} asks nothing")

    # --- the server --------------------------------------------------------------------------------------------

    def aggregate(
        self, state: State, updates: Iterable[Update], exact_report: bool = False
    ) -> tuple[State, Diagnostics]:
        """The next state and what was lost on the way: against the mean of all who reported, also where a robust rule
        took another value on purpose; `exact_report`: measured, and not estimated, in large cohorts too.

        Raises RoundError on non-finite values, and on no updates or fewer than a rule
        needs."""
        cohort = self.gather(state, updates, measured=True, exact_report=exact_report)
        taken = cohort if self.robust is None else self._robust(self.robust, state, cohort)
        merged, landed = self.merge(state, taken)
        diagnostics = diagnose(state.spec, cohort, landed)
        if self.server is not None:
            merged = self._stepped(self.server, state, taken)
        check_state(state, merged)
        return merged, diagnostics

    def advance(self, state: State, updates: Iterable[Update]) -> State:
        """The next state alone, of the mean: no update is looked at, no loss measured, no rule or server optimizer
        asked."""
        return self.merge(state, self.gather(state, updates))[0]

    def _robust(self, rule: RobustRule, state: State, cohort: Cohort) -> Cohort:
        """The cohort with the rule's values in place of its means."""
        centre = rule.centre(state.spec, cohort, _uploaded(state, cohort))
        return dataclasses.replace(cohort, means=cohort.means | centre)

    def _stepped(self, server: ServerOptimizer, state: State, cohort: Cohort) -> State:
        """The next state where the server steps along the change that the mean makes."""
        before = self.view(state.spec, self.broadcast(state), None).tensors
        moves = _uploaded(state, cohort)
        stepped, memory = server.step(
            {n: before[n].double() for n in moves}, {n: cohort.means[n].double() for n in moves}, state.memory
        )
        moved = dataclasses.replace(cohort, means=cohort.means | stepped)
        return self.merge(state, moved)[0].replace(memory=memory)

    @abstractmethod
    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas | None]:
        """The next state, and per layer the change of the effective weights (against the base of this round) it
        means; None where there is no global model that one could hold against the ideal."""

    def gather(
        self, state: State, updates: Iterable[Update], measured: bool = False, exact_report: bool = False
    ) -> Cohort:
        """Read the updates once, in order, complete them with the factors that did not train, and average. Kept are
        those of small cohorts, and of large ones where a merge or a rule needs each; `measured`: what a report of the
        loss needs too."""
        spec, message = state.spec, self.broadcast(state)
        start = self.view(spec, message, None).tensors

        def start_of(client: str) -> Tensors:
            return self.view(spec, message, client).tensors if self.personal else start

        ideal: Literal["sketch", "means", "factors"] = "factors" if exact_report else "sketch"
        linear = self.linear and self.exact == "yes"  # the delta is linear in what such a method averages
        if not measured or linear or self.kept:
            ideal = "means"
        keeps = not self.linear or self.robust is not None or exact_report
        reading = Gathering(spec, start_of, keeps, ideal, looks=measured)
        for update in updates:
            reading.add(update)
        return reading.cohort(start)


def _uploaded(state: State, cohort: Cohort) -> list[str]:
    """The names of what trains, and so moves."""
    return [n for n in cohort.means if n in state.heads or factor_of(n) in state.trained]


def check_state(before: State, after: State) -> None:
    """Raises RoundError for a state that a round has made with a value that is not finite."""
    known = {increment.version for increment in before.increments}
    made = [after.tensors, *(i.tensors for i in after.increments if i.version not in known)]
    for name, tensor in (item for tensors in made for item in tensors.items()):
        if not math.isfinite(tensor.sum().item()) and not torch.isfinite(tensor).all():  # the sum costs less
            raise RoundError(
                f"round {after.round}: the updates are finite and their aggregate is not, in {name}: bound them by "
                "federation.max_update_norm, or lower federation.lr"
            )
