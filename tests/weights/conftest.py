"""A small HTTP server on 127.0.0.1 that plays the hub, and a child process that resolves a name against it.

huggingface_hub reads most of its settings when it is imported, hence the child.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
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
import json, os, sys
from tiny_llm.errors import TinyLLMError
from tiny_llm.weights.hub import resolve
for line in sys.stdin if len(sys.argv) < 2 else sys.argv[1:]:
    asked = json.loads(line)
    os.environ.update(asked["env"])
    try:
        answer = {"folder": str(resolve(asked["name"], offline=asked["offline"]))}
    except TinyLLMError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    for name in asked["env"]:
        del os.environ[name]
    print(json.dumps(answer), flush=True)
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
    return name.endswith((".safetensors", ".bin", ".pth", ".gguf"))


def _etag(name: str, data: bytes) -> str:
    return (hashlib.sha256 if _is_large(name) else hashlib.sha1)(data).hexdigest()


@pytest.fixture(scope="session")
def served_hub() -> Iterator[Hub]:
    """One server for all tests; ``hub`` is how a test gets it, empty."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(served_hub: Hub) -> Iterator[Hub]:
    """The server, with nothing in it."""
    for name, value in vars(Hub(endpoint=served_hub.endpoint)).items():
        setattr(served_hub, name, value)
    yield served_hub
    served_hub.released.set()


class Child:
    """Runs ``resolve`` in another process: one for most calls, and fresh ones for settings read at import."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.cache = folder / "hf"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(self.cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": str(ROOT),
        }
        self._stderr = (folder / "stderr").open("w+")
        self._process = self._start([], self._stderr.fileno())

    def resolve(self, name: str, *, offline: bool = False, **env: str) -> dict[str, str]:
        """Return {"folder": ...} or {"error": class name, "message": text}; ``env`` is set for this call."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        print(json.dumps({"name": name, "offline": offline, "env": env}), file=stdin, flush=True)
        line = stdout.readline()
        assert line, f"resolve {name} ended with {self._process.wait()}:\n{self.stderr()}"
        answer: dict[str, str] = json.loads(line)
        return answer

    def command(self, name: str) -> list[str]:
        """The command line of a fresh process that resolves ``name``."""
        return [sys.executable, "-c", RESOLVE, json.dumps({"name": name, "offline": False, "env": {}})]

    def start(self, name: str, **env: str) -> subprocess.Popen[str]:
        """Start resolving ``name`` in a fresh process."""
        return self._start(self.command(name)[3:], subprocess.PIPE, **env)

    def _start(self, arguments: list[str], stderr: int, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", RESOLVE, *arguments],
            env=self.environment | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def stderr(self) -> str:
        """All that the shared process wrote to stderr."""
        self._stderr.seek(0)
        return self._stderr.read()

    def close(self) -> None:
        """End the shared process."""
        self._process.communicate()
        self._stderr.close()


@pytest.fixture(scope="session")
def shared_child(served_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """One process for all tests; ``child`` is how a test gets it, with an empty cache."""
    child = Child(tmp_path_factory.mktemp("child"), served_hub.endpoint)
    yield child
    child.close()


@pytest.fixture
def child(hub: Hub, shared_child: Child) -> Child:
    """A process that resolves names against ``hub``, with an empty cache."""
    shutil.rmtree(shared_child.cache, ignore_errors=True)
    return shared_child
