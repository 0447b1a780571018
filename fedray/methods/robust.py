"""Rules in place of the mean, for rounds in which some clients may be wrong, or lie: the median and the trimmed mean of
each number (Yin et al., ICML 2018, arXiv 1803.01498) and multi-Krum (Blanchard et al., NeurIPS 2017, arXiv 1703.02757).

They are for methods whose aggregate is a mean (`Method.linear`): what such a method makes of its cohort follows from
the mean of the uploads, so a rule puts another value in that one's place and all else stays. Every client counts once,
whatever its weight: a weight is what a client says of itself. Clients have one rank: zeros beyond a client's own would
be votes.

*Which numbers.* Median and trimmed mean are taken of each number that clients upload: entries of the factors that
train, and of heads. Of values or of moves from the broadcast is the same, since both rules commute with a shift. They
are not taken of the entries of the deltas: those are m x n numbers a layer, and their median has full rank, so that no
factors of rank r hold it. So the bound is on factors: each entry of the result lies within those of the honest clients.
Where one factor trains (ffa, rolora, fed-sb, ravan) the delta is a linear image of it; where both do (fedit), it is
that of two medians, which is not the median of deltas. Entries of different clients mean the same, because all start
from the same factors.

*What it costs in accuracy.* Without attackers none of the rules gives the mean: where clients' data differ, the median
of what they send is not its mean, however many they are, and multi-Krum leaves honest clients out.

*What it does not cover.* Attackers who stay within what honest clients might send; metrics and losses that clients
report; a client that sends nothing, which costs the quorum (`federation.quorum`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedray.errors import ConfigError, RoundError
from fedray.lowrank import squared_distances, weighted_sum
from fedray.methods.state import Cohort, Spec
from fedray.options import option

#: What every rule's class says itself, as a method's does: guarantees rest on it.
STATED = ("exact", "linear")

_CHUNK = 1 << 17  # numbers of each client at a time


@dataclass(frozen=True)
class RobustRule(ABC):
    """Base of the rules. `attackers`: f, of how many updates of a round nothing is assumed.

    `exact`: what the method that uses it is exact up to; `linear`: whether its result is a mean of all uploads;
    `compares_deltas`: whether it needs to know what each client's update means.
    """

    name: ClassVar[str]
    exact: ClassVar[str]
    linear: ClassVar[bool]
    compares_deltas: ClassVar[bool] = False
    counted: ClassVar[bool] = True  # whether f is given, not all that can be borne
    attackers: int = 0

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Raises TypeError for a class whose own body leaves open what its result is."""
        super().__init_subclass__(**arguments)
        if missing := [name for name in STATED if name not in vars(cls)]:
            raise TypeError(f"{cls.__name__} must state {' and '.join(missing)} in its own body")

    @property
    @abstractmethod
    def least(self) -> int:
        """The fewest updates that the rule's bound holds for."""

    @abstractmethod
    def combine(self, spec: Spec, cohort: Cohort, names: Sequence[str]) -> dict[str, Tensor]:
        """What stands in for the means of the named tensors, in the cohort's dtype."""

    def centre(self, spec: Spec, cohort: Cohort, names: Sequence[str]) -> dict[str, Tensor]:
        """The same, of as many updates as it takes. Raises RoundError for fewer."""
        if len(cohort.clients) < self.least:
            raise RoundError(
                f"{self._needs}, and {len(cohort.clients)} came: raise federation.quorum, or have more clients a round"
            )
        return self.combine(spec, cohort, names)

    def check_cohort(self, cohort: int, reporting: int) -> None:
        """Raises ConfigError for rounds of so many clients, of which so many may report, that are too few."""
        if cohort < self.least:
            raise ConfigError(f"{self._needs}, and {cohort} clients take part: {self._fewer}have more clients a round")
        if reporting < self.least:
            raise ConfigError(
                f"{self._needs}, and federation.quorum lets one go on with {reporting} of {cohort}: raise it"
            )

    @property
    def _needs(self) -> str:
        against = f" with method.robust_attackers {self.attackers}" if self.counted else ""
        return f"method.robust_rule {self.name}{against} needs {self.least} updates a round"

    @property
    def _fewer(self) -> str:
        return "lower method.robust_attackers, or " if self.attackers > 1 else ""


