"""`privacy.json`: what is guaranteed and to whom, all that left each client, and what is not guaranteed. Says nothing that the ledger and the
config do not: a privacy officer can check each line against the code it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedray.config.sections import Config
from fedray.methods import Method
from fedray.privacy.keys import TEST_KEY
from fedray.privacy.ledger import EVERYONE, Ledger, worst

#: An epsilon above this lets an attacker be all but sure; it is called weak wherever it is shown.
WEAK = 20.0


def statement(
    config: Config, ledger: Ledger, clients: Sequence[str], records: Sequence[Mapping[str, Any]], method: Method
) -> dict[str, Any]:
    """Plain values. `records`: those of the rounds so far, the evaluation before round 1 first."""
    by_client = config.privacy.unit == "client"
    spent = {c: ledger.epsilon(EVERYONE if by_client else c) for c in clients}
    void = (
        f"the noise keys were fixed by {TEST_KEY}: whoever knows that word can take the noise away, so nothing is private"
        if ledger.fixed
        else None
    )
    return {
        "guarantee": {
            "epsilon": None if void else worst(list(spent.values())),
            "delta": ledger.delta,
            "unit": config.privacy.unit,
            "what_a_unit_is": _unit(config),
            "relation": "add-or-remove-one",
            "void": void,
            "weak": None
            if void or (worst(list(spent.values())) or 0.0) <= WEAK
            else f"an epsilon above {WEAK:g} bounds next to nothing",
            "trust": _trust(config),
            "epsilon_by_client": spent,
            "budget": config.privacy.epsilon,
            "accountant": "PRV (opacus), its upper bound, and never above RDP",
        },
        "rounds": sum(r["round"] > 0 for r in records),
        "left_each_client": _left(config, method),
        "not_guaranteed": _not_guaranteed(config),
        "plans": {name: plan.to_dict() for name, plan in ledger.plans.items()},
        "releases": {
            name: [{"round": e.round, "draw": e.draw, **vars(e.release)} for e in entries]
            for name, entries in ledger.entries.items()
        },
    }


def _unit(config: Config) -> str:
    if config.privacy.unit == "client":
        return "one client with all its data"
    if config.model.task == "causal-lm" and config.data.completion is None:
        return f"one sequence of at most {config.data.max_length} tokens; a longer text is several units, and so is a person with several texts"
    return "one row of the training data; a person with several rows is several units"


def _trust(config: Config) -> str:
    if config.privacy.unit == "client":
        seen = (
            "sees only the sum of the clipped updates"
            if config.privacy.secure_aggregation
            else "sees each client's clipped update"
        )
        return f"against whoever sees the models, not against the coordinator, which adds the noise, {seen} and keeps the key of the noise and of the sampling"
    return "against everyone but the client's own machine, the coordinator and the other clients included: each client adds all its noise itself"


def _left(config: Config, method: Method) -> list[dict[str, str]]:
    """What crossed a client's border, in the order in which it does."""
    secure, by_client = config.privacy.secure_aggregation, config.privacy.unit == "client"
    masked = ", in a secure sum that hides all but the clients' total" if secure else ""
    left = []

    def add(what: str, when: str, guarantee: str, place: str) -> None:
        left.append({"what": what, "when": when, "guarantee": guarantee, "place": place})

    if not by_client:
        add("its number of examples", "once", "Gaussian noise, charged (count)", "federation/worker.py, Ask.COUNT")
    if config.adapter.subspace == "private":
        add(
            f"two sketches of its gradient{masked}",
            "once",
            "normalised example by example, Gaussian noise, charged (subspace)",
            "training/subspace.py",
        )
    if by_client:
        add(
            f"its update, clipped as a whole{masked}",
            "each round it is drawn in",
            "noised by the coordinator after summing, charged (training)",
            "privacy/client_level.py",
        )
        if config.privacy.adaptive_clip:
            add(
                f"whether its update was within the clip{masked}",
                "each round it is drawn in",
                "noised by the coordinator after summing, part of the same charge",
                "privacy/client_level.py",
            )
    else:
        add(
            f"its trained factors and heads{masked}",
            "each round it is drawn in",
            "functions of DP-SGD steps alone, charged (training)",
            "privacy/dpsgd.py",
        )
    if method.asks:
        add(
            "an answer to the method's second question",
            "each round it is drawn in",
            "a function of the same trained factors",
            "federation/worker.py, Ask.ANSWER",
        )
    if config.federation.keep_optimizer or method.kept:
        kind = (
            "not noised: it stays with the coordinator, which is trusted"
            if by_client
            else "a function of DP-SGD steps alone"
        )
        add(
            "its optimizer state or own factors, into the coordinator's checkpoint",
            "each round it is drawn in",
            kind,
            "federation/coordinator.py, _kept",
        )
    if secure:
        add(
            "public keys, encrypted shares, and shares that open the sum",
            "each round it is drawn in",
            "hide all but the sum from fewer clients than the threshold",
            "privacy/secure_sum.py",
        )
    add("the identity of its key, bound to its data", "once", "a hash that says nothing of the key", "privacy/keys.py")
    add(
        "the kind of an error, where it fails",
        "then",
        "none, but no words of the error",
        "federation/worker.py, _failure",
    )
    return left


