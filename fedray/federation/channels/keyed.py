"""What channels share whose noise comes from the clients' own keys: whose key it is, a key that was lost, and what a
client has answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedray.federation.channels.accounted import Accounted, PrivateSide
from fedray.federation.channels.base import Training
from fedray.federation.channels.plain import raised
from fedray.federation.failures import WORKER_ATTEMPTS
from fedray.federation.messages import NO_ORDERS, PUBLIC, Answered, Failure, Orders, Outcome
from fedray.federation.questions import ForgetKeys, Question
from fedray.federation.wire import Packet
from fedray.privacy.accountant import Release
from fedray.privacy.journal import Journal, Said
from fedray.privacy.keys import Key
from fedray.privacy.ledger import draw_of
from fedray.privacy.lifetime import Lifetime

if TYPE_CHECKING:
    from fedray.federation.channels.base import ClientSide


@dataclass(frozen=True)
class KeyIdentity(Question):
    """Which key the client's noise will come from; the identity comes beside the answer, as with every private
    answer."""

    name = "KEY"
    what = "the identity of its noise key"

    def answer(self, side: ClientSide, client: str, kept: Packet | None) -> Mapping[str, Tensor]:
        return {}


# --- the server's half -------------------------------------------------------------------------------------------


class Keyed(Accounted):
    """Releases are known by the key that their noise is from."""

    def ask_keys(self) -> None:
        """Whose key is whose, before anything is charged. Raises ClientError when a client fails."""
        ledger = self.ledger
        self.save()  # the run's name first: the keys that the question makes are filed under it
        orders = {client: Orders(ledger.run) for client in self.context.clients}
        for client, report in self._asked(KeyIdentity(orders=orders)):
            ledger.keys[client], ledger.fixed = report.key, ledger.fixed or report.key_is_fixed

    def _asked(self, question: Question) -> Iterator[tuple[str, Answered]]:
        """What every client says beside its answer. Raises ClientError when one fails."""
        for outcome in self.context.pool.ask(question, self.context.clients, {}, None):
            yield outcome.client, raised(outcome)

    def train(self, call: Training, clients: Sequence[str]) -> list[Outcome]:
        """A client that has lost its noise key is charged for another draw, if it can afford it, and asked again."""
        outcomes: dict[str, Outcome] = {}
        for attempt in range(WORKER_ATTEMPTS):
            orders, refused = self.orders(call, [c for c in clients if c not in outcomes])
            outcomes |= refused
            trained = self.train_by(call, orders)
            lost = self.note(trained)
            again = lost if attempt < WORKER_ATTEMPTS - 1 else []
            outcomes |= {o.client: o for o in trained if o.client not in again}
            if not again:
                break
        return [outcomes[c] for c in clients]

    def orders(self, call: Training, clients: Sequence[str]) -> tuple[dict[str, Orders], dict[str, Outcome]]:
        """What each client is told for its round, charged and on disk before it is told, and who cannot afford it."""
        raise NotImplementedError

    def draw(self, client: str, *inputs: str | int) -> str:
        """The name of a draw of noise by a client's key."""
        return draw_of(self.ledger.keys[client], self.ledger.run, client, *inputs)


# --- the client's half -------------------------------------------------------------------------------------------


class KeyedSide(PrivateSide):
    """A client that adds noise from its own key, whoever asks, and writes down what it answers."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._fingerprints: dict[str, bytes] = {}
        self._journals: dict[tuple[str, str], Journal] = {}
        self._lifetimes: dict[str, Lifetime] = {}

    def admitted(self, client: str) -> tuple[type[Question], ...]:
        questions = super().admitted(client)
        return questions if client == PUBLIC else (*questions, KeyIdentity)

    def key(self, client: str, orders: Orders) -> Key:
        """The key of the client's noise. Raises KeyLostError where it is not the one that the ledger knows,
        PrivacyError for another run than this worker's."""
        self.sealer.one_run.check(orders.run)  # the same for what it noises and for what it masks
        # Changed data are met like a lost key: other noise, and a new charge.
        key = self.keys.key(orders.run, client).bound(self._fingerprint(client))
        if orders.key and key.identity != orders.key:
            raise KeyLostError(key.identity)
        return key

    def _fingerprint(self, client: str) -> bytes:
        if client not in self._fingerprints:
            self._fingerprints[client] = self.trainer.examples("train", client).digest()
        return self._fingerprints[client]

    def journal(self, client: str, orders: Orders) -> Journal:
        """Of the client in the orders' run."""
        if (orders.run, client) not in self._journals:
            self._journals[orders.run, client] = Journal.of(self.keys.folder, orders.run, client)
        return self._journals[orders.run, client]

    def write_down(
        self,
        client: str,
        orders: Orders,
        said: Said,
        check: Callable[[Sequence[Release]], None],
        delta: float,
        planned: Sequence[Release] = (),
    ) -> None:
        """What is about to be said, within the run's budget (`check`) and the client's own of all runs. Raises
        PrivacyError."""
        if client not in self._lifetimes:
            budget = self.config.privacy.lifetime_epsilon
            self._lifetimes[client] = Lifetime(self.keys.folder, client, budget)
        self._lifetimes[client].answer(self.journal(client, orders), said, check, delta, planned)

    def forget(self, client: str, orders: Orders) -> None:
        """First it is written down that the run is over: a coordinator could have another key drawn otherwise."""
        self.journal(client, orders).close()
        super().forget(client, orders)

    def answered(self, client: str, question: Question, packet: Packet) -> Answered:
        orders = question.orders.get(client, NO_ORDERS)
        if not orders.run or isinstance(question, ForgetKeys):
            return Answered(client, 0, packet.nbytes)
        key = self.key(client, orders)
        return Answered(client, 0, packet.nbytes, key.identity, key.fixed)

    def failure(self, client: str, error: Exception) -> Failure:
        if isinstance(error, KeyLostError):
            return Failure(client, "its noise key was lost, or its data are others", "", error.identity)
        return super().failure(client, error)


class KeyLostError(Exception):
    """The client's key, bound to its data, is not the one that the ledger knows."""

    def __init__(self, identity: str):
        super().__init__(identity)
        self.identity = identity
