"""fedray's own rules for manifests: images by digest, TLS in every pod of Ray's, certificates that outlive their pods,
API tokens and keys mounted where they are needed and nowhere else. What README.md promises rests on them.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

from lint_isolation import isolation
from lint_network import network, outside
from lint_schemas import Object, listed, part

#: Names that stand in the sources for images, until components/image gives them a digest.
PLACEHOLDERS = ("fedray", "redis")
#: The digest that components/image ships with, until it is filled in.
NO_DIGEST = "sha256:" + 64 * "0"
BY_DIGEST = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")
SILO = "fedray.io/silo"
TLS_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
API_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
DAY = 86400


@dataclasses.dataclass(frozen=True)
class Pod:
    """A pod that an object makes: where it stands, in words; its labels; its spec; whether Ray runs in it.

    `scaled`: the operator adds the autoscaler's container to it. `party`: whose pod it is, of those that may distrust
    each other: the head's, the workers', a silo's, or what its component is called."""

    where: str
    labels: Object
    spec: Object
    ray: bool = False
    scaled: bool = False

    @property
    def party(self) -> str:
        if silo := self.labels.get(SILO):
            return f"silo {silo}"
        return str(self.labels.get("app.kubernetes.io/component", self.where))

    def containers(self, *kinds: str) -> list[Object]:
        return [c for kind in kinds or ("initContainers", "containers") for c in listed(self.spec, kind)]


def ray_cluster(thing: Object) -> Object:
    """The cluster's spec in an object of ray.io; empty in others."""
    spec = part(thing, "spec")
    inner: dict[str, Callable[[], Object]] = {
        "RayCluster": lambda: spec,
        "RayJob": lambda: part(spec, "rayClusterSpec"),
        "RayService": lambda: part(spec, "rayClusterConfig"),
        "RayCronJob": lambda: part(part(spec, "jobTemplate"), "rayClusterSpec"),
    }
    return inner.get(str(thing.get("kind")), dict)()


def _pod(where: str, template: Object, **more: bool) -> Pod:
    return Pod(where, part(part(template, "metadata"), "labels"), part(template, "spec"), **more)


def pods(thing: Object) -> Iterator[Pod]:
    """Every pod that an object makes."""
    spec, cluster = part(thing, "spec"), ray_cluster(thing)
    if thing.get("kind") == "Pod":
        yield _pod("the pod", thing)
    if "template" in spec:
        yield _pod("the pod", spec["template"])
    if thing.get("kind") == "CronJob":
        yield _pod("the pod", part(part(part(spec, "jobTemplate"), "spec"), "template"))
    if cluster:
        scaled = bool(cluster.get("enableInTreeAutoscaling"))
        yield _pod("the head", part(part(cluster, "headGroupSpec"), "template"), ray=True, scaled=scaled)
        for group in listed(cluster, "workerGroupSpecs"):
            yield _pod(f"worker group '{group.get('groupName')}'", part(group, "template"), ray=True)
    if "submitterPodTemplate" in spec:
        yield _pod("the submitter", spec["submitterPodTemplate"])


def trust(things: list[Object], rendered: bool) -> Iterator[tuple[Object, str]]:
    """What breaks a promise, in objects that are applied together: each with a sentence.

    `rendered`: they are what kustomize made, so images have their digests and the network policies are there."""
    for thing in things:
        yield from ((thing, fault) for fault in _object(thing, rendered))
    made = [(thing, pod) for thing in things for pod in pods(thing)]
    yield from _keys(things)
    yield from _authorities_key(made)
    yield from isolation(made, things)
    if rendered:
        yield from network(made, things)


def to_fill(things: list[Object]) -> Iterator[tuple[Object, str]]:
    """Placeholders that only the one who runs the cluster can fill in."""
    for thing in things:
        if any(NO_DIGEST in c.get("image", "") for pod in pods(thing) for c in pod.containers()):
            yield thing, "the image's digest is still to be filled in (components/image)"
        if thing.get("kind") == "NetworkPolicy" and any(b.startswith("192.0.2.") for b in outside(thing)):
            yield thing, "the API server's address is still to be filled in (components/api-server)"


