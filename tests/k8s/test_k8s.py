"""Manifests against the operator's rules and the CRDs, the image's recipe, and every entrypoint as it stands."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from support import ROOT, SHARED, Head

K8S = ROOT / "k8s"
OVERLAYS = sorted(p.parent.name for p in (K8S / "overlays").glob("*/kustomization.yaml"))
MANIFESTS = sorted(p for p in (K8S / "overlays").glob("*/ray*.yaml"))

spec = importlib.util.spec_from_file_location("k8s_lint", K8S / "lint.py")
lint = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lint)


@functools.cache
def schemas_there() -> dict:
    return lint.load_schemas(SHARED / "kuberay")


def things(path: Path) -> list[dict]:
    return lint.documents(path.read_text())


def rendered(overlay: str) -> list[dict]:
    """What kustomize makes of an overlay."""
    command = (
        ["kustomize", "build"]
        if shutil.which("kustomize")
        else ["kubectl", "kustomize"]
        if shutil.which("kubectl")
        else None
    )
    if command is None:
        pytest.skip("neither kustomize nor kubectl is here: the manifests are checked as files only")
    done = subprocess.run([*command, str(K8S / overlay)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return lint.documents(done.stdout)


def cluster_of(thing: dict) -> dict:
    return thing["spec"] if thing["kind"] == "RayCluster" else thing["spec"]["rayClusterSpec"]


def pods(thing: dict) -> Iterator[dict]:
    """Every pod's spec in an object, with its labels under `labels`."""

    def labelled(template: dict) -> dict:
        return {**template["spec"], "labels": template.get("metadata", {}).get("labels", {})}

    if thing["kind"] in ("RayJob", "RayCluster"):
        cluster = cluster_of(thing)
        yield labelled(cluster["headGroupSpec"]["template"])
        yield from (labelled(g["template"]) for g in cluster["workerGroupSpecs"])
        if "submitterPodTemplate" in thing["spec"]:
            yield labelled(thing["spec"]["submitterPodTemplate"])
    elif thing["kind"] == "StatefulSet":
        yield labelled(thing["spec"]["template"])
    elif thing["kind"] == "Pod":
        yield labelled(thing)


# --- the manifests that ship ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_manifests_keep_the_operators_rules(path):
    assert [fault for thing in things(path) for fault in lint.lint(thing)] == []


@pytest.mark.shared
@pytest.mark.parametrize("overlay", [f"overlays/{o}" for o in OVERLAYS])
def test_rendered_manifests_fit_the_crds(overlay):
    schemas = schemas_there()
    made = rendered(overlay)
    assert {"Namespace", "ServiceAccount", "PersistentVolumeClaim", "ConfigMap", "NetworkPolicy"} < {
        t["kind"] for t in made
    }
    assert any(t["kind"] in schemas for t in made)
    assert [f for t in made for f in (*lint.validate(t, schemas), *lint.lint(t))] == []
    assert all(t["metadata"].get("namespace") == "fedray" for t in made if t["kind"] != "Namespace")


@pytest.mark.shared
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_manifests_fit_the_crds(path):
    schemas = schemas_there()
    assert [f for t in things(path) for f in lint.validate(t, schemas)] == []


def test_tls_reaches_every_ray_container(tmp_path):
    for kind in ("rayjob", "raycluster"):
        folder = K8S / "overlays" / f".tls-{kind}-{os.getpid()}"
        folder.mkdir()
        try:
            # As components/image has it.
            images = "images: [{name: fedray, newName: registry.example/fedray, newTag: '7'}]\n"
            (folder / "kustomization.yaml").write_text(
                f"resources: [../{kind}]\ncomponents: [../../components/tls, image]\n"
            )
            (folder / "image").mkdir()
            (folder / "image" / "kustomization.yaml").write_text(
                f"apiVersion: kustomize.config.k8s.io/v1alpha1\nkind: Component\n{images}"
            )
            made = rendered(f"overlays/{folder.name}")
        finally:
            shutil.rmtree(folder)
        (ray,) = [t for t in made if t["kind"] in ("RayJob", "RayCluster")]
        assert lint.lint(ray) == []
        if SHARED.is_dir():
            assert lint.validate(ray, schemas_there()) == []
        cluster = cluster_of(ray)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            inside = group["template"]["spec"]
            (container,) = inside["containers"]
            env = {e["name"]: e.get("value") for e in container["env"]}
            assert (
                env["RAY_USE_TLS"] == "1"
                and env["RAY_TLS_CA_CERT"] == "/tls/ca.crt"
                and "tls" in {m["name"] for m in container["volumeMounts"]}
            )
            assert [c["name"] for c in inside["initContainers"]] == ["certify"]
            assert {c["image"] for c in (*inside["containers"], *inside["initContainers"])} == {
                "registry.example/fedray:7"
            }
        beside = cluster["autoscalerOptions"]  # the operator's own container in the head
        assert {e["name"]: e["value"] for e in beside["env"]}["RAY_USE_TLS"] == "1" and beside["volumeMounts"][0][
            "mountPath"
        ] == "/tls"


