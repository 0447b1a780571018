"""Which channel a config asks for, put together: the server's half, the client's half, the checks, what is said of
it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.federation.channels import accounted, buffered, client, distributed, example, masked, plain, secure
from fedray.federation.channels.base import Carriage, Carrier, Channel, ClientSide, Context, Limit, Released, Sealer
from fedray.methods import Method, Spec
from fedray.privacy.keys import KeyStore
from fedray.privacy.ledger import Ledger

if TYPE_CHECKING:
    from fedray.config.sections import Config


def make_channel(context: Context) -> Channel:
    """The server's half of a run: its guarantee over its carrier."""
    privacy = context.config.privacy
    if not privacy.on:
        make = plain.Plain if context.config.federation.buffer is None else buffered.Buffered
        return make(context, _carrier(context, None))
    ledger = accounted.open_ledger(context)
    guarantees = {"client": client.ClientLevel, "example": example.ExampleLevel, "nobody": distributed.Distributed}
    return guarantees[_guarantee(context.config)](context, _carrier(context, ledger.run), ledger)


def _guarantee(config: Config) -> str:
    """Of a private run: its unit, or that nobody is trusted to add the noise."""
    return "nobody" if config.privacy.trust == "nobody" else config.privacy.unit


def _carrier(context: Context, run: str | None) -> Carrier:
    return secure.SecureSums(context, run) if context.config.privacy.secure_aggregation else plain.AsIs(context)


def make_side(trainer: Any, method: Method, spec: Spec) -> ClientSide:
    """The client's half, at a worker with this trainer."""
    privacy = trainer.config.privacy
    keys = KeyStore(privacy.key_dir)
    sealer: Sealer = plain.Packed()
    if privacy.secure_aggregation:
        sealer = masked.Masked(trainer.config, keys, lambda name: len(trainer.examples("train", name)))
    sides = {"client": client.ClippingSide, "example": example.ExampleSide, "nobody": distributed.DistributedSide}
    side = sides[_guarantee(trainer.config)] if privacy.on else plain.PlainSide
    return side(trainer, method, spec, keys, sealer)


def check(config: Config, method: Method) -> None:
    """Raises ValueError, with the reason, for what would not be private, or would say so and not be."""
    privacy = config.privacy
    given = [name for name in secure.OPTIONS if getattr(privacy, name) is not None]
    if given and not privacy.secure_aggregation:
        raise ValueError(f"privacy.{given[0]} belongs to privacy.secure_aggregation: switch it on")
    if privacy.secure_aggregation:
        secure.check(config, method)
        check_norms(config, "privacy.secure_aggregation lets nobody see one update")
    if not privacy.on:
        plain.check(config)
        return
    accounted.check(config)
    if privacy.trust == "nobody":
        distributed.check(config)
    if privacy.unit == "client":
        client.check(config, method)
        check_norms(config, "with privacy.unit client each update is clipped to privacy.clip")
    else:
        example.check(config)


def check_norms(config: Config, why: str) -> None:
    """Raises ValueError for a bound on single updates where there is none to be had (`why`)."""
    for option in ("max_update_norm", "max_update_ratio"):
        if getattr(config.federation, option) is not None:
            raise ValueError(f"{why}: leave federation.{option} out")


def check_clients(config: Config, least: int, rows: Mapping[str, int]) -> None:
    """Raises ConfigError for too few clients a round (`least`: of the cohort), or too few rows of training data at a
    client (`rows`: as far as they are known)."""
    if config.privacy.secure_aggregation:
        secure.check_cohort(least)
    if config.privacy.on and config.privacy.unit == "example":
        example.check_rows(config, rows)


def carriage_of(config: Config, members: int) -> Carriage:
    """What the config's channel makes of each client's numbers in a cohort of so many."""
    by_carrier = secure.carriage(config, members) if config.privacy.secure_aggregation else plain.carriage(config)
    clipped = config.privacy.on and config.privacy.unit == "client"
    return replace(by_carrier, more=client.more_numbers(config) if clipped else 0)


def check_resumable(config: Config, checkpoint: Path) -> None:
    """Raises ConfigError for a run whose ledger is gone from its checkpoints."""
    if config.privacy.on:
        accounted.check_ledger(config.output.dir, checkpoint)


@dataclass(frozen=True)
class Words:
    """What a run's channel says of itself in `privacy.json`: what is protected and against whom, whose key the noise
    comes from, what left each client under its guarantee, and for its carrier's sake, what the coordinator learns of
    what stays with a client, and what is not covered."""

    unit: str
    trust: str
    key_holder: str
    released: list[Released]
    carried: list[Released]
    kept: str
    limits: list[Limit]
    beside: Callable[[Ledger, int], dict[str, Any]]


def words_of(config: Config) -> Words:
    """Of a private run."""
    summed = config.privacy.secure_aggregation
    how, sees = (secure.HOW, secure.SEES) if summed else (plain.HOW, plain.SEES)
    carried, limits = (secure.released(), secure.limits(config)) if summed else ([], [])
    part = {"client": client, "example": example, "nobody": distributed}[_guarantee(config)]
    return Words(
        (client if config.privacy.unit == "client" else example).unit(config),
        part.trust(sees),
        part.KEY_HOLDER,
        part.released(config, how),
        carried,
        part.KEPT,
        part.limits(config) + limits,
        partial(distributed.beside, config) if part is distributed else lambda ledger, clients: {},
    )


def hides_cohort(config: Config) -> bool:
    """Whether who is drawn, and how many, is a secret that epsilon rests on: then nobody may follow who is done."""
    return config.privacy.on and config.privacy.unit == "client" and config.federation.cohort is not None


def quotes_errors(config: Config) -> bool:
    """Whether the words of an error that a client's data raise may leave its machine."""
    return not config.privacy.on