@dataclass(frozen=True)
class TrimmedMean(RobustRule):
    """Of each number, the mean of what is left without its f largest and f smallest values: within the honest clients'
    smallest and largest, whatever f clients send.

    No mean, and the delta is not exact. Needs 2 f + 1 updates; O(k log k) a number.
    """

    name = "trimmed"
    exact = "no"
    linear = False

    @property
    def least(self) -> int:
        return 2 * self.attackers + 1

    def combine(self, spec: Spec, cohort: Cohort, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: trimmed_mean([t[name] for t in cohort.tensors], self.attackers) for name in names}


@dataclass(frozen=True)
class Median(RobustRule):
    """Of each number, the median: between the two middle values where clients are even in number. Within the honest
    clients' smallest and largest, as long as these are more than half.

    No mean, and the delta is not exact. Needs 3 updates; O(k log k) a number.
    """

    name = "median"
    exact = "no"
    linear = False
    counted = False

    @property
    def least(self) -> int:
        return 3

    def combine(self, spec: Spec, cohort: Cohort, names: Sequence[str]) -> dict[str, Tensor]:
        cut = (len(cohort.clients) - 1) // 2
        return {name: trimmed_mean([t[name] for t in cohort.tensors], cut) for name in names}


@dataclass(frozen=True)
class MultiKrum(RobustRule):
    """The mean of the clients that are near to others, in what their updates mean *and* in what they send: of each of
    the two, the k - f with the smallest sums of squared distances to their k - f - 2 nearest; taken are those that are
    among both, k - 2 f at least.

    Distances are ||delta_i - delta_j||_F over all layers together, heads as they are; and those of the uploads. The
    second is ours: deltas alone do not tell (B, A) from (c B, A / c), and the mean of such factors can be anything.
    If the honest clients, k - f at least, lie within D of each other, nobody is taken who is further than
    D sqrt((k - f - 2) / (k - 2 f - 1)) from all of them, in either distance.

    Not exact, no mean of all uploads. Needs 2 f + 3 updates; O(k^2) distances, each O((m + n) r^2) by Gram matrices,
    which is inherent.
    """

    name = "krum"
    exact = "no"
    linear = False
    compares_deltas = True

    @property
    def least(self) -> int:
        return 2 * self.attackers + 3

    def combine(self, spec: Spec, cohort: Cohort, names: Sequence[str]) -> dict[str, Tensor]:
        chosen = self.chosen(spec, cohort, names)
        shares = [1 / len(chosen)] * len(chosen)
        return {name: weighted_sum([cohort.tensors[i][name] for i in chosen], shares, cohort.dtype) for name in names}

    def chosen(self, spec: Spec, cohort: Cohort, names: Sequence[str]) -> list[int]:
        """The places in the cohort of those that count; of equal sums the first."""
        layers = {f"{layer.name}.{factor}" for layer in spec.layers for factor in spec.names}
        heads = _distances(cohort, [name for name in names if name not in layers])
        meant = heads + _delta_distances(spec, cohort)
        sent = heads + _distances(cohort, [name for name in names if name in layers])
        return sorted(self._nearest(meant) & self._nearest(sent))

    def _nearest(self, squared_kk: Tensor) -> set[int]:
        """Those with the k - f smallest sums."""
        k = len(squared_kk)
        # Beyond what numbers hold is far away; nobody is near to itself.
        others = squared_kk.nan_to_num(nan=torch.inf, posinf=torch.inf).fill_diagonal_(torch.inf)
        sums_k = others.sort(dim=1).values[:, : k - self.attackers - 2].sum(dim=1)
        return set(sums_k.sort(stable=True).indices[: k - self.attackers].tolist())