def core_kinds() -> list[Path]:
    return sorted(
        p
        for p in K8S.rglob("*.yaml")
        if p.name not in ("kustomization.yaml", "podmonitor.yaml")
        and p not in MANIFESTS
        and "components" not in p.parts
    )


@pytest.mark.parametrize("path", core_kinds(), ids=lambda p: str(p.relative_to(K8S)))
def test_core_kinds_fit_kubernetes(path):
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed: pip install 'fedray[test]'"
    )
    for thing in things(path):
        kubernetes_validate.validate(thing, "1.33", strict=True)


@pytest.mark.parametrize(
    "path", [*MANIFESTS, K8S / "overlays/raycluster/redis.yaml", K8S / "loader/loader.yaml"], ids=lambda p: p.name
)
def test_pods_have_no_more_power_than_they_need(path):
    for thing in things(path):
        for pod in pods(thing):
            security = pod["securityContext"]
            assert (
                security["runAsNonRoot"]
                and security["runAsUser"] > 0
                and security["seccompProfile"] == {"type": "RuntimeDefault"}
            )
            assert pod["serviceAccountName"] == (
                "fedray-head" if pod["labels"]["app.kubernetes.io/component"] == "head" else "fedray-worker"
            )
            assert pod["labels"]["app.kubernetes.io/name"] == "fedray"  # what the network policy selects
            for container in (*pod["containers"], *pod.get("initContainers", [])):
                own = container["securityContext"]
                assert (
                    own["allowPrivilegeEscalation"] is False
                    and own["readOnlyRootFilesystem"] is True
                    and own["capabilities"] == {"drop": ["ALL"]}
                )
                assert container["resources"]["requests"] == container["resources"]["limits"]
                assert re.fullmatch(r"\d+", str(container["resources"]["limits"]["cpu"]))  # Ray counts whole ones
        if thing["kind"] in ("RayJob", "RayCluster"):
            cluster = cluster_of(thing)
            assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0" and cluster["rayVersion"] == "2.60.0"
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                inside = group["template"]["spec"]
                assert "/dev/shm" in {m["mountPath"] for m in inside["containers"][0]["volumeMounts"]}
                assert next(v for v in inside["volumes"] if v["name"] == "shm")["emptyDir"]["sizeLimit"]


def test_a_silos_data_and_keys_are_mounted_by_its_own_pods_only():
    (job,) = things(K8S / "overlays/rayjob-silos/rayjob-silos.yaml")
    cluster, seen = cluster_of(job), {}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for volume in group["template"]["spec"]["volumes"]:
            if claim := volume.get("persistentVolumeClaim", {}).get("claimName"):
                seen.setdefault(claim, []).append((group.get("labels") or {}).get("silo"))
    assert {c: s for c, s in seen.items() if c.startswith("silo-")} == {
        f"silo-{s}-{what}": [s] for s in ("a", "b") for what in ("data", "keys")
    }
    assert None in seen["fedray-results"] and set(seen["fedray-results"]) == {None}  # the head's alone
    (config,) = things(K8S / "overlays/rayjob-silos/config.yaml")
    clients = yaml.safe_load(config["data"]["config.yaml"])["clients"]
    assert [c["node_labels"] for c in clients.values()] == [g["labels"] for g in cluster["workerGroupSpecs"]]


def test_workers_reach_nothing_but_the_cluster_and_names():
    nodes, head = things(K8S / "base/network-policy.yaml")
    assert nodes["spec"]["policyTypes"] == ["Ingress", "Egress"] and nodes["spec"]["podSelector"] == {
        "matchLabels": {"app.kubernetes.io/name": "fedray"}
    }
    to = [peer for rule in nodes["spec"]["egress"] for peer in rule["to"]]
    assert {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "fedray"}}} in to and len(to) == 3
    assert [peer for peer in to if "ipBlock" in peer] == [
        {"ipBlock": {"cidr": "169.254.20.10/32"}}
    ]  # names, from the node itself
    assert {p["port"] for r in nodes["spec"]["egress"] for p in r.get("ports", [])} == {53}
    assert head["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "head" and head["spec"][
        "policyTypes"
    ] == ["Egress"]


# --- the linter: every rule catches its violation ---------------------------------------------------------------------


def job() -> dict:
    return copy.deepcopy(things(K8S / "overlays/rayjob/rayjob.yaml")[0])


def fixed_job() -> dict:
    return copy.deepcopy(things(K8S / "overlays/rayjob-kueue/rayjob-kueue.yaml")[0])


