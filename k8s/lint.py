"""Check manifests before a cluster sees them: KubeRay's own rules, which no schema holds, and, where they are at hand,
its CRDs.

    python k8s/lint.py k8s/overlays/*/*.yaml                       the rules of KubeRay v1.7.0, and fedray's own
    python k8s/lint.py --crds ../shared/kuberay k8s/overlays/...   the CRDs' schemas too, with their defaults applied
    python k8s/lint.py k8s/Dockerfile                              nothing taken in without its hash
    kubectl kustomize k8s/overlays/rayjob | python k8s/lint.py -   what kustomize makes of them: network policies too

Prints a line for each fault and exits with 1 where there is any. What is still to be filled in is said beside that, and
is a fault with --filled. Rules: validation.go of ray-operator v1.7.0 (ray-operator/controllers/ray/utils); fedray's own
are in lint_trust.py and lint_network.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lint_schemas import Object, documents, load_schemas, part, validate
from lint_trust import recipe, to_fill, trust

LONGEST = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
RESOURCE_PARAMS = {"num-cpus": "CPU", "num-gpus": "GPU", "memory": "memory"}
NEVER = (None, "Never")
REDIS_VARIABLES = ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS")


def lint(thing: Object) -> list[str]:
    """What is wrong with an object of ray.io, a sentence each; nothing for other kinds."""
    kind = thing.get("kind")
    return [*_names(thing), *_BY_KIND[kind](thing)] if kind in _BY_KIND else []


def _ray_cluster(thing: Object) -> Iterator[str]:
    spec = thing.get("spec", {})
    yield from _managed(spec)
    yield from _kueue(spec, thing)
    yield from _cluster(spec, thing)


def _ray_service(thing: Object) -> Iterator[str]:
    spec = thing.get("spec", {})
    cluster = spec.get("rayClusterConfig", {})
    yield from _managed(spec)
    kinds = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
    upgrade = part(spec, "upgradeStrategy").get("type")
    if upgrade is not None and upgrade not in kinds:
        yield f"upgradeStrategy '{upgrade}' is none of a RayService's: {', '.join(kinds)}"
    if upgrade == "NewClusterWithIncrementalUpgrade" and not cluster.get("enableInTreeAutoscaling"):
        yield "NewClusterWithIncrementalUpgrade needs the autoscaler"
    yield from _cluster(cluster, thing)


_BY_KIND: dict[Any, Callable[[Object], Iterator[str]]] = {
    "RayCluster": _ray_cluster,
    "RayJob": lambda thing: _job(thing.get("spec", {}), thing),
    "RayService": _ray_service,
    "RayCronJob": lambda thing: _job(thing.get("spec", {}).get("jobTemplate", {}), thing),
}


def _names(thing: Object) -> Iterator[str]:
    kind, name = thing["kind"], thing.get("metadata", {}).get("name", "")
    if len(name) > LONGEST[kind]:
        yield f"the name has {len(name)} characters, and a {kind}'s may have {LONGEST[kind]}"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"the name '{name}' is no DNS-1035 label"


def _managed(spec: Object) -> Iterator[str]:
    if spec.get("managedBy") not in (None, *MANAGERS):
        yield f"managedBy '{spec['managedBy']}' is not known: {', '.join(MANAGERS)}"


# --- jobs -----------------------------------------------------------------------------------------------------------


def _job(spec: Object, thing: Object) -> Iterator[str]:
    cluster = spec.get("rayClusterSpec")
    yield from _job_cluster(spec)
    yield from _submission(spec)
    yield from _end(spec)
    yield from _deletion(spec)
    yield from _kueue(cluster or {}, thing)
    yield from _kueue_job(spec, thing)
    yield from _managed(spec)
    if cluster is not None:
        yield from _cluster(cluster, thing)


def _job_cluster(spec: Object) -> Iterator[str]:
    """A job makes its cluster or selects one."""
    selector = spec.get("clusterSelector")
    if (spec.get("rayClusterSpec") is not None) == bool(selector):
        yield "exactly one of rayClusterSpec and clusterSelector must be given"
    sidecar = spec.get("submissionMode") == "SidecarMode"
    if selector and (spec.get("suspend") or spec.get("backoffLimit", 0) > 0 or sidecar):
        yield "clusterSelector does not go with suspend, backoffLimit above 0 or SidecarMode"


def _submission(spec: Object) -> Iterator[str]:
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in SUBMISSION_MODES:
        yield f"submissionMode '{mode}' is not known: {', '.join(SUBMISSION_MODES)}"
    if mode == "SidecarMode":
        yield from _sidecar(spec)
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "InteractiveMode takes no backoffLimit"


def _sidecar(spec: Object) -> Iterator[str]:
    if spec.get("submitterPodTemplate") or spec.get("submitterConfig"):
        yield "SidecarMode takes no submitterPodTemplate and no submitterConfig"
    if _pod(part(spec, "rayClusterSpec").get("headGroupSpec", {})).get("restartPolicy") not in NEVER:
        yield "SidecarMode needs the head's restartPolicy Never"


def _end(spec: Object) -> Iterator[str]:
    if spec.get("shutdownAfterJobFinishes", False):
        return
    if spec.get("ttlSecondsAfterFinished", 0) > 0:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("suspend"):
        yield "suspend needs shutdownAfterJobFinishes"


def _deletion(spec: Object) -> Iterator[str]:
    strategy, selector = part(spec, "deletionStrategy"), spec.get("clusterSelector")
    rules = list(part(strategy, "deletionRules"))
    scaled = part(spec, "rayClusterSpec").get("enableInTreeAutoscaling")
    for old in ("onSuccess", "onFailure"):
        if scaled and part(strategy, old).get("policy") == "DeleteWorkers":
            yield "DeleteWorkers does not go with autoscaling"
    if rules:
        if spec.get("shutdownAfterJobFinishes"):
            yield "deletionRules exclude shutdownAfterJobFinishes"
        if not strategy.keys().isdisjoint(("onSuccess", "onFailure")):
            yield "deletionRules exclude onSuccess and onFailure"
        refused = [("DeleteWorkers", "autoscaling")] * bool(scaled)
        refused += [("DeleteWorkers", "clusterSelector"), ("DeleteCluster", "clusterSelector")] * bool(selector)
        yield from _deletion_rules(rules, refused)


def _deletion_rules(rules: list[Object], refused: list[tuple[str, str]]) -> Iterator[str]:
    """`refused`: policies, each with what it does not go with."""
    seen = set()
    for rule in rules:
        condition, policy = rule.get("condition", {}), rule.get("policy")
        given = {k: condition[k] for k in ("jobStatus", "jobDeploymentStatus") if condition.get(k)}
        if len(given) != 1:
            yield "a deletion rule has exactly one of jobStatus and jobDeploymentStatus"
            continue
        if given.get("jobDeploymentStatus", "Failed") != "Failed":
            yield "jobDeploymentStatus of a deletion rule may only be Failed"
        key = (policy, *given.items())
        if key in seen:
            yield f"the deletion rule {policy} on {next(iter(given.values()))} is there twice"
        seen.add(key)
        yield from (f"{policy} does not go with {what}" for bad, what in refused if bad == policy)


def _queued(thing: Object) -> bool:
    return "kueue.x-k8s.io/queue-name" in part(thing.get("metadata", {}), "labels")


def _kueue(cluster: Object, thing: Object) -> Iterator[str]:
    if not _queued(thing):
        return
    if cluster.get("enableInTreeAutoscaling"):
        yield "Kueue takes no autoscaling: fix the replicas"
    groups = [g.get("groupName") for g in cluster.get("workerGroupSpecs", [])]
    if len(groups) > 7 or "head" in groups:
        yield "Kueue takes at most 7 worker groups, none of them named head"


def _kueue_job(spec: Object, thing: Object) -> Iterator[str]:
    if not _queued(thing):
        return
    if not spec.get("shutdownAfterJobFinishes", False):
        yield "Kueue needs shutdownAfterJobFinishes: true"
    if spec.get("clusterSelector"):
        yield "Kueue takes no clusterSelector"


# --- clusters -------------------------------------------------------------------------------------------------------


def _cluster(cluster: Object, thing: Object) -> Iterator[str]:
    head, workers = cluster.get("headGroupSpec", {}), cluster.get("workerGroupSpecs") or []
    names = [g.get("groupName") for g in workers]
    if len(set(names)) < len(names):
        yield "two worker groups have one name"
    for where, group in [("the head", head), *((f"worker group '{g.get('groupName')}'", g) for g in workers)]:
        yield from (f"{where}: {fault}" for fault in _start_parameters(group, cluster))
        yield from (f"{where}: {fault}" for fault in _group_scaling(group, cluster))
    for group in workers:
        yield from (f"worker group '{group.get('groupName')}': {fault}" for fault in _replicas(group, cluster))
    yield from _auth(cluster, thing)
    yield from _fault_tolerance(cluster, thing, head)
    upgrade = part(cluster, "upgradeStrategy").get("type")
    if thing["kind"] == "RayCluster" and upgrade not in (None, "Recreate", "None"):
        yield f"upgradeStrategy '{upgrade}' is none of a RayCluster's: Recreate, None"


def _start_parameters(group: Object, cluster: Object) -> Iterator[str]:
    params, resources = part(group, "rayStartParams"), part(group, "resources")
    for key, value in params.items():
        yield from _start_parameter(key, value, resources)
    if "resources" in params and resources:
        yield "resources are in rayStartParams and in the group's own resources"
    if "labels" in params:
        yield "labels belong to the group's own labels, not to rayStartParams"
    if "redis-password" in params and cluster.get("gcsFaultToleranceOptions"):
        yield "redis-password does not go with gcsFaultToleranceOptions"


def _start_parameter(key: str, value: Any, resources: Object) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"rayStartParams {key} must be a string"
    if key in RESOURCE_PARAMS and RESOURCE_PARAMS[key] in resources:
        yield f"{key} is in rayStartParams and in resources"


def _group_scaling(group: Object, cluster: Object) -> Iterator[str]:
    scaled = cluster.get("enableInTreeAutoscaling", False)
    version = part(cluster, "autoscalerOptions").get("version") if scaled else None
    if group.get("idleTimeoutSeconds") is not None and version != "v2":
        yield "idleTimeoutSeconds needs autoscaler v2"
    if version == "v2" and _pod(group).get("restartPolicy") not in NEVER:
        yield "autoscaler v2 needs restartPolicy Never"
    if scaled:
        yield from _scaled_group(group, version)


def _scaled_group(group: Object, version: Any) -> Iterator[str]:
    if group.get("suspend"):
        yield "a suspended group does not go with autoscaling"
    if version and "RAY_enable_autoscaler_v2" in _environment(group):
        yield "autoscalerOptions.version and RAY_enable_autoscaler_v2 are two ways to say one thing"


def _replicas(group: Object, cluster: Object) -> Iterator[str]:
    limits = [group.get("minReplicas"), group.get("maxReplicas")]
    if None not in limits:
        if limits[0] > limits[1]:
            yield "minReplicas is above maxReplicas"
    elif not cluster.get("enableInTreeAutoscaling", False):
        yield "without autoscaling minReplicas and maxReplicas must be given"


def _auth(cluster: Object, thing: Object) -> Iterator[str]:
    auth = part(cluster, "authOptions")
    version = tuple(int(p) for p in re.findall(r"\d+", str(cluster.get("rayVersion", "")))[:2])
    if auth.get("mode") == "token" and version < (2, 52):
        yield "authOptions token needs rayVersion 2.52.0 or newer, written out"
    if auth.get("enableK8sTokenAuth") and (version < (2, 55) or thing["kind"] != "RayCluster"):
        yield "enableK8sTokenAuth needs rayVersion 2.55.0 and a RayCluster"
    # fedray's own rule: the operator takes a missing mode for none, whatever its documentation says.
    if auth.get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches the head may run code on every node"


def _fault_tolerance(cluster: Object, thing: Object, head: Object) -> Iterator[str]:
    options = cluster.get("gcsFaultToleranceOptions")
    if options is None:
        return
    if "ray.io/ft-enabled" in part(thing.get("metadata", {}), "annotations"):
        yield "GCS fault tolerance is asked for by annotation and by options"
    if given := [v for v in REDIS_VARIABLES if v in _environment(head)]:
        yield f"{given[0]} does not go with gcsFaultToleranceOptions"
    yield from _backend(options)


def _backend(options: Object) -> Iterator[str]:
    backend = options.get("backend", "redis")
    if backend == "rocksdb":
        yield (
            "the rocksdb backend needs the operator's feature gate GCSFaultToleranceEmbeddedStorage, "
            "which is off in 1.7"
        )
        if any(k.startswith("redis") for k in options):
            yield "the rocksdb backend takes no redis fields"
    if backend == "redis" and not options.get("redisAddress"):
        yield "gcsFaultToleranceOptions need a redisAddress"


def _pod(group: Object) -> Any:
    """The pod that a group's template describes."""
    return group.get("template", {}).get("spec", {})


