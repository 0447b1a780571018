"""The client's half of secure sums: what it is asked at each step, and how it masks what it sends.

Nothing here believes the coordinator: the rule is the client's own config's, a session must be of what is sent, the
weight the client's own, and nothing of its data leaves in clear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from fedray.errors import PrivacyError
from fedray.federation.channels.base import Noise, Tensors
from fedray.federation.channels.example import NoisedCount
from fedray.federation.channels.keyed import KeyIdentity
from fedray.federation.channels.orders import OneRun
from fedray.federation.channels.plain import Packed
from fedray.federation.messages import PUBLIC, Orders, SumStep
from fedray.federation.questions import ForgetKeys, Question, Sketch, StartFromWeights, ValueQuestion
from fedray.federation.wire import Packet
from fedray.privacy import secure_sum
from fedray.privacy.keys import KeyStore, digest_of
from fedray.privacy.secure_sum import Identities, Party, Rule

if TYPE_CHECKING:
    from fedray.config.sections import Config
    from fedray.federation.channels.base import ClientSide

#: The share of clients that may work with the coordinator, unless the config says another.
COLLUDING = 0.05
#: What says nothing of a client's data, or is noised and charged by itself: it travels without a sum.
IN_CLEAR = (StartFromWeights, ForgetKeys, KeyIdentity, NoisedCount)


def rule_of(config: Config) -> Rule:
    """What the config allows of a sum."""
    privacy = config.privacy
    colluding = COLLUDING if privacy.secure_colluding is None else privacy.secure_colluding
    return Rule(privacy.identities is not None, privacy.secure_threshold, colluding)


def round_and_purpose(asked: Question | int) -> tuple[int, str]:
    """The round (from 1; 0: before the first) and the name of what a sum is of: a round (from 0), or a question. The
    same after a resume, whoever gives the orders."""
    if isinstance(asked, int):
        return asked + 1, f"round {asked + 1}"
    return 0, f"{asked.name} {asked.digest() if isinstance(asked, Sketch) else ''}"


# --- questions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SumQuestion(ValueQuestion):
    """A step of a secure sum. `steps`: by client, what it learns."""

    common = False

    steps: Mapping[str, SumStep]

    def of(self, client: str) -> SumQuestion:
        return replace(self, steps={client: self.steps[client]})

    def value(self, side: ClientSide, client: str) -> Any:
        assert isinstance(side.sealer, Masked), "only a run of secure sums answers these"
        step = self.steps[client]
        return self.told(side.sealer.party(client, step.run), step)

    def told(self, party: Party, step: SumStep) -> Any:
        """What a client answers."""
        raise NotImplementedError


@dataclass(frozen=True)
class Advertise(SumQuestion):
    """The client's public keys of the session, signed."""

    name: ClassVar[str] = "ADVERTISE"
    what: ClassVar[str] = "its public keys of a secure sum"

    def told(self, party: Party, step: SumStep) -> Any:
        if step.session is None:
            raise PrivacyError("the coordinator asked for keys of a secure sum without its session")
        return party.advertise(step.session)


@dataclass(frozen=True)
class Share(SumQuestion):
    """For each neighbour, encrypted, shares of the client's two secrets."""

    name: ClassVar[str] = "SHARE"
    what: ClassVar[str] = "encrypted shares of its secrets of a secure sum"

    def told(self, party: Party, step: SumStep) -> Any:
        return party.share(step.name, step.adverts, step.roster)


@dataclass(frozen=True)
class SignSent(SumQuestion):
    """The client's signature of who sent."""

    name: ClassVar[str] = "SIGN"
    what: ClassVar[str] = "its signature of who is in a secure sum"

    def told(self, party: Party, step: SumStep) -> Any:
        return party.sign(step.name, step.listed)


@dataclass(frozen=True)
class Reveal(SumQuestion):
    """One share for each client: of what must be taken out of the sum."""

    name: ClassVar[str] = "REVEAL"
    what: ClassVar[str] = "its shares of what must be taken out of a secure sum"

    def told(self, party: Party, step: SumStep) -> Any:
        return party.reveal(step.name, step.signatures, step.sealed)