def cluster() -> dict:
    return copy.deepcopy(things(K8S / "overlays/raycluster/raycluster.yaml")[0])


def service() -> dict:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "s"},
        "spec": {"rayClusterConfig": cluster_of(job())},
    }


def put(path: str, value) -> Callable[[dict], None]:
    """A change: set the value at a dotted path (`-` removes it)."""

    def change(thing: dict) -> None:
        *way, last = path.split(".")
        for step in way:
            thing = thing[int(step)] if step.isdigit() else thing.setdefault(step, {})
        if value == "-":
            del thing[last]
        else:
            thing[last] = value

    return change


def several(*changes: Callable[[dict], None]) -> Callable[[dict], None]:
    def change(thing: dict) -> None:
        for one in changes:
            one(thing)

    return change


R, C = "spec.rayClusterSpec", "spec"
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
    (job, put("spec.deletionStrategy.deletionRules.1.condition.jobStatus", "SUCCEEDED"), "is there twice"),
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
    def run(*args: str, text: str | None = None):
        return subprocess.run(
            [sys.executable, str(K8S / "lint.py"), *args], input=text, capture_output=True, text=True, check=False
        )

    assert run(*map(str, MANIFESTS)).returncode == 0
    bad = job()
    bad["metadata"]["name"] = "7up"
    done = run("-", text=yaml.safe_dump(bad))
    assert done.returncode == 1 and done.stdout == "-: RayJob 7up: the name '7up' is no DNS-1035 label\n"


# --- monitoring, TLS --------------------------------------------------------------------------------------------------


def test_the_dashboard_asks_only_for_metrics_that_a_run_has():
    from fedray.report.metrics import METRICS

    text = (K8S / "monitoring/dashboard.json").read_text()
    asked = set(
        re.findall(r"ray_(fedray_\w+)", " ".join(t["expr"] for p in json.loads(text)["panels"] for t in p["targets"]))
    )
    histograms = {f"{n}_{part}" for n in METRICS for part in ("bucket", "sum", "count")}
    assert asked <= METRICS.keys() | histograms
    shown = {
        next(n for n in METRICS if a.startswith(n) and (a == n or a[len(n) :] in ("_bucket", "_sum", "_count")))
        for a in asked
    }
    assert shown == METRICS.keys()  # and none is forgotten
    boxes = [p["gridPos"] for p in json.loads(text)["panels"]]
    assert all(b["x"] + b["w"] <= 24 for b in boxes)
    assert not any(
        a is not b
        and a["x"] < b["x"] + b["w"]
        and b["x"] < a["x"] + a["w"]
        and a["y"] < b["y"] + b["h"]
        and b["y"] < a["y"] + a["h"]
        for a in boxes
        for b in boxes
    )
    (monitor,) = things(K8S / "monitoring/podmonitor.yaml")
    ports = {
        p["name"]
        for path in MANIFESTS
        for t in things(path)
        for pod in pods(t)
        for c in pod["containers"]
        for p in c.get("ports", [])
    }
    assert {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]} <= ports


TLS = """
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
import os, socket, ssl
host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
context = ssl.create_default_context(cafile=os.environ["RAY_TLS_CA_CERT"])
with context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as talk:
    print("SPEAKS", talk.version(), dict(pair[0] for pair in talk.getpeercert()["subject"])["commonName"])
print("ANSWER", ray.get(ray.remote(lambda: 6 * 7).remote()), flush=True)
"""


