"""Who learns what, in each mode: one table, from which README.md, k8s/README.md, `privacy.json` and `fedray threats`
take theirs.

It is about what an honest run gives away and what a party that deviates can take. What it leaves open is meant: a cell
that says "everything" is a reason not to run that mode among parties who distrust each other in that way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedray.config.sections import Config

#: mode -> the settings that it stands for.
MODES = {
    "plain": "no privacy settings",
    "sums": "`privacy.secure_aggregation`",
    "example": "`privacy.epsilon`",
    "example, sums": "`privacy.epsilon`, `privacy.secure_aggregation`",
    "client": "`privacy.epsilon`, `privacy.unit client`",
    "client, sums": "the same with `privacy.secure_aggregation`",
    "nobody": "the same with `privacy.trust nobody`",
}

_OF_EXAMPLES = "of one example no more than epsilon allows"
_OF_CLIENTS = "of one client no more than epsilon allows"

#: Who gets the final adapter, and nothing else.
_OUTSIDER = {
    "plain": "what the adapter has memorised of anybody's data",
    "sums": "what the adapter has memorised of anybody's data",
    "example": _OF_EXAMPLES,
    "example, sums": _OF_EXAMPLES,
    "client": _OF_CLIENTS,
    "client, sums": _OF_CLIENTS,
    "nobody": _OF_CLIENTS,
}

#: Gets the model of every round, and knows its own update.
_OTHER_CLIENT = {
    "plain": "the sum of the others' updates in each round",
    "sums": "the sum of the others' updates in each round",
    "example": _OF_EXAMPLES,
    "example, sums": _OF_EXAMPLES,
    "client": _OF_CLIENTS,
    "client, sums": _OF_CLIENTS,
    "nobody": f"{_OF_CLIENTS} with its own share of the noise taken away",
}

#: Follows the protocol and keeps what it sees.
_CURIOUS = {
    "plain": "each client's update, number of examples, loss and times",
    "sums": "the sum of the updates; each client's number of examples, loss and times",
    "example": f"each client's noised updates: {_OF_EXAMPLES}",
    "example, sums": f"the sum of the noised updates: {_OF_EXAMPLES}",
    "client": "each drawn client's clipped update, without noise",
    "client, sums": "the sum of the clipped updates, without noise",
    "nobody": f"the noised sum: {_OF_CLIENTS}",
}

#: Sends what messages it likes to clients that run fedray.
_LYING = {
    "plain": "as above, of models of its choice",
    "sums": "each client's update, by standing in for the others; with `privacy.identities` sums over more than two "
    "thirds of the clients",
    "example": f"{_OF_EXAMPLES}: each client binds its noise to what it was sent, and keeps its own account of the "
    "run; runs under other names are bounded together by `privacy.lifetime_epsilon`",
    "example, sums": f"{_OF_EXAMPLES}, as to the left",
    "client": "as above, of models of its choice",
    "client, sums": "as with secure sums alone, of clipped updates",
    "nobody": "with `privacy.identities` the epsilon against a lying coordinator, which `privacy.json` states; without "
    "them each client's update with its own share of the noise alone",
}

_OWN_CODE = (
    "everything on the cluster's workers: data, keys and updates. Ray runs the code of whoever holds the cluster's "
    "token in every worker, and the coordinator's pod holds it"
)
_OPERATOR = "everything on the machines that it administers; of others what the coordinator learns"
_OTHER_USER = (
    "nothing from fedray: keys, journals and copies of data are files of their owner alone, and an embedded Ray "
    "listens on the loopback address with a token of its own; run directories have the modes that the umask gives them"
)

#: who -> mode -> what they learn.
THREATS: dict[str, dict[str, str]] = {
    "an outsider with the adapter": _OUTSIDER,
    "another client": _OTHER_CLIENT,
    "a curious coordinator": _CURIOUS,
    "a coordinator that sends other messages": _LYING,
    "a coordinator, or a client, with code of its own": dict.fromkeys(MODES, _OWN_CODE),
    "the cluster's operator": dict.fromkeys(MODES, _OPERATOR),
    "another user of the machine": dict.fromkeys(MODES, _OTHER_USER),
}


def mode_of(config: Config) -> str:
    """Which of MODES a config is."""
    privacy = config.privacy
    if privacy.trust == "nobody":
        return "nobody"
    named = privacy.unit if privacy.on else ""
    return ", ".join(word for word in (named, "sums" if privacy.secure_aggregation else "") if word) or "plain"


def lines(config: Config) -> list[dict[str, str]]:
    """Who learns what in a config's mode, for `privacy.json`."""
    mode = mode_of(config)
    return [{"who": who, "learns": learns[mode]} for who, learns in THREATS.items()]


def markdown() -> str:
    """The whole table. What is the same in all modes stands below it."""
    differing = {who: learns for who, learns in THREATS.items() if len(set(learns.values())) > 1}
    rows = [["mode", *differing], ["---"] * (1 + len(differing))]
    rows += [[settings, *(learns[mode] for learns in differing.values())] for mode, settings in MODES.items()]
    same = [
        f"- *{who[0].upper()}{who[1:]}*, in every mode: {next(iter(learns.values()))}."
        for who, learns in THREATS.items()
        if who not in differing
    ]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *same])
