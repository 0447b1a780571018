"""A Ray of this process's own, for the time of a run: closed to the other users of the machine.

All its processes listen on the loopback address, its token is in the environment of this process and its children
alone, and its logs and sockets are in a folder of this user's. Ray by itself would listen on every address, have a
folder that anyone may write to, and write one token for all clusters to `~/.ray/auth_token`, for anyone to read:
whoever has it runs code as this user.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled, and its stub lacks it

from fedray.errors import FedrayError
from fedray.stopping import stop_on_sigterm

#: Where a folder with a short path may be made.
_SHORT = "/tmp"

#: Where Ray looks for a token, the first that is there; then in the file.
_TOKEN, _TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@contextmanager
def embedded_ray() -> Iterator[None]:
    """Start it, and end it. Raises FedrayError where it would be open to others."""
    guard_token_file()
    with _token_of_its_own(), _folder_of_its_own() as folder:
        with _on_loopback():
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=folder,
            )
        stop_on_sigterm()
        try:
            _check_loopback(ray.util.get_node_ip_address())
            yield
        finally:
            ray.shutdown()


@contextmanager
def _folder_of_its_own() -> Iterator[str]:
    """For logs, which may quote data, and sockets: Ray's own, below /tmp/ray, are open to every user of the machine,
    who may read the ones and take the place of the others. Short, since a socket's path has at most 107 bytes."""
    folder = tempfile.mkdtemp(prefix="fedray-", dir=_SHORT if os.access(_SHORT, os.W_OK) else None)
    try:
        yield f"{folder}/ray"  # Ray opens the folder that it is given to everyone: not the one above it
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray's own way on macOS and Windows. Asked for the address 127.0.0.1 it would take a reachable one instead."""
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _check_loopback(address: str) -> None:
    if not ipaddress.ip_address(address).is_loopback:
        raise FedrayError(
            f"the Ray of this run listens on {address}, where other machines reach it: use the version of Ray that "
            "fedray asks for, or start a cluster and set RAY_ADDRESS"
        )


@contextmanager
def _token_of_its_own() -> Iterator[None]:
    """A new token for the session, on no disk: one in a file that others could once read opens nothing here. Nothing
    is changed for who has chosen: a token of their own, or none."""
    chosen = _TOKEN in os.environ or _TOKEN_PATH in os.environ
    if chosen or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        yield
        return
    os.environ[_TOKEN] = secrets.token_hex(32)
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        del os.environ[_TOKEN]
        AuthenticationTokenLoader.instance().reset_cache()


def guard_token_file() -> None:
    """Take `~/.ray/auth_token` from the eyes of others, where it is this user's. It is not replaced: clusters that
    `ray start` has begun may be using it, and nobody could join them any more."""
    file = Path.home() / ".ray" / "auth_token"
    try:
        handle = os.open(file, os.O_RDONLY)
    except OSError:
        return  # there is none
    try:
        there = os.fstat(handle)
        if there.st_uid != os.getuid() or not there.st_mode & 0o077:
            return
        os.fchmod(handle, 0o600)
    finally:
        os.close(handle)
    logging.getLogger("fedray").warning(
        "%s could be read by others, and is closed to them now: end the clusters that use it, remove it, and make "
        "another by `ray get-auth-token --generate`",
        file,
    )