@pytest.mark.xdist_group("ray")
def test_rays_processes_talk_under_the_certificates_that_a_pod_makes(tmp_path):
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    ca, out = tmp_path / "ca", tmp_path / "tls"
    ca.mkdir()
    out.mkdir()
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedray-ca")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
    )
    made = (
        made.not_valid_after(now + datetime.timedelta(days=9))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (ca / "tls.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (ca / "tls.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    import ray._private.services as services

    address = services.get_node_ip_address()
    subprocess.run(
        [sys.executable, str(K8S / "components/tls/certify.py"), str(ca), str(out)],
        env=os.environ | {"POD_IP": address},
        check=True,
    )
    assert (out / "tls.key").stat().st_mode & 0o077 == 0
    leaf = x509.load_pem_x509_certificate((out / "tls.crt").read_bytes())
    leaf.verify_directly_issued_by(made)
    env = os.environ | {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(out / "tls.crt"),
        "RAY_TLS_SERVER_KEY": str(out / "tls.key"),
        "RAY_TLS_CA_CERT": str(out / "ca.crt"),
    }
    done = subprocess.run(
        [sys.executable, "-c", TLS], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert "ANSWER 42" in done.stdout and "SPEAKS TLSv1.3 fedray-node" in done.stdout, done.stdout + done.stderr


# --- the image --------------------------------------------------------------------------------------------------------


def test_the_image_has_a_clean_recipe_and_setup_cfgs_ranges():
    if (hadolint := shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")) is None:
        pytest.skip("hadolint is not installed: pip install 'fedray[test]'")
    done = subprocess.run([hadolint, str(K8S / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout, done.stdout
    text = (K8S / "Dockerfile").read_text()
    assert not re.search(r"torch[<>=]", text)  # the range is read from setup.cfg
    assert "USER 1000:1000" in text


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_images_install_steps_work_in_a_new_environment(tmp_path):
    """Every RUN that installs, with the Dockerfile's own words, in a virtual environment of its own."""
    text = (K8S / "Dockerfile").read_text().replace("\\\n", " ")
    runs = [line.removeprefix("RUN ") for line in text.splitlines() if line.startswith("RUN ")]
    steps = [r.split("&& useradd")[0] for r in runs if "pip install" in r or "fedray methods" in r]
    assert len(steps) == 3
    venv, work = tmp_path / "venv", tmp_path / "opt"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    for line in text.splitlines():
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for source in sources:
                to = work / target / (source if target in ("./", ".") else "")
                to.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, to)
    import torch

    pinned = tmp_path / "constraints.txt"
    pinned.write_text(f"torch=={torch.__version__.split('+')[0]}\n")  # gigabytes of CUDA else
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "PIP_CONSTRAINT": str(pinned),
        "HOME": str(tmp_path),
    }
    index = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True, check=False
    ).stdout.strip()
    env["TORCH_INDEX"] = index or "https://pypi.org/simple"
    for step in steps:
        step = step.replace("/tmp/torch.txt", str(tmp_path / "torch.txt"))
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", step],
            cwd=work,
            env=env,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{step}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    for extra in ("optuna", "mlflow", "wandb"):
        assert list(venv.glob(f"lib/python3*/site-packages/{extra}")), extra


# --- entrypoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tiny) -> Iterator[dict[str, Path]]:
    """/etc/fedray, /results, /models, /data and /keys, as the pods have them, by links that are removed again."""
    root = Path(tempfile.mkdtemp(prefix="fr-pod-", dir="/tmp"))
    made = {
        Path(p): root / p.strip("/").replace("/", "-") for p in ("/etc/fedray", "/results", "/models", "/data", "/keys")
    }
    linked = []
    try:
        for place, target in made.items():
            target.mkdir()
            if place.exists() or place.is_symlink():
                pytest.skip(f"{place} exists on this machine")
            try:
                place.symlink_to(target)
            except OSError as error:
                pytest.skip(f"{place} cannot be made here: {error}")
            linked.append(place)
        rows = "sentence,label\n" + "".join(f"{'good' if k % 2 else 'bad'} {k},{k % 2}\n" for k in range(60))
        (root / "data" / "train.csv").write_text(rows)
        (root / "models" / "held-out").mkdir()
        (root / "models" / "held-out" / "test.csv").write_text(rows)
        shutil.copytree(tiny / "bert", root / "models" / "model")
        yield {str(p): t for p, t in made.items()}
    finally:
        for place in linked:
            place.unlink()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def gpu_head(tmp_path_factory) -> Iterator[Head]:
    """A head without CPUs, and a node for each silo, each with logical GPUs."""
    made = Head(
        tmp_path_factory.mktemp("gpu-head"),
        ["--num-cpus=0"],
        {"DS_ACCELERATOR": "cpu", "RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES": ""},
    )
    nodes = [made.join("--num-cpus=4", "--num-gpus=3", f"--labels=silo={silo}") for silo in ("a", "b")]
    yield made
    for node in nodes:
        os.killpg(node.pid, signal.SIGKILL)
    made.close()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("path", [p for p in MANIFESTS if p.name.startswith("rayjob")], ids=lambda p: p.name)
def test_every_entrypoint_runs_as_it_stands(path, places, gpu_head):
    (thing,) = things(path)
    configs = K8S / "overlays/rayjob-silos/config.yaml" if "silos" in path.name else K8S / "base/config.yaml"
    for name, text in things(configs)[0]["data"].items():
        (places["/etc/fedray"] / name).write_text(text)
    words = thing["spec"]["entrypoint"].split()
    done = gpu_head.submit(*words, working_dir=None)
    assert done.returncode == 0, done.stdout + done.stderr
    config = yaml.safe_load(things(configs)[0]["data"]["config.yaml"])
    out = (
        places["/results"] / Path(words[words.index("--out") + 1] if "sweep" in words else config["output"]["dir"]).name
    )
    assert (out / "summary.json").is_file()
    again = gpu_head.submit(*words, working_dir=None)  # what backoffLimit does
    assert again.returncode == 0, again.stdout + again.stderr
    shutil.rmtree(out)  # the next manifest's run has the same name
