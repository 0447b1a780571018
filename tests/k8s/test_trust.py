"""fedray's own rules for manifests: what ships keeps them, and each catches what breaks it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml
from manifests import (
    CLUSTER,
    K8S,
    MANIFESTS,
    OVERLAYS,
    Change,
    add,
    cluster_of,
    groups,
    lint_trust,
    one,
    put,
    rendered,
    several,
    things,
)

HEAD = f"{CLUSTER}.headGroupSpec.template.spec"
WORKER = f"{CLUSTER}.workerGroupSpecs.0.template.spec"
OTHER = f"{CLUSTER}.workerGroupSpecs.1.template.spec"
SETTINGS = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")

#: The authority's secret once more, and where it would be seen.
SECOND = {"name": "p", "secret": {"secretName": "fedray-ca"}}
PROJECTED = {"name": "p", "projected": {"sources": [{"secret": {"name": "fedray-ca"}}]}}
MOUNTED = {"name": "p", "mountPath": "/p"}
#: A peer that names the namespace that it is in.
HERE = {
    "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "fedray"}}, "podSelector": {}}],
    "ports": [{"port": 8077}],
}
ADMIN = {"kind": "ClusterRoleBinding", "metadata": {"name": "z"}, "roleRef": {"name": "cluster-admin"}}
NIGHTLY = {
    "kind": "CronJob",
    "metadata": {"name": "z"},
    "spec": {"jobTemplate": {"spec": {"template": {"spec": {"containers": [{"name": "x", "image": "cron:latest"}]}}}}},
}

#: A change to objects that are applied together.
Changes = Callable[[list[dict]], None]


def of(kind: str, change: Change, name: str | None = None) -> Changes:
    return lambda made: change(one(kind, made, name))


def job(*changes: Change) -> Changes:
    return of("RayJob", several(*changes))


def policy(name: str, *changes: Change) -> Changes:
    return of("NetworkPolicy", several(*changes), name)


def without(kind: str, name: str) -> Changes:
    return lambda made: made.remove(one(kind, made, name))


def with_loader(change: Change) -> Changes:
    """The loader's pod beside the run's objects, changed."""

    def changes(made: list[dict]) -> None:
        (pod,) = rendered("loader")
        change(pod)
        made.append(pod)

    return changes


def one_partys_policy(made: list[dict]) -> None:
    """What rayjob-silos takes away again: all ports between all of Ray's nodes."""
    made.append(one("NetworkPolicy", rendered("overlays/rayjob"), "fedray-ray"))


def setting(where: str, name: str, value: str) -> Change:
    """A change: an environment variable of a pod's first container."""

    def change(thing: dict) -> None:
        for step in where.split("."):
            thing = thing[int(step)] if step.isdigit() else thing[step]
        (entry,) = [e for e in thing["containers"][0]["env"] if e["name"] == name]
        entry["value"] = value

    return change


def claim(where: str, volume: str, name: str) -> Change:
    """A change: the claim behind a pod's volume."""

    def change(thing: dict) -> None:
        for step in where.split("."):
            thing = thing[int(step)] if step.isdigit() else thing[step]
        (found,) = [v for v in thing["volumes"] if v["name"] == volume]
        found["persistentVolumeClaim"]["claimName"] = name

    return change


def on_disk(thing: dict) -> None:
    """A worker's private key in a folder of its machine's disk."""
    (volume,) = [v for v in next(iter(groups_of_workers(thing)))["template"]["spec"]["volumes"] if v["name"] == "tls"]
    volume["emptyDir"] = {}


def groups_of_workers(thing: dict) -> list[dict]:
    return cluster_of(thing)["workerGroupSpecs"]


def speakers(made: list[dict]) -> list[dict]:
    """What speaks Ray's protocol: a container of each node, and the one that the operator adds."""
    (ray,) = [t for t in made if t["kind"] in ("RayJob", "RayCluster")]
    beside = cluster_of(ray).get("autoscalerOptions")
    return [*(group["template"]["spec"]["containers"][0] for group in groups(ray)), *([beside] if beside else [])]


def said(made: list[dict], in_full: bool = True) -> list[str]:
    return [fault for _, fault in lint_trust.trust(made, in_full)]


# --- what ships -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_kustomize_makes_keeps_the_rules(overlay):
    assert said([*rendered(f"overlays/{overlay}"), *rendered("loader")]) == []


@pytest.mark.parametrize("path", [*MANIFESTS, K8S / "loader/loader.yaml"], ids=lambda p: p.name)
def test_the_sources_keep_them_too(path):
    assert said(things(path), in_full=False) == []


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_process_of_rays_speaks_tls_in_every_overlay(overlay, name):
    """A setting that is taken from any one container, the operator's own autoscaler among them, is missed."""
    for place in range(len(speakers(rendered(f"overlays/{overlay}")))):
        made = rendered(f"overlays/{overlay}")
        container = speakers(made)[place]
        container["env"] = [e for e in container["env"] if e["name"] != name]
        (fault,) = said(made)
        assert f"Ray speaks without TLS: {name}" in fault


