"""fedray's own rules for what parts pods from the machine, from the API server and from each other: host namespaces and
paths, roles, doors to the outside, and what belongs to one silo alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lint_schemas import Object, listed, part

if TYPE_CHECKING:
    from lint_trust import Pod

#: What gives a container a part of its machine.
HOST = ("hostNetwork", "hostPID", "hostIPC")
RESTRICTED = ("pod-security.kubernetes.io/enforce", "restricted")
#: Kinds that give an account rights at the API server.
BINDINGS = ("ClusterRoleBinding", "RoleBinding")
#: Kinds of a service that other machines reach.
OPEN_SERVICES = ("LoadBalancer", "NodePort")


def isolation(made: list[tuple[Object, Pod]], things: list[Object]) -> Iterator[tuple[Object, str]]:
    """What lets one reach what is another's. `made`: the objects' pods; `things`: all objects, applied together."""
    for thing, pod in made:
        yield from ((thing, f"{pod.where}: {fault}") for fault in (*_host(pod), *_of_its_silo(pod)))
    for thing in things:
        yield from ((thing, fault) for fault in _object(thing))
    yield from _shared_claims(made)


def _object(thing: Object) -> Iterator[str]:
    kind, spec = thing.get("kind"), part(thing, "spec")
    if kind == "Namespace" and part(part(thing, "metadata"), "labels").get(RESTRICTED[0]) != RESTRICTED[1]:
        yield f"its pods may take their machine: the label {RESTRICTED[0]}: {RESTRICTED[1]} is missing"
    if kind in BINDINGS:
        yield "gives an account rights at the API server: nothing here needs any but what the operator gives"
    if kind == "Service" and spec.get("type") in OPEN_SERVICES:
        yield f"a service of type {spec['type']} is reached from outside the cluster"
    for cluster in (spec, part(spec, "rayClusterSpec"), part(spec, "rayClusterConfig")):
        head = part(cluster, "headGroupSpec")
        if head.get("serviceType") in OPEN_SERVICES or head.get("enableIngress"):
            yield "the head is reached from outside the cluster: no serviceType, no enableIngress"


def _host(pod: Pod) -> Iterator[str]:
    for name in HOST:
        if pod.spec.get(name):
            yield f"it is on its machine's own: {name}"
    for volume in listed(pod.spec, "volumes"):
        if "hostPath" in volume:
            yield f"volume '{volume['name']}' is a folder of its machine (hostPath)"
    for container in pod.containers():
        if part(container, "securityContext").get("privileged"):
            yield f"'{container['name']}' is privileged"
        for entry in listed(container, "env"):
            if entry.get("name") == "RAY_AUTH_MODE" and entry.get("value") != "token":
                yield f"'{container['name']}' asks for no token: RAY_AUTH_MODE is {entry.get('value')}"


def _of_its_silo(pod: Pod) -> Iterator[str]:
    from lint_trust import SILO

    if pod.party.startswith("silo ") and pod.spec.get("nodeSelector", {}).get(SILO) != pod.labels[SILO]:
        yield f"it may run on any machine: nodeSelector {SILO}: {pod.labels[SILO]}"


def _shared_claims(made: list[tuple[Object, Pod]]) -> Iterator[tuple[Object, str]]:
    """A claim that a silo mounts is its own, or it is all parties' of the run together, and silos only read it."""
    from lint_trust import claims

    runs = [(thing, pod) for thing, pod in made if pod.ray]
    everyone = {pod.party for _, pod in runs}
    mounted: dict[str, set[str]] = {}
    for _, pod in made:
        for claim in claims(pod).values():
            mounted.setdefault(claim, set()).add(pod.party)
    for thing, pod in (each for each in runs if each[1].party.startswith("silo ")):
        for volume, claim in claims(pod).items():
            others = mounted[claim] - {pod.party}
            if others and not (everyone <= mounted[claim] and _reads_only(pod, volume)):
                yield thing, f"{pod.where}: its claim {claim} is mounted by others too: {', '.join(sorted(others))}"


def _reads_only(pod: Pod, volume: str) -> bool:
    mounts = [m for c in pod.containers() for m in listed(c, "volumeMounts") if m["name"] == volume]
    source = next(v for v in listed(pod.spec, "volumes") if v["name"] == volume)["persistentVolumeClaim"]
    return bool(source.get("readOnly")) or all(m.get("readOnly") for m in mounts)