def _object(thing: Object, rendered: bool) -> Iterator[str]:
    if thing.get("kind") == "ServiceAccount" and thing.get("automountServiceAccountToken") is not False:
        yield "the service account gives every pod an API token: automountServiceAccountToken: false"
    cluster = ray_cluster(thing)
    for pod in pods(thing):
        faults = [*_images(pod, rendered), *_token(pod), *(_ray_pod(pod) if pod.ray else _renewed(pod))]
        yield from (f"{pod.where}: {fault}" for fault in faults)
    yield from _labels(cluster)
    yield from _redis(cluster)
    yield from _operators_tls(cluster)
    if cluster.get("enableInTreeAutoscaling"):
        yield from (f"the autoscaler: {fault}" for fault in _autoscaler(part(cluster, "autoscalerOptions")))
    yield from _deadline(thing)
    if thing.get("kind") in ("StatefulSet", "Deployment", "Pod"):
        yield from _redis_server(thing)


def _labels(cluster: Object) -> Iterator[str]:
    """A silo is called the same by Ray, which places clients, and by Kubernetes, whose policies part the pods."""
    for group in listed(cluster, "workerGroupSpecs"):
        ray, pod = part(group, "labels").get("silo"), _pod("", part(group, "template")).labels.get(SILO)
        if ray != pod:
            yield f"worker group '{group.get('groupName')}': its silo is {ray} for Ray and {pod} in its pods' {SILO}"


# --- images ---------------------------------------------------------------------------------------------------------


def _images(pod: Pod, rendered: bool) -> Iterator[str]:
    for image in sorted({str(c.get("image")) for c in pod.containers()}):
        if BY_DIGEST.fullmatch(image) or (image in PLACEHOLDERS and not rendered):
            continue
        if image in PLACEHOLDERS:
            yield f"image '{image}' has no digest: components/image gives it, as an overlay's last component"
        else:
            yield f"image '{image}' is not named by its digest, and a tag can be moved: NAME@sha256:DIGEST"


def recipe(text: str) -> Iterator[str]:
    """What a Dockerfile takes in without a hash: its base, and what pip installs; a sentence each."""
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.M))
    for base in re.findall(r"^FROM (\S+)", text, re.M):
        named = re.sub(r"\$\{?(\w+)\}?", lambda m: arguments.get(m[1], ""), base)
        if not BY_DIGEST.fullmatch(named):
            yield f"the base '{named}' is not named by its digest"
    for command in re.findall(r"pip install[^&|;\n]*", text.replace("\\\n", " ")):
        if "--require-hashes" not in command and not re.search(r"--no-deps\b.*\s\.\s*$", command):
            yield f"'{command.strip()}' takes what the index gives: --require-hashes, or --no-deps of this checkout"


# --- tokens of the API server ---------------------------------------------------------------------------------------


def _mounted(container: Object) -> set[str]:
    return {mount["name"] for mount in listed(container, "volumeMounts")}


def _token(pod: Pod) -> Iterator[str]:
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield "every container gets an API token: automountServiceAccountToken: false"
    volumes = [v["name"] for v in listed(pod.spec, "volumes") if _has_token(v)]
    if volumes and not pod.scaled:
        yield "there is an API token in it, and nothing scales from here"
    for container in pod.containers():
        places = {str(m.get("mountPath")).rstrip("/") for m in listed(container, "volumeMounts")}
        if _mounted(container) & set(volumes) or API_TOKEN in places:
            yield f"'{container['name']}' mounts the API token: the autoscaler's container alone needs it"


def _has_token(volume: Object) -> bool:
    return any("serviceAccountToken" in source for source in listed(part(volume, "projected"), "sources"))