# --- every rule catches its violation ---------------------------------------------------------------------------------

IMAGE = "registry.example/fedray:7"
DNS, PORTS = "spec.egress.0", "spec.egress.0.ports"
BROKEN: list[tuple[str, Changes, str]] = [
    ("rayjob", job(put(f"{HEAD}.containers.0.image", IMAGE)), f"the head: image '{IMAGE}' is not named by its digest"),
    ("rayjob", job(put(f"{OTHER}.initContainers.0.image", IMAGE)), "'gpu-4': image 'registry.example/fedray:7' is not"),
    ("rayjob", job(put("spec.submitterPodTemplate.spec.containers.0.image", "fedray")), "components/image gives it"),
    ("rayjob", job(put(f"{CLUSTER}.autoscalerOptions.image", IMAGE)), "the autoscaler: image"),
    (
        "raycluster",
        of("StatefulSet", put("spec.template.spec.containers.0.image", "redis@sha256:12")),
        "image 'redis@sha256:12' is not named by its digest",
    ),
    # Tokens of the API server.
    (
        "rayjob-silos",
        of("ServiceAccount", put("automountServiceAccountToken", True), "fedray-head"),
        "the service account gives every pod an API token",
    ),
    (
        "rayjob-silos",
        job(put(f"{HEAD}.automountServiceAccountToken", "-")),
        "the head: every container gets an API token",
    ),
    (
        "rayjob-silos",
        job(add(f"{HEAD}.volumes", {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}})),
        "the head: there is an API token in it, and nothing scales from here",
    ),
    (
        "rayjob",
        job(add(f"{HEAD}.containers.0.volumeMounts", {"name": "api-token", "mountPath": "/token"})),
        "'ray-head' mounts the API token",
    ),
    (
        "rayjob",
        job(put(f"{CLUSTER}.autoscalerOptions.volumeMounts.1.mountPath", "/token")),
        "the autoscaler: no API token is mounted",
    ),
    # TLS.
    ("rayjob-kueue", job(setting(WORKER, "RAY_USE_TLS", "0")), "worker group 'gpu-1': Ray speaks without TLS"),
    (
        "rayjob-kueue",
        job(setting(HEAD, "RAY_TLS_CA_CERT", "/results/ca.crt.d/../../etc/ca.crt".replace("/results", "/srv"))),
        "RAY_TLS_CA_CERT is in no volume of its container",
    ),
    ("rayjob-silos", job(put(f"{OTHER}.initContainers", "-")), "no init container makes the pod's certificate"),
    (
        "rayjob-silos",
        job(put(f"{WORKER}.initContainers.0.command", ["python", "/tls-script/certify.py", "--head"])),
        "worker group 'silo-a': its certificate holds the head's name",
    ),
    (
        "rayjob-silos",
        job(add(f"{HEAD}.containers.0.volumeMounts", {"name": "tls-ca", "mountPath": "/ca"})),
        "'ray-head' mounts the authority's key",
    ),
    ("rayjob-kueue", job(put(f"{CLUSTER}.tlsOptions", {"enabled": True})), "tlsOptions gives all workers one key"),
    (
        "raycluster",
        of("RayCluster", put("spec.headGroupSpec.template.spec.activeDeadlineSeconds", "-")),
        "the head: its certificate ends after 90 days and the pod may live on",
    ),
    (
        "rayjob",
        job(put(f"{WORKER}.activeDeadlineSeconds", 30 * 86400)),
        "worker group 'gpu-1': its certificate ends after 30 days and the pod may live 30",
    ),
    (
        "rayjob",
        job(put(f"{HEAD}.initContainers.0.command", ["certify.py", "--head", "--days=7"])),
        "the head: its certificate ends after 7 days and the pod may live 28",
    ),
    ("rayjob", job(put("spec.activeDeadlineSeconds", 40 * 86400)), "the run may last 40 days and its pods 28"),
    (
        "raycluster",
        of("RayCluster", put("spec.gcsFaultToleranceOptions.redisAddress", "redis:6379")),
        "what the head keeps in Redis, code among it, travels in clear",
    ),
    (
        "raycluster",
        of("StatefulSet", put("spec.template.spec.initContainers.0.command", ["python", "/tls-script/certify.py"])),
        "its certificate ends after 30 days and no new one is made before",
    ),
    (
        "raycluster",
        of("StatefulSet", put("spec.template.spec.initContainers.0.command", ["certify.py", "--every", "30"])),
        "its certificate ends after 30 days and no new one is made before",
    ),
    # Keys.
    (
        "rayjob-silos",
        job(setting(HEAD, "XDG_STATE_HOME", "/results/.state")),
        "the head: its keys (/results/.state) lie on no claim of their own",
    ),
    ("rayjob", job(setting(WORKER, "XDG_STATE_HOME", "/tmp")), "its keys (/tmp) lie on no claim of their own"),
    (
        "rayjob",
        job(setting(HEAD, "XDG_STATE_HOME", "/results")),
        "the head: its keys lie on the claim fedray-results, which others mount too: worker",
    ),
    (
        "rayjob",
        with_loader(claim("spec", "results", "fedray-coordinator-keys")),
        "the claim fedray-coordinator-keys, which others mount too: loader",
    ),
    (
        "rayjob-silos",
        job(claim(OTHER, "data", "silo-a-keys")),
        "worker group 'silo-a': its keys lie on the claim silo-a-keys, which others mount too: silo b",
    ),
    # The machine, the API server, and what is one silo's.
    (
        "rayjob",
        job(put(f"{WORKER}.hostNetwork", True)),
        "worker group 'gpu-1': it is on its machine's own: hostNetwork",
    ),
    ("rayjob", job(add(f"{HEAD}.volumes", {"name": "h", "hostPath": {"path": "/"}})), "is a folder of its machine"),
    ("rayjob", job(put(f"{HEAD}.containers.0.securityContext", {"privileged": True})), "'ray-head' is privileged"),
    ("rayjob", of("Namespace", put("metadata.labels", {})), "its pods may take their machine"),
    ("rayjob", lambda made: made.append(ADMIN), "gives an account rights at the API server"),
    ("rayjob", lambda made: made.append(NIGHTLY), "image 'cron:latest' is not named"),
    ("rayjob", job(put(f"{CLUSTER}.headGroupSpec.serviceType", "LoadBalancer")), "the head is reached from outside"),
    ("rayjob", job(put(f"{CLUSTER}.headGroupSpec.enableIngress", True)), "the head is reached from outside"),
    ("raycluster", of("Service", put("spec.type", "NodePort")), "a service of type NodePort is reached from outside"),
    (
        "rayjob-silos",
        job(add(f"{HEAD}.containers.0.env", {"name": "RAY_AUTH_MODE", "value": "disabled"})),
        "'ray-head' asks for no token: RAY_AUTH_MODE is disabled",
    ),
    ("rayjob-silos", job(put(f"{OTHER}.nodeSelector", "-")), "worker group 'silo-b': it may run on any machine"),
    (
        "rayjob-silos",
        job(claim(OTHER, "data", "silo-a-data")),
        "its claim silo-a-data is mounted by others too: silo b",
    ),
    (
        "rayjob-silos",
        job(claim(HEAD, "results", "silo-a-data")),
        "its claim silo-a-data is mounted by others too: head",
    ),
    (
        "rayjob-silos",
        job(add(f"{WORKER}.volumes", SECOND), add(f"{WORKER}.containers.0.volumeMounts", MOUNTED)),
        "'ray-worker' mounts the authority's key",
    ),
    (
        "rayjob-silos",
        job(add(f"{WORKER}.volumes", PROJECTED), add(f"{WORKER}.containers.0.volumeMounts", MOUNTED)),
        "'ray-worker' mounts the authority's key",
    ),
    (
        "rayjob-silos",
        job(add(f"{WORKER}.containers.0.env", {"name": "CA", "valueFrom": {"secretKeyRef": {"name": "fedray-ca"}}})),
        "'ray-worker' mounts the authority's key",
    ),
    (
        "rayjob-silos",
        job(add(f"{WORKER}.containers.0.volumeMounts", {"name": "p", "mountPath": lint_trust.API_TOKEN})),
        "'ray-worker' mounts the API token",
    ),
    ("rayjob", job(on_disk), "worker group 'gpu-1': its private key lies on a disk"),
    (
        "rayjob",
        job(put(f"{WORKER}.initContainers.0.command", ["true", "certify.py"])),
        "no init container makes the pod",
    ),
    (
        "rayjob",
        job(add(f"{WORKER}.containers", {"name": "x", "image": f"x@sha256:{64 * '1'}", "command": ["ray", "start"]})),
        "worker group 'gpu-1': Ray speaks without TLS: RAY_USE_TLS is not 1",
    ),
    (
        "raycluster",
        of("StatefulSet", put("spec.template.spec.containers.0.command", ["redis-server", "--protected-mode", "no"])),
        "Redis listens in clear, or to anyone",
    ),
    # Network policies.
    (
        "rayjob-silos",
        policy("fedray-silo-and-head", add("spec.ingress", HERE)),
        "silo a reaches silo b on port 8077 by an ingress rule",
    ),
    (
        "rayjob",
        policy("fedray-job-api", put("spec.ingress.0.from", [{"namespaceSelector": {}}])),
        "an ingress rule takes in every namespace",
    ),
    (
        "rayjob",
        policy("fedray-job-api", put("spec.ingress.0.ports", [{"port": 1, "endPort": 65535}])),
        "an ingress rule lets every port through",
    ),
    (
        "rayjob",
        policy("fedray-all", put(f"{DNS}.to", [{"ipBlock": {"cidr": f"10.0.{i}.0/28"}} for i in range(9)])),
        "an egress rule takes in more than 16 addresses together",
    ),
    ("rayjob", without("NetworkPolicy", "fedray-all"), "the submitter: no network policy closes its ingress"),
    ("rayjob", with_loader(put("metadata.labels", {})), "the pod: no network policy closes its egress"),
    (
        "rayjob",
        policy("fedray-head-to-api-server", put(f"{DNS}.to.0.ipBlock.cidr", "10.0.0.0/8")),
        "an egress rule takes in 10.0.0.0/8: name single addresses",
    ),
    (
        "rayjob",
        policy("fedray-all", put(f"{DNS}.to.0.podSelector", "-")),
        "an egress rule takes in every pod of a namespace",
    ),
    ("rayjob", policy("fedray-all", put(PORTS, "-")), "an egress rule lets every port through"),
    ("rayjob", policy("fedray-all", put(f"{DNS}.to", "-")), "an egress rule without 'to' is open to everybody"),
    ("rayjob", policy("fedray-job-api", put("spec.ingress.0.from", [])), "an ingress rule without 'from' is open"),
    (
        "rayjob-silos",
        job(put(f"{CLUSTER}.workerGroupSpecs.1.template.metadata.labels", {"app.kubernetes.io/name": "fedray"})),
        "worker group 'silo-b': its silo is b for Ray and None in its pods' fedray.io/silo",
    ),
    ("rayjob-silos", one_partys_policy, "silo a reaches silo b on port any by an egress rule"),
    (
        "rayjob-silos",
        policy("fedray-silo-and-head", put("spec.ingress.1.ports", "-")),
        "silo b reaches silo a on port any by an ingress rule",
    ),
    (
        "rayjob-silos",
        policy("fedray-silo-and-head", add("spec.egress.1.ports", {"protocol": "TCP", "port": 8077})),
        "silo a reaches silo b on port 8077 by an egress rule",
    ),
    (
        "rayjob-silos",
        job(put(f"{CLUSTER}.workerGroupSpecs.1.rayStartParams.node-manager-port", "-")),
        "group 'silo-b': Ray chooses node-manager-port at random",
    ),
    (
        "rayjob-silos",
        job(put(f"{CLUSTER}.headGroupSpec.rayStartParams.max-worker-port", "-")),
        "group 'head': Ray chooses max-worker-port at random",
    ),
]


