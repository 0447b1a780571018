"""Check manifests before a cluster sees them: KubeRay's own rules, which no schema holds, and, where they are at hand, its CRDs.

    python k8s/lint.py k8s/overlays/*/*.yaml                       the operator's rules (KubeRay v1.7.0), and fedray's own
    python k8s/lint.py --crds ../shared/kuberay k8s/overlays/...   the CRDs' schemas too, strictly, with their defaults applied
    kubectl kustomize k8s/overlays/rayjob | python k8s/lint.py -   what kustomize makes of them

Prints a line for each fault and exits with 1 where there is any. Rules: ray-operator/controllers/ray/utils/validation.go of v1.7.0.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

LONGEST = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
MANAGERS = (None, "ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
RESOURCE_PARAMS = {"num-cpus": "CPU", "num-gpus": "GPU", "memory": "memory"}
REDIS_VARIABLES = ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS")

Object = dict[str, Any]


def documents(text: str) -> list[Object]:
    """The objects of a YAML text."""
    return [d for d in yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if d]


def lint(thing: Object) -> list[str]:
    """What is wrong with an object of ray.io, a sentence each; nothing for other kinds."""
    kind, name = thing.get("kind"), thing.get("metadata", {}).get("name", "")
    if kind not in LONGEST:
        return []
    found = list(_names(kind, name))
    spec = thing.get("spec", {})
    if kind == "RayCronJob":
        return found + list(_job(spec.get("jobTemplate", {}), thing))
    if kind == "RayJob":
        return found + list(_job(spec, thing))
    if spec.get("managedBy") not in MANAGERS:
        found.append(f"managedBy '{spec['managedBy']}' is not known: {', '.join(MANAGERS[1:])}")
    if kind == "RayService":
        return found + list(_service(spec)) + list(_cluster(spec.get("rayClusterConfig", {}), kind, thing))
    return found + list(_kueue(spec, thing)) + list(_cluster(spec, kind, thing))


def _service(spec: Object) -> Iterator[str]:
    kinds = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
    upgrade = (spec.get("upgradeStrategy") or {}).get("type")
    if upgrade is not None and upgrade not in kinds:
        yield f"upgradeStrategy '{upgrade}' is none of a RayService's: {', '.join(kinds)}"
    if upgrade == "NewClusterWithIncrementalUpgrade" and not spec.get("rayClusterConfig", {}).get(
        "enableInTreeAutoscaling"
    ):
        yield "NewClusterWithIncrementalUpgrade needs the autoscaler"


def _names(kind: str, name: str) -> Iterator[str]:
    if len(name) > LONGEST[kind]:
        yield f"the name has {len(name)} characters, and a {kind}'s may have {LONGEST[kind]}"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"the name '{name}' is no DNS-1035 label"


def _job(spec: Object, thing: Object) -> Iterator[str]:
    cluster, selector, mode = (
        spec.get("rayClusterSpec"),
        spec.get("clusterSelector"),
        spec.get("submissionMode", "K8sJobMode"),
    )
    if (cluster is None) == (not selector):
        yield "exactly one of rayClusterSpec and clusterSelector must be given"
    if selector and (spec.get("suspend") or spec.get("backoffLimit", 0) > 0 or mode == "SidecarMode"):
        yield "clusterSelector does not go with suspend, backoffLimit above 0 or SidecarMode"
    if mode not in SUBMISSION_MODES:
        yield f"submissionMode '{mode}' is not known: {', '.join(SUBMISSION_MODES)}"
    if mode == "SidecarMode":
        if spec.get("submitterPodTemplate") or spec.get("submitterConfig"):
            yield "SidecarMode takes no submitterPodTemplate and no submitterConfig"
        if _restart(cluster or {}) not in (None, "Never"):
            yield "SidecarMode needs the head's restartPolicy Never"
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "InteractiveMode takes no backoffLimit"
    ends = spec.get("shutdownAfterJobFinishes", False)
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes"
    yield from _deletion(spec, bool(selector))
    yield from _kueue(cluster or {}, thing)
    if "kueue.x-k8s.io/queue-name" in _labels(thing):
        if not ends:
            yield "Kueue needs shutdownAfterJobFinishes: true"
        if selector:
            yield "Kueue takes no clusterSelector"
    if spec.get("managedBy") not in MANAGERS:
        yield f"managedBy '{spec['managedBy']}' is not known: {', '.join(MANAGERS[1:])}"
    if cluster is not None:
        yield from _cluster(cluster, "RayJob", thing)


def _deletion(spec: Object, selected: bool) -> Iterator[str]:
    strategy = spec.get("deletionStrategy") or {}
    rules = strategy.get("deletionRules") or []
    scaled = (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling")
    for old in ("onSuccess", "onFailure"):
        if (strategy.get(old) or {}).get("policy") == "DeleteWorkers" and scaled:
            yield "DeleteWorkers does not go with autoscaling"
    if not rules:
        return
    if spec.get("shutdownAfterJobFinishes"):
        yield "deletionRules exclude shutdownAfterJobFinishes"
    if "onSuccess" in strategy or "onFailure" in strategy:
        yield "deletionRules exclude onSuccess and onFailure"
    seen = set()
    for rule in rules:
        condition = rule.get("condition", {})
        asked = [k for k in ("jobStatus", "jobDeploymentStatus") if condition.get(k)]
        if len(asked) != 1:
            yield "a deletion rule has exactly one of jobStatus and jobDeploymentStatus"
            continue
        if asked == ["jobDeploymentStatus"] and condition["jobDeploymentStatus"] != "Failed":
            yield "jobDeploymentStatus of a deletion rule may only be Failed"
        key = (rule.get("policy"), asked[0], condition[asked[0]])
        if key in seen:
            yield f"the deletion rule {key[0]} on {key[2]} is there twice"
        seen.add(key)
        if rule.get("policy") == "DeleteWorkers" and scaled:
            yield "DeleteWorkers does not go with autoscaling"
        if selected and rule.get("policy") in ("DeleteWorkers", "DeleteCluster"):
            yield f"{rule['policy']} does not go with clusterSelector"


def _labels(thing: Object) -> Object:
    return thing.get("metadata", {}).get("labels") or {}


def _kueue(cluster: Object, thing: Object) -> Iterator[str]:
    if "kueue.x-k8s.io/queue-name" not in _labels(thing):
        return
    if cluster.get("enableInTreeAutoscaling"):
        yield "Kueue takes no autoscaling: fix the replicas"
    groups = [g.get("groupName") for g in cluster.get("workerGroupSpecs", [])]
    if len(groups) > 7 or "head" in groups:
        yield "Kueue takes at most 7 worker groups, none of them named head"


def _cluster(cluster: Object, kind: str, thing: Object) -> Iterator[str]:
    head, workers = cluster.get("headGroupSpec", {}), cluster.get("workerGroupSpecs") or []
    groups = [("the head", head), *((f"worker group '{g.get('groupName')}'", g) for g in workers)]
    scaled, options = cluster.get("enableInTreeAutoscaling", False), cluster.get("autoscalerOptions") or {}
    names = [g.get("groupName") for g in workers]
    if len(set(names)) < len(names):
        yield "two worker groups have one name"
    for where, group in groups:
        params = group.get("rayStartParams") or {}
        for key, value in params.items():
            if not isinstance(value, str):
                yield f"{where}: rayStartParams {key} must be a string"
            if key in RESOURCE_PARAMS and RESOURCE_PARAMS[key] in (group.get("resources") or {}):
                yield f"{where}: {key} is in rayStartParams and in resources"
        if "resources" in params and group.get("resources"):
            yield f"{where}: resources are in rayStartParams and in the group's own resources"
        if "labels" in params:
            yield f"{where}: labels belong to the group's own labels, not to rayStartParams"
        if "redis-password" in params and cluster.get("gcsFaultToleranceOptions"):
            yield f"{where}: redis-password does not go with gcsFaultToleranceOptions"
        if (
            scaled
            and options.get("version") == "v2"
            and group.get("template", {}).get("spec", {}).get("restartPolicy") not in (None, "Never")
        ):
            yield f"{where}: autoscaler v2 needs restartPolicy Never"
        if group.get("idleTimeoutSeconds") is not None and not (scaled and options.get("version") == "v2"):
            yield f"{where}: idleTimeoutSeconds needs autoscaler v2"
        if scaled and group.get("suspend"):
            yield f"{where}: a suspended group does not go with autoscaling"
        if scaled and options.get("version") and "RAY_enable_autoscaler_v2" in _environment(group):
            yield f"{where}: autoscalerOptions.version and RAY_enable_autoscaler_v2 are two ways to say one thing"
    for group in workers:
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if not scaled and (low is None or high is None):
            yield f"worker group '{group.get('groupName')}': without autoscaling minReplicas and maxReplicas must be given"
        if low is not None and high is not None and low > high:
            yield f"worker group '{group.get('groupName')}': minReplicas is above maxReplicas"
    yield from _auth(cluster, kind)
    yield from _fault_tolerance(cluster, thing, head)
    upgrade = (cluster.get("upgradeStrategy") or {}).get("type")
    if kind == "RayCluster" and upgrade not in (None, "Recreate", "None"):
        yield f"upgradeStrategy '{upgrade}' is none of a RayCluster's: Recreate, None"


def _auth(cluster: Object, kind: str) -> Iterator[str]:
    auth = cluster.get("authOptions") or {}
    version = tuple(int(p) for p in re.findall(r"\d+", str(cluster.get("rayVersion", "")))[:2])
    if auth.get("mode") == "token" and version < (2, 52):
        yield "authOptions token needs rayVersion 2.52.0 or newer, written out"
    if auth.get("enableK8sTokenAuth") and (version < (2, 55) or kind != "RayCluster"):
        yield "enableK8sTokenAuth needs rayVersion 2.55.0 and a RayCluster"
    # fedray's own rule: the operator takes a missing mode for none, whatever its documentation says.
    if auth.get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches the head may run code on every node"


def _fault_tolerance(cluster: Object, thing: Object, head: Object) -> Iterator[str]:
    options = cluster.get("gcsFaultToleranceOptions")
    if options is None:
        return
    if "ray.io/ft-enabled" in (thing.get("metadata", {}).get("annotations") or {}):
        yield "GCS fault tolerance is asked for by annotation and by options"
    if given := [v for v in REDIS_VARIABLES if v in _environment(head)]:
        yield f"{given[0]} does not go with gcsFaultToleranceOptions"
    if options.get("backend") == "rocksdb":
        yield "the rocksdb backend needs the operator's feature gate GCSFaultToleranceEmbeddedStorage, which is off in 1.7"
        if any(k.startswith("redis") for k in options):
            yield "the rocksdb backend takes no redis fields"
    if options.get("backend", "redis") == "redis" and not options.get("redisAddress"):
        yield "gcsFaultToleranceOptions need a redisAddress"


def _environment(group: Object) -> set[str]:
    containers = group.get("template", {}).get("spec", {}).get("containers") or []
    return {e.get("name") for c in containers for e in c.get("env") or []}


def _restart(cluster: Object) -> str | None:
    return cluster.get("headGroupSpec", {}).get("template", {}).get("spec", {}).get("restartPolicy")


# --- the CRDs' schemas ----------------------------------------------------------------------------------------------


def load_schemas(folder: Path) -> dict[str, Object]:
    """By kind: the v1 schema of each CRD in a folder, strict about unknown keys."""
    found = {}
    for path in sorted(Path(folder).glob("*.yaml")):
        for crd in documents(path.read_text()):
            version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
            found[crd["spec"]["names"]["kind"]] = _strict(version["schema"]["openAPIV3Schema"])
    return found


def _strict(schema: Any) -> Any:
    """No unknown keys wherever keys are listed; formats that JSON schema has not become their types."""
    if isinstance(schema, list):
        return [_strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        k: (
            {n: _strict(s) for n, s in v.items()}
            if k == "properties"
            else v
            if k in ("default", "enum")
            else _strict(v)
        )
        for k, v in schema.items()
    }
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
        made.pop("anyOf", None)
    if (
        "properties" in schema
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        made["additionalProperties"] = False
    return made


def _defaulted(value: Any, schema: Object) -> Any:
    """The value without nulls that the API server drops, and with the schema's defaults."""
    if isinstance(value, dict):
        inner = schema.get("properties", {})
        more = schema.get("additionalProperties")
        made = {
            k: _defaulted(v, inner.get(k) or (more if isinstance(more, dict) else {}))
            for k, v in value.items()
            if v is not None or inner.get(k, {}).get("nullable")
        }
        for name, sub in inner.items():
            if name not in made and "default" in sub:
                made[name] = copy.deepcopy(sub["default"])
        return made
    if isinstance(value, list):
        return [_defaulted(v, schema.get("items") or {}) for v in value]
    return value


def validate(thing: Object, schemas: dict[str, Object]) -> list[str]:
    """What the CRD's schema has against an object of ray.io; nothing for other kinds."""
    import jsonschema

    schema = schemas.get(thing.get("kind")) if str(thing.get("apiVersion", "")).startswith("ray.io/") else None
    if schema is None:
        return []
    schema = {**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}}
    errors = jsonschema.Draft202012Validator(schema).iter_errors(_defaulted(thing, schema))
    return [f"{'.'.join(map(str, e.absolute_path)) or 'the object'}: {e.message[:200]}" for e in errors]


def main(argv: list[str]) -> int:
    """See the module's docstring."""
    schemas = {}
    if "--crds" in argv:
        at = argv.index("--crds")
        schemas = load_schemas(Path(argv[at + 1]))
        del argv[at : at + 2]
    if not argv:
        print(__doc__)
        return 2
    faults = 0
    for place in argv:
        for thing in documents(sys.stdin.read() if place == "-" else Path(place).read_text()):
            for fault in [*lint(thing), *validate(thing, schemas)]:
                faults += 1
                print(f"{place}: {thing.get('kind')} {thing.get('metadata', {}).get('name')}: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