def _environment(group: Object) -> set[str]:
    return {e.get("name") for c in _pod(group).get("containers") or [] for e in c.get("env") or []}


def faults(text: str, schemas: dict[str, Object], rendered: bool) -> list[str]:
    """What is wrong with the objects of a YAML text: each with its kind and name. See `trust` for `rendered`."""
    things = documents(text)
    each = [(thing, fault) for thing in things for fault in (*lint(thing), *validate(thing, schemas))]
    return [_said(thing, fault) for thing, fault in (*each, *trust(things, rendered))]


def _said(thing: Object, fault: str) -> str:
    return f"{thing.get('kind')} {thing.get('metadata', {}).get('name')}: {fault}"


def _of_place(place: str, schemas: dict[str, Object], filled: bool) -> list[str]:
    """What is wrong in a file, or in what comes from standard input, which is what a cluster would get."""
    text = sys.stdin.read() if place == "-" else Path(place).read_text()
    if Path(place).name == "Dockerfile":
        return list(recipe(text))
    found, open_ends = faults(text, schemas, rendered=place == "-"), []
    if place == "-":
        open_ends = [_said(thing, what) for thing, what in to_fill(documents(text))]
    if not filled:
        print(*(f"{place}: to do: {what}" for what in open_ends), sep="\n", end="\n" * bool(open_ends), file=sys.stderr)
    return [*found, *(open_ends if filled else ())]


def main(argv: list[str]) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", metavar="FILE", help="manifests or a Dockerfile; - is standard input")
    parser.add_argument("--crds", type=Path, metavar="DIR", help="KubeRay's CRDs")
    parser.add_argument("--filled", action="store_true", help="placeholders that are not filled in are faults")
    args = parser.parse_args(argv)
    schemas = load_schemas(args.crds) if args.crds else {}
    found = [f"{place}: {fault}" for place in args.places for fault in _of_place(place, schemas, args.filled)]
    print(*found, sep="\n", end="\n" * bool(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