@pytest.mark.parametrize(("overlay", "change", "words"), BROKEN, ids=[words[:70] for _, _, words in BROKEN])
def test_the_rules_catch(overlay, change, words):
    made = rendered(f"overlays/{overlay}")
    change(made)
    assert any(words in fault for fault in said(made)), said(made)


def test_a_tag_is_refused_in_the_sources_too_where_nothing_is_to_be_filled_in():
    (made,) = things(K8S / "overlays/rayjob/rayjob.yaml")
    put(f"{HEAD}.containers.0.image", "fedray:latest")(made)
    assert said([made], in_full=False) == [
        "the head: image 'fedray:latest' is not named by its digest, and a tag can be moved: NAME@sha256:DIGEST"
    ]


def test_what_is_still_to_be_filled_in_is_said_and_can_be_made_a_fault():
    def run(text: str, *options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(K8S / "lint.py"), *options, "-"]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    text = yaml.safe_dump_all(rendered("overlays/rayjob"))
    rest = "is still to be filled in (components/"
    lines = [
        f"NetworkPolicy fedray-head-to-api-server: the API server's address {rest}api-server)",
        f"RayJob fedray: the image's digest {rest}image)",
    ]
    done = run(text)
    assert (done.returncode, done.stdout) == (0, "")
    assert sorted(done.stderr.splitlines()) == [f"-: to do: {line}" for line in lines]
    done = run(text, "--filled")
    assert (done.returncode, sorted(done.stdout.splitlines())) == (1, [f"-: {line}" for line in lines])
    done = run(text.replace("192.0.2.1/32", "10.1.2.3/32").replace(64 * "0", 64 * "7"), "--filled")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
