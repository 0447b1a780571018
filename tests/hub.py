"""A small hub: repositories of models and data sets over HTTP, as huggingface_hub and datasets speak it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`repositories`: by "models/OWNER/NAME" or "datasets/OWNER/NAME" the files; those in `private` ask for `TOKEN`.
    `breaks`: files of which the first answer ends in the middle. `log`: (method, path, range) of what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.breaks: set[str] = set()
        self.stored: dict[str, bytes] = {}  # by SHA-256, as LFS has them
        self.elsewhere: dict[str, bytes] = {}  # large files, as another host serves them
        self.tokens_elsewhere = 0  # requests there that brought a token
        self.commits: list[str] = []
        self.log: list[tuple[str, str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving():
    """A hub while it lasts."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def fedray(command, hub, home, *flags, **environment):
    """What the command prints, and its exit code; a process of its own, since the hub's address is read once."""
    kept = {k: v for k, v in os.environ.items() if "OFFLINE" not in k and k != "HF_TOKEN"}
    kept |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "COLUMNS": "400"} | environment
    kept["HF_HUB_DISABLE_XET"] = "1"  # the hub's own store, which this hub has not: it answers as others do
    words = [sys.executable, "-W", "ignore", "-m", "fedray.cli", command]
    done = subprocess.run([*words, *flags], env=kept, capture_output=True, text=True, timeout=240)
    return done.stdout + done.stderr, done.returncode


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._handle()

    def do_GET(self):
        self._handle()

    def do_POST(self):
        self._handle()

    def do_PUT(self):
        self._handle()

    # --- routes ---

    def _handle(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.log.append((self.command, path, self.headers.get("Range")))
        for pattern, route in _ROUTES:
            if match := re.fullmatch(pattern, path):
                getattr(self, route)(*match.groups())
                return
        self._json({"error": "not found"}, 404)

    def _repository(self, kind: str, name: str) -> dict[str, bytes] | None:
        """Its files, or None after an answer that says why not."""
        which = f"{kind}/{name}"
        if which not in self.server.repositories or (which in self.server.private and not self._allowed):
            self._json({"error": "Repository Not Found"}, 401, {"X-Error-Code": "RepoNotFound"})
            return None
        return self.server.repositories[which]

    @property
    def _allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def info(self, kind, name, _revision=None):
        if (files := self._repository(kind, name)) is not None:
            siblings = [{"rfilename": path} for path in files]
            self._json(
                {
                    "id": name,
                    "sha": COMMIT,
                    "siblings": siblings,
                    "tags": [],
                    "downloads": 0,
                    "private": f"{kind}/{name}" in self.server.private,
                }
            )

    def tree(self, kind, name, _revision, folder):
        if (files := self._repository(kind, name)) is not None:
            self._json(
                [_entry(path, data) for path, data in files.items() if path.startswith((folder or "").strip("/"))]
            )

    def paths(self, kind, name, _revision):
        if (files := self._repository(kind, name)) is not None:
            wanted = json.loads(self.body)["paths"] if self.body.startswith(b"{") else []
            self._json([_entry(path, files[path]) for path in wanted if path in files])

    def resolve(self, prefix, name, _revision, path):
        files = self._repository("datasets" if prefix else "models", name)
        if files is None:
            return
        if path not in files:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = files[path]
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        if not path.endswith(".safetensors"):
            self._send(path, data, {"ETag": tag, "X-Repo-Commit": COMMIT})
            return
        # Large files lie elsewhere, at a host that is to see no token.
        self.server.elsewhere[tag.strip('"')] = data
        self.send_response(302)
        place = f"http://localhost:{self.server.server_port}/elsewhere/{tag.strip(chr(34))}/{path}"
        linked = {"X-Linked-ETag": tag, "X-Linked-Size": str(len(data)), "X-Repo-Commit": COMMIT}
        for field, value in {"Location": place, "Content-Length": "0", **linked}.items():
            self.send_header(field, value)
        self.end_headers()

    def stored_elsewhere(self, tag, path):
        self.server.tokens_elsewhere += "Authorization" in self.headers
        self._send(path, self.server.elsewhere[tag], {"ETag": f'"{tag}"'})

    def _send(self, path, data, headers):
        """A file, from where it is asked for; of one that `breaks`, half the first time."""
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
        self.send_response(206 if start else 200)
        ranges = {"Accept-Ranges": "bytes", "Content-Length": str(len(data) - start)}
        ranges |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        for field, value in {**headers, **ranges}.items():
            self.send_header(field, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in self.server.breaks and start == 0:
            self.server.breaks.discard(path)
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(data[start:])

    def create(self):
        if not self._allowed:
            self._json({"error": "Invalid username or password."}, 401)
            return
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        which = f"models/{name}"
        known = which in self.server.repositories
        self.server.repositories.setdefault(which, {})
        if not known and (asked.get("private") or asked.get("visibility") == "private"):
            self.server.private.add(which)
        self._json({"url": f"{self.server.address}/{name}", "id": name}, 409 if known else 200)

    def preupload(self, kind, name, _revision):
        if self._repository(kind, name) is not None:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._json({"files": modes})

    def batch(self, _prefix, _name):
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.address}/lfs/{one['oid']}"}}}
            for one in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.stored[oid] = self.body
        self._json({})

    def commit(self, kind, name, _revision):
        files = self._repository(kind, name)
        if files is None:
            return
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif line["key"] == "header":
                self.server.commits.append(value["summary"])
        self._json({"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def yaml(self):
        self._json({"errors": [], "warnings": []})

    def _json(self, value, status: int = 200, headers: Mapping[str, str] | None = None):
        data = json.dumps(value).encode()
        self.send_response(status)
        for field, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(field, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "yaml"),
    (rf"/api/(models|datasets)/{_NAME}/preupload/([^/]+)", "preupload"),
    (rf"/api/(models|datasets)/{_NAME}/commit/([^/]+)", "commit"),
    (rf"/api/(models|datasets)/{_NAME}/tree/([^/]+)(/.*)?", "tree"),
    (rf"/api/(models|datasets)/{_NAME}/paths-info/([^/]+)", "paths"),
    (rf"/api/(models|datasets)/{_NAME}(/revision/[^/]+)?", "info"),
    (rf"/(datasets/)?{_NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"/lfs/(\w+)", "store"),
    (r"/elsewhere/(\w+)/(.+)", "stored_elsewhere"),
    (rf"/(datasets/)?{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
)
