"""A small HTTP server on 127.0.0.1 that plays the hub, and a child process that resolves a name against it.

huggingface_hub reads its settings when it is imported, hence the child.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = """
import json, sys
from tiny_llm.errors import TinyLLMError
from tiny_llm.weights.hub import resolve
try:
    print(json.dumps({"folder": str(resolve(sys.argv[1], offline="--offline" in sys.argv))}))
except TinyLLMError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@dataclass(frozen=True)
class Request:
    """What the client asked for."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked for."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refuse: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    damage: bool = False  # send other bytes than were promised
    stall_after: int | None = None  # send so many bytes of a file, then nothing
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    requests: list[Request] = field(default_factory=list)
    endpoint: str = ""

    def downloads(self) -> list[tuple[str, str | None]]:
        """The file and the Range of every GET that was answered with a file's bytes."""
        storage = [r for r in self.requests if r.method == "GET" and r.path.startswith("/storage/")]
        return [(r.path.rsplit("/", 1)[1], r.range) for r in storage]

    def asked_files(self) -> set[str]:
        """Every file that was asked for in any way."""
        return {r.path.split("/", 5)[-1] for r in self.requests if "/resolve/" in r.path}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        wanted, token = self.headers.get("Range"), self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, path, wanted, token))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)((/revision|/tree)/[^/]+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        storage = re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path)
        repo = (api or file or storage or [None, ""])[1]
        if repo in self.hub.refuse:
            code, headers = self.hub.refuse[repo]
            self._send(code, b"{}", headers)
        elif repo not in self.hub.repos:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif storage:
            self._send_bytes(self.hub.repos[repo][storage[2]], wanted)
        elif file:
            self._send_file(repo, file[2], wanted)
        else:
            assert api is not None, f"the client asked for {path}, which this server does not know"
            self._send(200, json.dumps(self._listing(repo, api[3] == "/tree")).encode(), {})

    def _listing(self, repo: str, tree: bool) -> object:
        def entry(name: str, data: bytes) -> dict[str, object]:
            large = {
                "sha256": _etag(name, data),
                "oid": _etag(name, data),
                "size": len(data),
                "pointerSize": 1,
            }
            return {"size": len(data)} | ({"lfs": large} if _is_large(name) else {})

        files = self.hub.repos[repo].items()
        if tree:
            return [
                {"type": "file", "path": name, "oid": _etag(name, data), **entry(name, data)}
                for name, data in files
            ]
        rows = [{"rfilename": name, "blobId": _etag(name, data), **entry(name, data)} for name, data in files]
        return {"id": repo, "sha": COMMIT, "siblings": rows}

    def _send_file(self, repo: str, name: str, wanted: str | None) -> None:
        """Large files lie on another host, as the hub's do."""
        data = self.hub.repos[repo][name]
        headers = {"ETag": f'"{_etag(name, data)}"', "X-Repo-Commit": COMMIT}
        if not _is_large(name):
            self._send(200, data, headers)
            return
        headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
        headers |= {"Location": f"http://localhost:{self.server.server_port}/storage/{repo}/{name}"}
        self._send(302, b"", headers)

    def _send_bytes(self, data: bytes, wanted: str | None) -> None:
        data = bytes(len(data)) if self.hub.damage else data
        part = re.fullmatch(r"bytes=(\d+)-", wanted or "")
        start = int(part[1]) if part else 0
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if part else {}
        self._send(206 if part else 200, data[start:], headers)

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.hub.stall_after
        if limit is not None and len(body) > limit:
            self.wfile.write(body[:limit])
            self.hub.stalled.set()
            self.hub.released.wait(timeout=30)
            self.close_connection = True
            return
        self.wfile.write(body)


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pth"))


def _etag(name: str, data: bytes) -> str:
    return (hashlib.sha256 if _is_large(name) else hashlib.sha1)(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub of its own for each test, listening on a free port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield hub
    hub.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass
class Child:
    """Runs ``resolve`` in a process of its own, with this cache and this hub."""

    cache: Path
    endpoint: str

    def start(self, name: str, *flags: str, **env: str) -> subprocess.Popen[str]:
        """Start resolving ``name``; ``flags`` may hold --offline, ``env`` adds to the environment."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            [sys.executable, "-c", RESOLVE, name, *flags],
            env={**kept, **settings, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def resolve(self, name: str, *flags: str, **env: str) -> dict[str, str]:
        """Return {"folder": ...} or {"error": class name, "message": text}."""
        child = self.start(name, *flags, **env)
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0, f"resolve {name} ended with {child.returncode}:\n{err}"
        answer: dict[str, str] = json.loads(out)
        return answer


@pytest.fixture
def child(hub: Hub, tmp_path: Path) -> Child:
    """A child whose cache is empty and whose hub is ``hub``."""
    return Child(tmp_path / "hf", hub.endpoint)
