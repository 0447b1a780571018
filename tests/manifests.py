"""The manifests, what kustomize makes of them, and changes to them: what the tests of `k8s/` share."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import ROOT, SHARED

K8S = ROOT / "k8s"
OVERLAYS = sorted(p.parent.name for p in (K8S / "overlays").glob("*/kustomization.yaml"))
MANIFESTS = sorted(p for p in (K8S / "overlays").glob("*/ray*.yaml"))
#: A RayJob's cluster, in a dotted path.
CLUSTER = "spec.rayClusterSpec"

sys.path[:0] = [str(K8S), str(K8S / "base")]  # scripts beside the manifests
import certify as certify  # for the tests that take it from here
import lint
import lint_trust

Change = Callable[[dict], None]


@functools.cache
def schemas_there() -> dict:
    return lint.load_schemas(SHARED / "kuberay")


def things(path: Path) -> list[dict]:
    return lint.documents(path.read_text())


def rendered(folder: str) -> list[dict]:
    """What kustomize makes of a folder of `k8s/`: objects that a test may change."""
    return copy.deepcopy(_rendered(folder))


@functools.cache
def _rendered(folder: str) -> list[dict]:
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if shutil.which(command[0]) is None:
        pytest.skip("neither kustomize nor kubectl is here: the manifests are checked as files only")
    done = subprocess.run([*command, str(K8S / folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return lint.documents(done.stdout)


def one(kind: str, among: list[dict], name: str | None = None) -> dict:
    """The object of a kind, and of a name where one is given."""
    (found,) = [t for t in among if t["kind"] == kind and name in (None, t["metadata"]["name"])]
    return found


def cluster_of(thing: dict) -> dict:
    return thing["spec"] if thing["kind"] == "RayCluster" else thing["spec"]["rayClusterSpec"]


def groups(thing: dict) -> Iterator[dict]:
    """The head's group and the workers'."""
    yield cluster_of(thing)["headGroupSpec"]
    yield from cluster_of(thing)["workerGroupSpecs"]


def pods(thing: dict) -> list[dict]:
    """Every pod's spec in an object, with its labels under `labels`."""
    return [{**pod.spec, "labels": pod.labels} for pod in lint_trust.pods(thing)]


# --- changes ----------------------------------------------------------------------------------------------------------


def job() -> dict:
    return copy.deepcopy(things(K8S / "overlays/rayjob/rayjob.yaml")[0])


def fixed_job() -> dict:
    return copy.deepcopy(things(K8S / "overlays/rayjob-kueue/rayjob-kueue.yaml")[0])


def silos() -> dict:
    return copy.deepcopy(things(K8S / "overlays/rayjob-silos/rayjob-silos.yaml")[0])


def cluster() -> dict:
    return copy.deepcopy(things(K8S / "overlays/raycluster/raycluster.yaml")[0])


def put(path: str, value) -> Change:
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


def add(path: str, value) -> Change:
    """A change: append the value to the list at a dotted path."""
    *way, last = path.split(".")

    def change(thing: dict) -> None:
        for step in way:
            thing = thing[int(step)] if step.isdigit() else thing[step]
        thing[last] = [*thing.get(last, []), value]

    return change


def several(*changes: Callable[[dict], None]) -> Change:
    def change(thing: dict) -> None:
        for one in changes:
            one(thing)

    return change
