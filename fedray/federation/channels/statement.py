"""`privacy.json`: what is guaranteed and to whom, all that left each client, and what is not guaranteed.

Each channel states its own lines; here are those that hold for all. Says nothing that the ledger and the config do not:
a privacy officer can check each line against the code it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedray.config.build import make_method
from fedray.config.sections import Config
from fedray.federation.channels.accounted import ledger_of
from fedray.federation.channels.base import Limit, Released
from fedray.federation.channels.registry import Words, words_of
from fedray.federation.channels.threats import lines
from fedray.methods import Method
from fedray.privacy.keys import TEST_KEY
from fedray.privacy.ledger import EVERYONE, Ledger, worst

#: An epsilon above this lets an attacker be all but sure; it is called weak wherever it is shown.
WEAK = 20.0


def read_statement(
    config: Config, folder: Path, clients: Sequence[str], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The statement of a run directory; None of a run without privacy."""
    if not config.privacy.on:
        return None
    return statement(config, ledger_of(folder), clients, records, make_method(config))


def spent(config: Config, folder: Path) -> dict[str, Any]:
    """What `summary.json` says of privacy, of the ledger: it knows of releases that no record tells of."""
    if not config.privacy.on:
        return {}
    ledger = ledger_of(folder)
    return {
        "epsilon": worst([ledger.epsilon(name) for name in ledger.entries]),
        "keys_were_fixed": ledger.fixed,
    }


def statement(
    config: Config, ledger: Ledger, clients: Sequence[str], records: Sequence[Mapping[str, Any]], method: Method
) -> dict[str, Any]:
    """Plain values. `records`: those of the rounds so far, the evaluation before round 1 first."""
    words = words_of(config)
    return {
        "guarantee": _guarantee(config, ledger, clients, words),
        "rounds": sum(r["round"] > 0 for r in records),
        "left_each_client": [asdict(line) for line in _released(config, method, words)],
        "who_learns_what": lines(config),
        "not_guaranteed": [asdict(line) for line in _limits(config, words)],
        "plans": {name: plan.to_dict() for name, plan in ledger.plans.items()},
        "releases": {
            name: [{"round": e.round, "draw": e.draw, **vars(e.release)} for e in entries]
            for name, entries in ledger.entries.items()
        },
    }


def _guarantee(config: Config, ledger: Ledger, clients: Sequence[str], words: Words) -> dict[str, Any]:
    spent = {c: ledger.epsilon(EVERYONE if EVERYONE in ledger.plans else c) for c in clients}
    most, void = worst(list(spent.values())), None
    if ledger.fixed:
        void = (
            f"the noise keys were fixed by {TEST_KEY}: whoever knows that word can take the noise away, so nothing is "
            "private"
        )
    weak = void is None and (most or 0.0) > WEAK
    return {
        "epsilon": None if void else most,
        "delta": ledger.delta,
        "unit": config.privacy.unit,
        "what_a_unit_is": words.unit,
        "relation": "add-or-remove-one",
        "void": void,
        "weak": f"an epsilon above {WEAK:g} bounds next to nothing" if weak else None,
        "trust": words.trust,
        "epsilon_by_client": spent,
        "budget": config.privacy.epsilon,
        "accountant": "PRV (opacus), its upper bound, and never above RDP",
        **words.beside(ledger, len(clients)),
    }


def _released(config: Config, method: Method, words: Words) -> list[Released]:
    """What crossed a client's border, in the order in which it does."""
    lines, each = list(words.released), "each round it is drawn in"
    if method.asks:
        what, guarantee = "an answer to the method's second question", "a function of the same trained factors"
        lines.append(Released(what, each, guarantee, "federation/questions.py, MethodQuestion"))
    if config.federation.keep_optimizer or method.kept:
        what = "its optimizer state or own factors, into the coordinator's checkpoint"
        lines.append(Released(what, each, words.kept, "federation/coordinator.py, keep"))
    identity = "a hash that says nothing of the key"
    return [
        *lines,
        *words.carried,
        Released("the identity of its key, bound to its data", "once", identity, "privacy/keys.py"),
        Released(
            "the kind of an error, where it fails",
            "then",
            "none, but no words of the error",
            "federation/channels/accounted.py, failure",
        ),
    ]


#: What no guarantee covers, whatever the channel, after what it says of its keys.
_ALWAYS = (
    Limit(
        "medium",
        "People or rows that are in several clients' data: each client's epsilon is of its own data, and theirs is "
        "the sum over those clients",
        "privacy/ledger.py, worst",
    ),
    Limit(
        "medium",
        "The set of label values, the column names and the clients' names are taken as public",
        "data/partition.py, _classes",
    ),
    Limit(
        "medium",
        "The held-out examples that the coordinator evaluates on: their metrics are published without noise",
        "federation/evaluation.py, evaluate",
    ),
    Limit(
        "low",
        "Times: how long a client takes depends on how many examples it drew",
        "training/local.py, _private_steps",
    ),
    Limit(
        "low",
        "That a client failed, or that its loss stopped being finite",
        "federation/channels/accounted.py, failure",
    ),
    Limit(
        "low",
        "Real-number analysis: sums are rounded to fp32 after fp64 noise of 53 random bits",
        "privacy/dpsgd.py, noised",
    ),
)


def _limits(config: Config, words: Words) -> list[Limit]:
    """What is not guaranteed."""
    keys = (
        f"The {words.key_holder} machine and its key folder until the run ends, or `fedray forget` is called for one "
        "that will not: whoever reads the key can take the noise away"
    )
    return [
        _separation(config),
        Limit(
            "high",
            "Choices made by looking at other runs on the same data (learning rate, clip, rank): only this run's "
            "releases are accounted for",
            "compare/comparison.py",
        ),
        Limit("medium", keys, "privacy/keys.py, KeyStore"),
        *_ALWAYS,
        *_between_ranks(config),
        *words.limits,
    ]


def _between_ranks(config: Config) -> list[Limit]:
    """Of clients whose steps several processes take."""
    if config.most_ranks == 1:
        return []
    return [
        Limit(
            "medium",
            "What a client's ranks say to each other, gradients without noise among it, is neither encrypted nor "
            "authenticated: it must stay in the client's own network",
            "ranks.py, Group",
        )
    ]


def _separation(config: Config) -> Limit:
    """Who opens whose data."""
    if config.siloed:
        return Limit(
            "medium",
            "Separation of the machines: a client's data are opened on nodes with its labels alone, as far as the "
            "cluster's operator gives these labels to that client's machines and to no others",
            "federation/placement.py, place_apart",
        )
    return Limit(
        "high",
        "Separation of the machines: every worker and the coordinator open all data sources of the config to deal "
        "them out; real parties must not share one config's sources",
        "data/partition.py, load_data",
    )