#: By the name that a config gives.
RULES: dict[str, type[RobustRule]] = {rule.name: rule for rule in (Median, TrimmedMean, MultiKrum)}


@dataclass(frozen=True)
class RobustOptions:
    """What a config says of them, as `method.robust_*`."""

    rule: Literal["median", "trimmed", "krum"] = option(
        MISSING,
        "What stands in for the mean where some clients may be wrong or lie, for methods whose aggregate is a mean: "
        "the median or trimmed mean of each number that is sent, or multi-Krum, the mean of clients whose updates are "
        "near to others'; every client counts alike (default: take the mean)",
    )
    attackers: int = option(
        MISSING,
        "of how many updates of a round nothing is assumed; needs 2 of them and 1 (trimmed) or 3 (krum) in a round",
        where="robust_rule trimmed and krum",
        ge=1,
    )

    @classmethod
    def configured(cls, options: Mapping[str, Any]) -> RobustRule:
        """The rule that a config's `method.robust_*` mean. Raises ValueError for those that do not go together."""
        given = cls(**({"rule": None, "attackers": None} | dict(options)))
        if given.rule is None:
            raise ValueError("method.robust_attackers needs method.robust_rule: trimmed or krum")
        rule = RULES[given.rule]
        if not rule.counted and given.attackers is not None:
            raise ValueError(
                f"method.robust_attackers belongs to robust_rule trimmed and krum, not to {rule.name}, which bears all "
                "that are fewer than half: leave it out"
            )
        if rule.counted and given.attackers is None:
            raise ValueError(
                f"method.robust_rule {rule.name} needs method.robust_attackers, of how many updates a round nothing is "
                "assumed"
            )
        return rule(given.attackers or 0)


# --- tensors -----------------------------------------------------------------------------------------------------


def trimmed_mean(tensors: Sequence[Tensor], cut: int) -> Tensor:
    """Of each number of k tensors of one shape and dtype, the mean without the `cut` smallest and largest; 2 cut < k.

    Added in fp64 and rounded once; never outside of the values that it is the mean of.
    """
    flat = [t.reshape(-1) for t in tensors]
    result = torch.empty_like(flat[0])
    for start in range(0, len(result), _CHUNK):
        block_kn = torch.stack([t[start : start + _CHUNK] for t in flat])
        kept_kn = block_kn.sort(dim=0).values[cut : len(flat) - cut].double()
        mean_n = kept_kn.mean(dim=0).clamp(kept_kn[0], kept_kn[-1])
        result[start : start + _CHUNK].copy_(mean_n)
    return result.reshape(tensors[0].shape)


def _distances(cohort: Cohort, names: Sequence[str]) -> Tensor:
    """Squared distances (k x k, fp64) of the named tensors as the clients have them, all together."""
    k = len(cohort.clients)
    squared_kk = torch.zeros(k, k, dtype=torch.float64)
    for name in names:
        flat = [t[name].reshape(-1) for t in cohort.tensors]
        for start in range(0, len(flat[0]), _CHUNK):
            block_kn = torch.stack([t[start : start + _CHUNK] for t in flat]).double()
            # Differences, not products: heads differ by little from client to client.
            squared_kk += torch.cdist(block_kn, block_kn, compute_mode="donot_use_mm_for_euclid_dist").square()
    return squared_kk


def _delta_distances(spec: Spec, cohort: Cohort) -> Tensor:
    """sum over layers of ||delta_i - delta_j||_F^2 (k x k, fp64)."""
    k = len(cohort.clients)
    squared_kk = torch.zeros(k, k, dtype=torch.float64)
    for layer in spec.layers:  # one at a time, as in `diagnose`
        squared_kk += squared_distances([spec.adapter.delta(layer, f) for f in cohort.factors(spec, layer)])
    return squared_kk