def _autoscaler(options: Object) -> Iterator[str]:
    """The container that the operator adds to the head."""
    yield from _speaks_tls(options)
    if API_TOKEN not in {m.get("mountPath") for m in listed(options, "volumeMounts")}:
        yield f"no API token is mounted at {API_TOKEN}: it could bring no nodes"
    if (image := options.get("image")) and not BY_DIGEST.fullmatch(image):
        yield f"image '{image}' is not named by its digest"


# --- TLS ------------------------------------------------------------------------------------------------------------


def _speaks_tls(container: Object) -> Iterator[str]:
    env = {e.get("name"): str(e.get("value")) for e in listed(container, "env")}
    mounts = [str(m.get("mountPath")) for m in listed(container, "volumeMounts")]
    if env.get("RAY_USE_TLS") != "1":
        yield "Ray speaks without TLS: RAY_USE_TLS is not 1"
    for name in TLS_FILES:
        if not any(env.get(name, "").startswith(f"{place}/") for place in mounts if place.startswith("/")):
            yield f"Ray speaks without TLS: {name} is in no volume of its container"


def _redis(cluster: Object) -> Iterator[str]:
    address = part(cluster, "gcsFaultToleranceOptions").get("redisAddress")
    if address and not address.startswith("rediss://"):
        yield f"what the head keeps in Redis, code among it, travels in clear: rediss:// and not '{address}'"


def _redis_server(thing: Object) -> Iterator[str]:
    """What a Redis of these pods listens to."""
    for pod in pods(thing):
        for container in pod.containers("containers"):
            words = " ".join(_command(container)).split()
            if "redis-server" in words or str(container.get("image", "")).split("@")[0].split("/")[-1] == "redis":
                given = dict(itertools.pairwise(words))
                if given.get("--port") != "0" or "--tls-port" not in given or "--requirepass" not in given:
                    yield f"{pod.where}: Redis listens in clear, or to anyone: --port 0 --tls-port --requirepass"


def _operators_tls(cluster: Object) -> Iterator[str]:
    if part(cluster, "tlsOptions").get("enabled"):
        yield "tlsOptions gives all workers one key and renews no certificate of a pod that runs: certify.py instead"


def _ray_pod(pod: Pod) -> Iterator[str]:
    for container in pod.containers("containers"):
        yield from _speaks_tls(container)
    certify = _certify(pod)
    if certify is None:
        yield "no init container makes the pod's certificate (certify.py)"
        return
    if "--head" in _command(certify) and pod.where != "the head":
        yield "its certificate holds the head's name: certify.py --head is for the head"
    yield from _own_key(pod, certify)
    yield from _lifetime(pod, certify)


def _command(container: Object) -> list[str]:
    """The words of a container's command, `--option=value` as two."""
    words = [str(word) for kind in ("command", "args") for word in listed(container, kind)]
    return [piece for word in words for piece in (word.split("=", 1) if word.startswith("--") else [word])]


def _authorities_key(made: list[tuple[Object, Pod]]) -> Iterator[tuple[Object, str]]:
    """The key that signs certificates is for the init container: code that gets into Ray's must not have it, by
    whichever way a secret comes into a container."""
    keys: set[str] = set()
    for _, pod in made:
        if (certify := _certify(pod)) is not None:
            keys |= _secrets(pod, certify)
    for thing, pod in made:
        for container in pod.containers():
            if container is not _certify(pod) and keys & _secrets(pod, container):
                yield (
                    thing,
                    f"{pod.where}: '{container['name']}' mounts the authority's key, which is for certify.py alone",
                )


def _secrets(pod: Pod, container: Object) -> set[str]:
    """The names of all secrets that a container sees: in volumes, projected or not, and in its environment."""
    mounted, found = _mounted(container), set()
    for volume in (v for v in listed(pod.spec, "volumes") if v["name"] in mounted):
        found.add(part(volume, "secret").get("secretName"))
        found |= {part(s, "secret").get("name") for s in listed(part(volume, "projected"), "sources")}
    found |= {part(part(e, "valueFrom"), "secretKeyRef").get("name") for e in listed(container, "env")}
    found |= {part(e, "secretRef").get("name") for e in listed(container, "envFrom")}
    return {str(name) for name in found if name}


