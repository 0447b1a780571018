"""The Ray that a run starts for itself, and other users of its machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedray.federation import cluster, embedded

#: Run where nothing is chosen yet: prints where the processes of an embedded Ray listen, and what opens it.
SESSION = """
import json, os, pathlib, subprocess, sys
import psutil, ray
from fedray.federation.cluster import ray_session

ask = "import sys; from ray._raylet import GcsClient; print(GcsClient(address=sys.argv[1]).internal_kv_keys(b'', b''))"
with ray_session():
    @ray.remote
    class Worker:
        def ready(self):
            return True

    ray.get(Worker.remote().ready.remote())
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = {(p.name(), c.laddr.ip) for p in family for c in p.net_connections() if c.status == "LISTEN"}
    gcs = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", ask, gcs]
    outside = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_TOKEN"} | {"RAY_AUTH_TOKEN_PATH": sys.argv[1]}
    codes = [subprocess.run(command, env=env, capture_output=True).returncode for env in (os.environ, outside)]
    folder = pathlib.Path(ray._private.worker._global_node.get_session_dir_path()).parent
    family_of = [folder, *folder.parents]
    closed = any(p.stat().st_uid == os.getuid() and not p.stat().st_mode & 0o077 for p in family_of)
    sockets = [str(p) for p in folder.rglob("*") if p.is_socket()]
gone = not folder.exists()
left = "RAY_AUTH_TOKEN" in os.environ, (pathlib.Path.home() / ".ray" / "auth_token").exists()
told = {"listening": sorted(listening), "codes": codes, "left": left}
print(json.dumps(told | {"closed": closed, "sockets": sockets, "gone": gone}))
"""


@pytest.mark.xdist_group("ray")
def test_nobody_else_reaches_an_embedded_ray(tmp_path):
    (tmp_path / "guess").write_text("0" * 64)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_A")} | {"HOME": str(tmp_path)}
    env |= {"PYTHONPATH": str(Path(cluster.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(tmp_path / "guess")],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    names = {name for name, _ in told["listening"]}
    assert any("gcs" in name for name in names) and any("raylet" in name for name in names)
    assert {ip for _, ip in told["listening"]} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert told["codes"][0] == 0 and told["codes"][1] != 0  # the session's own token opens it, another does not
    assert told["left"] == [False, False]
    # Logs, which may quote data, and the sockets of its processes: below a folder that nobody else may enter.
    assert told["closed"] and told["gone"] and told["sockets"] and max(map(len, told["sockets"])) < 107


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o600])
def test_a_token_that_others_could_read_is_closed_to_them_and_said(tmp_path, monkeypatch, caplog, mode):
    monkeypatch.setenv("HOME", str(tmp_path))
    embedded.guard_token_file()  # there is none yet
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(mode)
    embedded.guard_token_file()
    assert file.stat().st_mode & 0o777 == 0o600 and file.read_text() == "secret"
    assert ("ray get-auth-token --generate" in caplog.text) is (mode != 0o600) and "secret" not in caplog.text


def test_a_ray_that_would_be_reached_from_outside_is_refused():
    embedded._check_loopback("127.0.0.1")
    with pytest.raises(embedded.FedrayError, match=r"192\.0\.2\.2"):
        embedded._check_loopback("192.0.2.2")


@pytest.mark.parametrize("theirs", ["file", "link", "pipe", None])
def test_a_cluster_of_another_user_is_not_joined(tmp_path, monkeypatch, theirs):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if theirs == "pipe":
            os.mkfifo(file)
        elif theirs == "link":
            (tmp_path / "mine").write_text(address)
            file.symlink_to(tmp_path / "mine")
        else:
            file.write_text(address)
        if theirs in ("file", "pipe"):
            other = os.getuid() + 1
            monkeypatch.setattr(os, "getuid", lambda: other)
        assert cluster._started_here() == (None if theirs else address)
