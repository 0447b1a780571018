"""The linter: every rule of the operator's catches its violation, and so do the CRDs' schemas."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from manifests import CLUSTER, K8S, MANIFESTS, cluster, cluster_of, fixed_job, job, lint, put, schemas_there, several


def service() -> dict:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "s"},
        "spec": {"rayClusterConfig": cluster_of(job())},
    }


R, C = CLUSTER, "spec"
RULES = [
    (job, put("metadata.name", "a" * 48), "the name has 48 characters, and a RayJob's may have 47"),
    (cluster, put("metadata.name", "a" * 54), "the name has 54 characters, and a RayCluster's may have 53"),
    (
        job,
        several(put("kind", "RayCronJob"), put("metadata.name", "a" * 37)),
        "the name has 37 characters, and a RayCronJob's may have 36",
    ),
    (job, put("metadata.name", "7up"), "no DNS-1035 label"),
    (job, put("spec.clusterSelector", {"ray.io/cluster": "x"}), "exactly one of rayClusterSpec and clusterSelector"),
    (job, put(R, "-"), "exactly one of rayClusterSpec and clusterSelector"),
    (
        job,
        several(put(R, "-"), put("spec.clusterSelector", {"a": "b"})),
        "clusterSelector does not go with suspend, backoffLimit",
    ),
    (
        job,
        several(put(R, "-"), put("spec.clusterSelector", {"a": "b"}), put("spec.backoffLimit", 0)),
        "DeleteCluster does not go with clusterSelector",
    ),
    (job, put("spec.submissionMode", "K8SJobMode"), "submissionMode 'K8SJobMode' is not known"),
    (job, put("spec.submissionMode", "SidecarMode"), "SidecarMode takes no submitterPodTemplate"),
    (
        job,
        several(
            put("spec.submissionMode", "SidecarMode"), put(f"{R}.headGroupSpec.template.spec.restartPolicy", "Always")
        ),
        "SidecarMode needs the head's restartPolicy Never",
    ),
    (job, put("spec.submissionMode", "InteractiveMode"), "InteractiveMode takes no backoffLimit"),
    (job, put("spec.ttlSecondsAfterFinished", 60), "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"),
    (job, put("spec.suspend", True), "suspend needs shutdownAfterJobFinishes"),
    (job, put("spec.shutdownAfterJobFinishes", True), "deletionRules exclude shutdownAfterJobFinishes"),
    (job, put("spec.deletionStrategy.onSuccess", {"policy": "DeleteCluster"}), "deletionRules exclude onSuccess"),
    (
        job,
        put("spec.deletionStrategy.deletionRules.0.condition", {}),
        "exactly one of jobStatus and jobDeploymentStatus",
    ),
    (
        job,
        put("spec.deletionStrategy.deletionRules.0.condition.jobDeploymentStatus", "Failed"),
        "exactly one of jobStatus and jobDeploymentStatus",
    ),
    (
        job,
        put("spec.deletionStrategy.deletionRules.0.condition", {"jobDeploymentStatus": "Complete"}),
        "may only be Failed",
    ),
    (job, put("spec.deletionStrategy.deletionRules.1.condition", {"jobStatus": "SUCCEEDED"}), "is there twice"),
    (
        job,
        put("spec.deletionStrategy.deletionRules.0.policy", "DeleteWorkers"),
        "DeleteWorkers does not go with autoscaling",
    ),
    (fixed_job, put("spec.shutdownAfterJobFinishes", False), "Kueue needs shutdownAfterJobFinishes"),
    (fixed_job, put(f"{R}.enableInTreeAutoscaling", True), "Kueue takes no autoscaling"),
    (fixed_job, put("spec.clusterSelector", {"a": "b"}), "Kueue takes no clusterSelector"),
    (fixed_job, put(f"{R}.workerGroupSpecs.0.groupName", "head"), "none of them named head"),
    (
        fixed_job,
        put(f"{R}.workerGroupSpecs.0.maxReplicas", "-"),
        "without autoscaling minReplicas and maxReplicas must be given",
    ),
    (fixed_job, put(f"{R}.workerGroupSpecs.0.idleTimeoutSeconds", 60), "idleTimeoutSeconds needs autoscaler v2"),
    (job, put(f"{R}.workerGroupSpecs.0.minReplicas", 9), "minReplicas is above maxReplicas"),
    (job, put(f"{R}.workerGroupSpecs.1.groupName", "gpu-1"), "two worker groups have one name"),
    (job, put(f"{R}.headGroupSpec.template.spec.restartPolicy", "Always"), "autoscaler v2 needs restartPolicy Never"),
    (job, put(f"{R}.workerGroupSpecs.0.suspend", True), "a suspended group does not go with autoscaling"),
    (
        job,
        put(f"{R}.headGroupSpec.template.spec.containers.0.env", [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]),
        "two ways to say one thing",
    ),
    (job, put(f"{R}.authOptions", "-"), "authOptions.mode is not token"),
    (job, put(f"{R}.authOptions", {"secretName": "x"}), "authOptions.mode is not token"),
    (job, put(f"{R}.rayVersion", "2.51.9"), "needs rayVersion 2.52.0"),
    (job, put(f"{R}.rayVersion", "-"), "needs rayVersion 2.52.0"),
    (job, put(f"{R}.authOptions.enableK8sTokenAuth", True), "enableK8sTokenAuth needs"),
    (
        cluster,
        several(put("spec.authOptions.enableK8sTokenAuth", True), put("spec.rayVersion", "2.54.0")),
        "enableK8sTokenAuth needs",
    ),
    (job, put(f"{R}.headGroupSpec.rayStartParams.num-cpus", 0), "rayStartParams num-cpus must be a string"),
    (job, put(f"{R}.headGroupSpec.resources", {"CPU": "0"}), "num-cpus is in rayStartParams and in resources"),
    (job, put(f"{R}.workerGroupSpecs.0.rayStartParams.labels", "silo=a"), "labels belong to the group's own labels"),
    (cluster, put("metadata.annotations", {"ray.io/ft-enabled": "true"}), "asked for by annotation and by options"),
    (
        cluster,
        put(f"{C}.headGroupSpec.rayStartParams.redis-password", "x"),
        "redis-password does not go with gcsFaultToleranceOptions",
    ),
    (
        cluster,
        put(f"{C}.headGroupSpec.template.spec.containers.0.env", [{"name": "REDIS_PASSWORD", "value": "x"}]),
        "REDIS_PASSWORD does not go with",
    ),
    (cluster, put(f"{C}.gcsFaultToleranceOptions.backend", "rocksdb"), "the rocksdb backend takes no redis fields"),
    (cluster, put(f"{C}.gcsFaultToleranceOptions.redisAddress", "-"), "need a redisAddress"),
    (
        cluster,
        put(f"{C}.upgradeStrategy", {"type": "NewCluster"}),
        "upgradeStrategy 'NewCluster' is none of a RayCluster's",
    ),
    (cluster, put(f"{C}.gcsFaultToleranceOptions", {"backend": "rocksdb"}), "needs the operator's feature gate"),
    (cluster, put("metadata.labels", {"kueue.x-k8s.io/queue-name": "q"}), "Kueue takes no autoscaling"),
    (cluster, put("spec.managedBy", "me"), "managedBy 'me' is not known"),
    (job, put("spec.managedBy", "me"), "managedBy 'me' is not known"),
    (
        job,
        put("spec.deletionStrategy", {"onSuccess": {"policy": "DeleteWorkers"}}),
        "DeleteWorkers does not go with autoscaling",
    ),
    (
        job,
        several(
            put(f"{R}.headGroupSpec.resources", {"CPU": "1"}),
            put(f"{R}.headGroupSpec.rayStartParams", {"resources": "{}"}),
        ),
        "resources are in rayStartParams and in the group's own",
    ),
    (service, put("spec.upgradeStrategy", {"type": "Recreate"}), "none of a RayService's"),
    (
        service,
        several(
            put("spec.upgradeStrategy", {"type": "NewClusterWithIncrementalUpgrade"}),
            put("spec.rayClusterConfig.enableInTreeAutoscaling", False),
        ),
        "needs the autoscaler",
    ),
]


@pytest.mark.parametrize(("made", "change", "words"), RULES, ids=[words[:60] for _, _, words in RULES])
def test_the_linter_catches(made, change, words):
    thing = made()
    assert lint.lint(thing) == []
    change(thing)
    assert any(words in fault for fault in lint.lint(thing)), lint.lint(thing)


@pytest.mark.shared
@pytest.mark.parametrize(
    "change",
    [
        put("spec.entrypiont", "x"),
        put(f"{R}.workerGroupSpecs.0.replicas", "1"),
        put(f"{R}.headGroupSpec.rayStartParams.num-cpus", 0),
        put(f"{R}.headGroupSpec.template.spec.containers.0.env", [{"name": "A", "value": 1}]),
        put(f"{R}.workerGroupSpecs.0.groupName", "-"),
        put(f"{R}.headGroupSpec.template.spec.containers.0.resources.limits", {"memory": [8]}),
        put(f"{R}.autoscalerOptions.version", "v3"),
        put(f"{R}.authOptions.mode", "none"),
        put("spec.deletionStrategy.deletionRules.0.policy", "Delete"),
    ],
)
def test_the_schemas_catch_what_is_misspelt_or_of_another_type(change):
    schemas, thing = schemas_there(), job()
    assert lint.validate(thing, schemas) == []
    change(thing)
    assert lint.validate(thing, schemas)


def test_the_command_line_of_the_linter(tmp_path):
    def run(*args: str):
        command = [sys.executable, str(K8S / "lint.py"), *args]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run(*map(str, [*MANIFESTS, K8S / "Dockerfile"])).returncode == 0
    bad = job()
    bad["metadata"]["name"] = "7up"
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(bad))
    done = run(str(file))
    assert done.returncode == 1 and done.stdout == f"{file}: RayJob 7up: the name '7up' is no DNS-1035 label\n"