def _own_key(pod: Pod, certify: Object) -> Iterator[str]:
    """A pod's private key is in its memory, and nowhere else."""
    words = _command(certify)
    place = words[words.index("--out") + 1] if "--out" in words else "/tls"
    named = {m.get("mountPath"): m["name"] for m in listed(certify, "volumeMounts")}.get(place)
    volume = next((v for v in listed(pod.spec, "volumes") if v["name"] == named), {})
    if part(volume, "emptyDir").get("medium") != "Memory":
        yield f"its private key lies on a disk: {place} is an emptyDir with medium Memory"


def _certify(pod: Pod) -> Object | None:
    return next((c for c in pod.containers("initContainers") if _runs_certify(_command(c))), None)


def _runs_certify(words: list[str]) -> bool:
    script = words[1:2] if words[:1] == ["python"] else words[:1]
    return [word.rsplit("/", 1)[-1] for word in script] == ["certify.py"]


def _given(container: Object, option: str, default: int) -> int:
    """The number that a container's command gives an option."""
    words = _command(container)
    return int(words[words.index(option) + 1]) if option in words else default


def _renewed(pod: Pod) -> Iterator[str]:
    """A pod that is not Ray's may live on: its certificate is made again beside it."""
    certify = _certify(pod)
    if certify is None:
        return
    days, every = _given(certify, "--days", 30), _given(certify, "--every", 0)
    if not 0 < every < days:
        yield f"its certificate ends after {days} days and no new one is made before: certify.py --every"


def _lifetime(pod: Pod, certify: Object) -> Iterator[str]:
    days, lives = _given(certify, "--days", 30), pod.spec.get("activeDeadlineSeconds")
    if lives is None:
        yield f"its certificate ends after {days} days and the pod may live on: activeDeadlineSeconds"
    elif lives > (days - 1) * DAY:
        yield f"its certificate ends after {days} days and the pod may live {lives / DAY:.3g}: a day more at least"


def _deadline(thing: Object) -> Iterator[str]:
    """A run ends before its pods do."""
    runs = part(thing, "spec").get("activeDeadlineSeconds") if thing.get("kind") == "RayJob" else None
    lives = [pod.spec.get("activeDeadlineSeconds") or 0 for pod in pods(thing) if pod.ray]
    if runs is not None and lives and runs >= min(lives):
        yield f"the run may last {runs / DAY:.3g} days and its pods {min(lives) / DAY:.3g}"


# --- keys -----------------------------------------------------------------------------------------------------------


def _keys(things: list[Object]) -> Iterator[tuple[Object, str]]:
    """A claim with noise keys is mounted by one party's pods alone."""
    there = [(thing, pod) for thing in things for pod in pods(thing)]
    mounted: dict[str, set[str]] = {}
    for _, pod in there:
        for claim in claims(pod).values():
            mounted.setdefault(claim, set()).add(pod.party)
    for thing, pod in there:
        if pod.ray:
            yield from ((thing, f"{pod.where}: {fault}") for fault in _key_place(pod, mounted))


def _key_place(pod: Pod, mounted: dict[str, set[str]]) -> Iterator[str]:
    container = next(iter(pod.containers("containers")), {})
    place = {e.get("name"): e.get("value") for e in listed(container, "env")}.get("XDG_STATE_HOME")
    volume = {m.get("mountPath"): m["name"] for m in listed(container, "volumeMounts")}.get(place)
    claim = claims(pod).get(str(volume))
    if claim is None:
        yield f"its keys ({place}) lie on no claim of their own: XDG_STATE_HOME is where one is mounted"
    elif others := mounted[claim] - {pod.party}:
        yield f"its keys lie on the claim {claim}, which others mount too: {', '.join(sorted(others))}"


def claims(pod: Pod) -> dict[str, Any]:
    """By volume: the claim behind it."""
    volumes = listed(pod.spec, "volumes")
    return {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v}