# --- what is sent ------------------------------------------------------------------------------------------------


class Masked(Packed):
    """Vectors times their weight, in fixed point and masked, 8 bytes a number. `count`: the client's own number of
    examples."""

    def __init__(self, config: Config, keys: KeyStore, count: Callable[[str], int]):
        self.config, self.keys, self.count = config, keys, count
        self.identities = Identities(keys.folder, config.privacy.identities)
        self._terms: dict[str, str] = {}
        self.one_run = OneRun()

    def party(self, client: str, run: str) -> Party:
        """The client in the sums of a run. Raises PrivacyError for another run than this worker's: over the books of
        two the same round would be opened of other clients."""
        self.one_run.check(run)
        key = self.keys.key(run, client)
        return Party(client, key, rule_of(self.config), self.identities, self.keys.folder, run)

    def _in_sum(self, client: str, orders: Orders, step: SumStep) -> Party:
        """The client in the sum of its orders. Raises PrivacyError where these are of another run."""
        if orders.run != step.run:
            raise PrivacyError("the coordinator named two runs for one answer of a secure sum: it sends nothing")
        return self.party(client, step.run)

    def expect(self, client: str, inputs: Callable[[], str], orders: Orders) -> None:
        """A coordinator that gives the others a model, or a clip, with which they send nothing has the sum show the one
        client left (Pasquini et al., CCS 2022): all must sign that they were given the same."""
        self._terms[client] = digest_of(inputs(), *orders.shape())

    def members(self, client: str, orders: Orders) -> tuple[str, ...]:
        step = orders.sum
        return () if step is None else self._in_sum(client, orders, step).session(step.name).members

    @property
    def step(self) -> float:
        return secure_sum.STEP

    def rounding(self, numbers: int) -> float:
        return secure_sum.STEP / 2 * numbers**0.5

    def seal(
        self, client: str, tensors: Tensors, orders: Orders, asked: Question | int, noise: Noise | None = None
    ) -> Packet:
        step = orders.sum
        if step is None:
            if client != PUBLIC and not isinstance(asked, IN_CLEAR):
                raise PrivacyError(
                    f"the coordinator asked for {_what(asked)} in clear, and the client's own config has "
                    "privacy.secure_aggregation: it sends nothing"
                )
            return super().seal(client, tensors, orders, asked, noise)
        party, weight = self._in_sum(client, orders, step), self._weight(client, orders.weight)
        names = sorted(tensors)
        values = torch.cat([tensors[n].detach().double().reshape(-1) for n in names]).cpu().numpy() * weight
        vector = secure_sum.encode(values, len(party.session(step.name).members))
        if noise is not None:
            vector += noise(len(vector)).view(np.uint64)  # in the ring, before the masks: nobody sees it without
        manifest = tuple((n, tuple(tensors[n].shape)) for n in names)
        terms = digest_of(self._terms.pop(client, ""), repr(manifest))
        return Packet(manifest, party.mask(step.name, step.listed, *round_and_purpose(asked), vector, terms))

    def _weight(self, client: str, ordered: float | None) -> float:
        """What the vector is multiplied by. Raises PrivacyError for a weight that the client's own config and count do
        not give: with all others near 0 the sum would show one client."""
        config, own = self.config, float(self.count(client))
        if not config.by_examples:
            fits = ordered == 1.0
        elif config.privacy.on:  # its own number is private: `orders.Budget` holds the weight against what it has told
            fits = ordered is not None
        else:
            fits = ordered is None
        if not fits:
            raise PrivacyError(
                "the coordinator ordered another weight in a secure sum than the client's own config and number of "
                "examples give: it sends nothing"
            )
        return own if ordered is None else ordered

    def answers(self, question: Question) -> bool:
        return isinstance(question, SumQuestion)


def _what(asked: Question | int) -> str:
    return "its update" if isinstance(asked, int) else asked.what
