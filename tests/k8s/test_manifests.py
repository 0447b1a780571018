"""The manifests that ship, as files and as kustomize makes them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from manifests import K8S, MANIFESTS, OVERLAYS, cluster_of, groups, lint, one, pods, rendered, schemas_there, things


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


def core_kinds() -> list[Path]:
    return sorted(
        p
        for p in K8S.rglob("*.yaml")
        if p.name not in ("kustomization.yaml", "podmonitor.yaml")
        and p not in MANIFESTS
        and p.parent.name not in ("image", "authority")
    )


def test_an_authority_of_cert_managers_outlives_every_pods_certificate():
    """It is renewed earlier before its end than any certificate lasts, and over the same key."""
    issuer, made = things(K8S / "components/authority/certificate.yaml")
    assert issuer["spec"] == {"selfSigned": {}} and made["spec"]["issuerRef"]["name"] == issuer["metadata"]["name"]
    days = [
        int(words[words.index("--days") + 1])
        for path in MANIFESTS
        for group in groups(things(path)[0])
        for words in [group["template"]["spec"]["initContainers"][0]["command"]]
    ]
    hours = {k: int(made["spec"][k].removesuffix("h")) for k in ("duration", "renewBefore")}
    assert max(days) * 24 < hours["renewBefore"] < hours["duration"]
    assert made["spec"]["isCA"] and made["spec"]["privateKey"]["rotationPolicy"] == "Never"
    assert made["spec"]["secretName"] == "fedray-ca"  # what the pods mount


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
    seen = {}
    for group in groups(job):
        for volume in group["template"]["spec"]["volumes"]:
            name = volume.get("persistentVolumeClaim", {}).get("claimName") or volume.get("secret", {}).get(
                "secretName"
            )
            if name:
                seen.setdefault(name, []).append((group.get("labels") or {}).get("silo"))
    assert {c: s for c, s in seen.items() if c.startswith("silo-")} == {
        f"silo-{s}-{what}": [s] for s in ("a", "b") for what in ("data", "keys", "ca")
    }
    assert [seen[own] for own in ("fedray-results", "fedray-coordinator-keys", "fedray-ca")] == [
        [None]
    ] * 3  # the head's
    (config,) = things(K8S / "overlays/rayjob-silos/config.yaml")
    clients = yaml.safe_load(config["data"]["config.yaml"])["clients"]
    assert [c["node_labels"] for c in clients.values()] == [g["labels"] for g in cluster_of(job)["workerGroupSpecs"]]


def test_each_party_of_the_silos_is_kept_to_its_own_machines():
    (job,) = things(K8S / "overlays/rayjob-silos/rayjob-silos.yaml")
    machines = [(pod["labels"].get("fedray.io/silo"), pod["nodeSelector"]["fedray.io/silo"]) for pod in pods(job)]
    assert machines == [(None, "coordinator"), ("a", "a"), ("b", "b"), (None, "coordinator")]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_api_token_is_mounted_by_an_autoscaler_alone(overlay):
    made = rendered(f"overlays/{overlay}")
    tokens = re.findall("serviceAccountToken:", yaml.safe_dump_all(made))
    (ray,) = [t for t in made if t["kind"] in ("RayJob", "RayCluster")]
    beside = cluster_of(ray).get("autoscalerOptions")
    assert len(tokens) == (beside is not None)
    assert {p["automountServiceAccountToken"] for t in made for p in pods(t)} == {False}
    if beside:
        assert {m["name"]: m["mountPath"] for m in beside["volumeMounts"]} == {
            "tls": "/tls",
            "api-token": "/var/run/secrets/kubernetes.io/serviceaccount",  # where Ray's node provider looks
        }


def test_the_ways_out_of_a_run():
    """By overlay: whom pods may speak to that are not fedray's, and on which ports."""
    for overlay in OVERLAYS:
        ways = set()
        for thing in rendered(f"overlays/{overlay}"):
            for rule in thing["spec"].get("egress", []) if thing["kind"] == "NetworkPolicy" else []:
                ports = tuple(sorted({p["port"] for p in rule.get("ports", [])}))
                strangers = [p for p in rule["to"] if "ipBlock" in p or "namespaceSelector" in p]
                ways |= {(json.dumps(p, sort_keys=True), ports) for p in strangers}
        names = {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
            "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
        }
        api_server = {(json.dumps({"ipBlock": {"cidr": "192.0.2.1/32"}}), (6443,))}
        scaled = overlay in ("raycluster", "rayjob", "rayjob-sweep")
        assert ways == {(json.dumps(names, sort_keys=True), (53,))} | (api_server if scaled else set()), overlay


def test_the_ports_of_the_silos_policies_are_those_that_ray_is_given():
    made = rendered("overlays/rayjob-silos")
    job = one("RayJob", made)
    for group in groups(job):
        given = {k: int(v) for k, v in group["rayStartParams"].items() if k.endswith("-port")}
        head = group is cluster_of(job)["headGroupSpec"]
        name = "fedray-head-and-silos" if head else "fedray-silo-and-head"
        rule = one("NetworkPolicy", made, name)["spec"]["ingress"][0]
        opened = {p["port"] for p in rule["ports"]}
        wanted = {given["object-manager-port"], given["node-manager-port"], given["min-worker-port"]}
        assert opened == wanted | ({6379} if head else {given["dashboard-agent-grpc-port"]})
        assert {p["endPort"] for p in rule["ports"] if "endPort" in p} == {given["max-worker-port"]}


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