def _not_guaranteed(config: Config) -> list[dict[str, str]]:
    found = []

    def add(severity: str, what: str, place: str) -> None:
        found.append({"severity": severity, "what": what, "place": place})

    add(
        "high",
        "Separation of the machines: every worker and the coordinator open all data sources of the config to deal them out; real parties must not share one config's sources",
        "data/partition.py, load_data",
    )
    add(
        "high",
        "Choices made by looking at other runs on the same data (learning rate, clip, rank): only this run's releases are accounted for",
        "compare.py",
    )
    whose = "coordinator's" if config.privacy.unit == "client" else "client's"
    add(
        "medium",
        f"The {whose} machine and its key folder until the run ends, or `fedray forget` is called for one that will not: whoever reads the key can take the noise away",
        "privacy/keys.py, KeyStore",
    )
    add(
        "medium",
        "People or rows that are in several clients' data: each client's epsilon is of its own data, and theirs is the sum over those clients",
        "privacy/ledger.py, worst",
    )
    add(
        "medium",
        "The set of label values, the column names and the clients' names are taken as public",
        "data/partition.py, _classes",
    )
    add(
        "medium",
        "The held-out examples that the coordinator evaluates on: their metrics are published without noise",
        "federation/coordinator.py, _evaluate",
    )
    add(
        "low",
        "Times: how long a client takes depends on how many examples it drew",
        "training/local.py, _private_steps",
    )
    add("low", "That a client failed, or that its loss stopped being finite", "federation/worker.py, _failure")
    add(
        "low",
        "Real-number analysis: sums are rounded to fp32 after fp64 noise of 53 random bits",
        "privacy/dpsgd.py, noised",
    )
    if config.privacy.unit == "example":
        add(
            "low",
            "A round repeated on another kind of machine or with other threads has the same noise and other last bits: their difference is noise-free rounding",
            "federation/worker.py, train",
        )
        add(
            "medium",
            "A coordinator that asks for more rounds than it charges: a client checks the noise, clip and rate of its orders, and keeps no count of rounds",
            "federation/guard.py, check_orders",
        )
    if config.privacy.unit == "client":
        add(
            "high",
            "A coordinator that does not follow the protocol: it alone adds the noise",
            "federation/guard.py, mean",
        )
        add(
            "medium",
            "`rounds.jsonl` and `report.html` have bytes and times that tell the size of each round's sample: publish the models, not the records",
            "federation/coordinator.py, run_round",
        )
    if config.privacy.secure_aggregation:
        add(
            "medium",
            "A coordinator that lies about who dropped out or who takes part: it is assumed to follow the protocol (no signatures)",
            "privacy/secure_sum.py",
        )
        add(
            "medium",
            "As many clients as the threshold together with the coordinator can open one client's update",
            "privacy/secure_sum.py, reveal",
        )
        if (config.privacy.secure_threshold or 1.0) <= 0.5:
            add(
                "high",
                "privacy.secure_threshold of a half or less: a lying coordinator could have two groups open different sums of one session, and read a client from their difference",
                "privacy/secure_sum.py, threshold_of",
            )
        add(
            "medium",
            "All clients of an opened sum but one, together, can take their own parts away and read that one's (of three clients one may drop out: then each of the two reads the other's)",
            "privacy/secure_sum.py, default_threshold",
        )
    return found
