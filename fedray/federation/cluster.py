"""The Ray cluster that a run uses: the one that is there, or an embedded one for its time."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from fedray.config.sections import Config
from fedray.errors import FedrayError
from fedray.federation.embedded import embedded_ray, guard_token_file
from fedray.federation.placement import Node
from fedray.stopping import stop_on_sigterm


def resources(config: Config) -> tuple[float, float]:
    """CPUs and GPUs of the cluster the run will use; connects to one that is running, starts none."""
    if config.engine == "ray" and connect():
        total = ray.cluster_resources()
        return total.get("CPU", 0.0), total.get("GPU", 0.0)
    return float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count())


def nodes_there() -> list[Node]:
    """The machines of the cluster that is there; this one, without labels, where there is none."""
    if connect():
        return [Node(n["Resources"], n["Labels"]) for n in ray.nodes() if n["Alive"]]
    return [Node({"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}, {})]


def answer_of(reference: Any, what: str) -> Any:
    try:
        return ray.get(reference)
    except (RayActorError, RayTaskError) as error:
        raise FedrayError(f"{what}: {last_line(error)}") from error


def last_line(error: Exception) -> str:
    """The last line of a remote error: the cause itself."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def ray_session() -> Iterator[None]:
    """The cluster that is there, or an embedded one for the time of the run."""
    if connect():
        yield
        return
    with embedded_ray():
        yield


def connect() -> bool:
    """Whether this process is connected to a cluster, after joining the one that it was started on: RAY_ADDRESS, as
    `ray job submit` and KubeRay set it, or one that `ray start` has begun on this machine. Raises FedrayError where
    RAY_ADDRESS answers nothing."""
    if ray.is_initialized():
        return True
    address = os.environ.get("RAY_ADDRESS") or _started_here()
    if address is None:
        return False
    guard_token_file()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise FedrayError(
            f"no Ray cluster could be reached at {address}: {last_line(error)}; unset RAY_ADDRESS to start one for "
            "this run, or bring it up"
        ) from error
    stop_on_sigterm()
    return True


def _started_here() -> str | None:
    """The address of a cluster that this user has begun here by `ray start` and that answers; embedded ones leave no
    such file. One that another user has left is theirs: a run that joined it would hand them its data."""
    file = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as handle:
            if os.fstat(handle.fileno()).st_uid != os.getuid():
                return None
            address = handle.read().strip()
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=2):
            return address
    except (OSError, ValueError):
        return None
