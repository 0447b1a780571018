"""fedray's own rules for network policies: nothing without one, no way out that is wider than it must be, and between
silos the port of objects alone.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lint_schemas import Object, listed, part

if TYPE_CHECKING:
    from lint_trust import Pod

#: The longest list of addresses that one rule may name: a /28, as managed API servers have.
WIDEST = 16
#: Ray chooses these at random where they are not given.
PORTS = (
    "object-manager-port",
    "node-manager-port",
    "dashboard-agent-grpc-port",
    "min-worker-port",
    "max-worker-port",
)
ANY = "any"
#: What names peers that are not pods of this namespace.
STRANGERS = frozenset({"ipBlock", "namespaceSelector"})


def network(made: list[tuple[Object, Pod]], things: list[Object]) -> Iterator[tuple[Object, str]]:
    """What lets more through than it should. `made`: the objects' pods; `things`: all objects, as they are applied."""
    policies = [_of_here(t, _labels_of_here(things)) for t in things if t.get("kind") == "NetworkPolicy"]
    for policy in policies:
        yield from ((policy, fault) for fault in _wide(policy))
    for thing, pod in made:
        for way in ("Ingress", "Egress"):
            if not any(_covers(p, way, pod.labels) for p in policies):
                yield thing, f"{pod.where}: no network policy closes its {way.lower()}"
    yield from _silos(made, policies)


def _labels_of_here(things: list[Object]) -> Object:
    """The labels of the namespace that all of it is applied to."""
    for thing in things:
        if thing.get("kind") == "Namespace":
            about = part(thing, "metadata")
            return {**part(about, "labels"), "kubernetes.io/metadata.name": about.get("name")}
    return {}


def _of_here(policy: Object, labels: Object) -> Object:
    """The policy with peers that name this namespace, or all of them, as what they are here: its own pods."""
    spec = dict(part(policy, "spec"))
    for way, peers in (("egress", "to"), ("ingress", "from")):
        rules = []
        for rule in listed(spec, way):
            here = [
                {"podSelector": part(peer, "podSelector")}
                for peer in listed(rule, peers)
                if "namespaceSelector" in peer and matches(part(peer, "namespaceSelector"), labels)
            ]
            rules.append({**rule, peers: [*listed(rule, peers), *here]} if here else rule)
        if way in spec:
            spec[way] = rules
    return {**policy, "spec": spec}


def outside(policy: Object) -> list[str]:
    """The address blocks that a policy lets pods reach."""
    rules = listed(part(policy, "spec"), "egress")
    return [str(peer["ipBlock"].get("cidr")) for r in rules for peer in listed(r, "to") if "ipBlock" in peer]


def _covers(policy: Object, way: str, labels: Object) -> bool:
    spec = part(policy, "spec")
    return way in (listed(spec, "policyTypes")) and matches(part(spec, "podSelector"), labels)


def matches(selector: Object, labels: Object) -> bool:
    """Whether a label selector takes a pod of these labels."""
    wanted = part(selector, "matchLabels").items() <= labels.items()
    return wanted and all(_holds(e, labels) for e in listed(selector, "matchExpressions"))


def _holds(expression: Object, labels: Object) -> bool:
    key, values = expression["key"], listed(expression, "values")
    holds = {
        "In": labels.get(key) in values,
        "NotIn": labels.get(key) not in values,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }
    return holds[expression["operator"]]


# --- ways out and in ------------------------------------------------------------------------------------------------


def _wide(policy: Object) -> Iterator[str]:
    for way, peers in (("egress", "to"), ("ingress", "from")):
        for rule in listed(part(policy, "spec"), way):
            if not rule.get(peers):
                yield f"an {way} rule without '{peers}' is open to everybody"
            if sum(_addresses(peer) for peer in listed(rule, peers)) > WIDEST:
                yield f"an {way} rule takes in more than {WIDEST} addresses together: name single ones"
            for peer in listed(rule, peers):
                yield from (f"an {way} rule {fault}" for fault in _wide_peer(peer, rule, way))


def _addresses(peer: Object) -> int:
    block = part(peer, "ipBlock").get("cidr")
    return ipaddress.ip_network(block, strict=False).num_addresses if block else 0


def _wide_peer(peer: Object, rule: Object, way: str) -> Iterator[str]:
    block = part(peer, "ipBlock").get("cidr")
    if block and ipaddress.ip_network(block, strict=False).num_addresses > WIDEST:
        yield f"takes in {block}: name single addresses"
    if not STRANGERS.isdisjoint(peer) and (not rule.get("ports") or any("endPort" in p for p in rule["ports"])):
        yield "lets every port through to others than fedray's pods"
    if way == "egress" and _whole_namespace(peer):
        yield "takes in every pod of a namespace: say which with podSelector"
    if part(peer, "namespaceSelector") == {} and "namespaceSelector" in peer:
        yield "takes in every namespace: say which with namespaceSelector"


def _whole_namespace(peer: Object) -> bool:
    return "namespaceSelector" in peer and not peer.get("podSelector")


# --- between silos --------------------------------------------------------------------------------------------------


def _silos(made: list[tuple[Object, Pod]], policies: list[Object]) -> Iterator[tuple[Object, str]]:
    silos = {pod.party: (thing, pod) for thing, pod in made if pod.party.startswith("silo ")}
    for thing in {id(thing): thing for thing, _ in silos.values()}.values():
        yield from ((thing, fault) for fault in _random_ports(thing))
    for (name, (thing, pod)), (other, (_, there)) in itertools.permutations(silos.items(), 2):
        for way, me, them in (("egress", pod, there), ("ingress", there, pod)):
            if more := _ports(policies, way, me.labels, them.labels) - {_objects(thing)}:
                said = ", ".join(sorted(more))
                yield thing, f"{name} reaches {other} on port {said} by an {way} rule: objects' alone is needed"


def _groups(thing: Object) -> list[Object]:
    """The head's group and the workers' of a RayJob or RayCluster."""
    spec = part(thing, "spec")
    cluster = spec.get("rayClusterSpec") or spec
    return [part(cluster, "headGroupSpec"), *(listed(cluster, "workerGroupSpecs"))]


def _objects(thing: Object) -> str:
    return str(part(_groups(thing)[-1], "rayStartParams").get("object-manager-port"))


def _random_ports(thing: Object) -> Iterator[str]:
    for group in _groups(thing):
        if missing := [p for p in PORTS if p not in part(group, "rayStartParams")]:
            yield (
                f"group '{group.get('groupName', 'head')}': Ray chooses {', '.join(missing)} at random, "
                "and no policy can name it: give it in rayStartParams"
            )


def _ports(policies: list[Object], way: str, mine: Object, theirs: Object) -> set[str]:
    """The ports on which policies for pods labelled `mine` let those labelled `theirs` through; ANY for all."""
    rules = [
        rule
        for policy in policies
        if _covers(policy, way.capitalize(), mine)
        for rule in listed(part(policy, "spec"), way)
        if any(_is_peer(peer, theirs) for peer in rule.get("to" if way == "egress" else "from") or [{}])
    ]
    return {_span(port) for rule in rules for port in rule.get("ports") or [{}]}


def _is_peer(peer: Object, labels: Object) -> bool:
    """Whether a peer takes in a pod of this namespace; an empty one takes in everybody."""
    return STRANGERS.isdisjoint(peer) and matches(part(peer, "podSelector"), labels)


def _span(port: Object) -> str:
    if "port" not in port:
        return ANY
    return f"{port['port']}-{port['endPort']}" if "endPort" in port else str(port["port"])
