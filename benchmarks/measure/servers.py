"""Servers to compare, each a process of its own on a free port: ours, llama-server, mlx_lm.server; smg.

Owns how each is started and when it is ready; what it is asked is no affair of this file.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure.environments import PeerMissing, python_of
from measure.http_load import Target
from measure.llama_server import binary_of

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "tiny_llm" / "demo"
PATIENCE_S = 120.0


class ServerError(RuntimeError):
    """A server did not start; the message has its last words."""


class Server:
    """A server that runs until ``close``; ready when this returns. ``ready`` is a path that then gives 200.

    Raises ServerError if it ends, or is not ready in time.
    """

    def __init__(
        self, name: str, model: str, command: Sequence[str | Path], port: int, ready: str, threads: int
    ) -> None:
        self.name = name
        self.target = Target(f"http://127.0.0.1:{port}", model)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "TINY_LLM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [*map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment,
            cwd=ROOT,
        )
        try:
            self._wait(ready)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def _wait(self, path: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ServerError(f"{self.name} ended ({self._process.returncode}): {self._tail()}")
            try:
                urllib.request.urlopen(self.target.url + path, timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise ServerError(f"{self.name} was not ready in {PATIENCE_S:.0f} s: {self._tail()}")

    def _tail(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return " / ".join(lines[-3:]) if lines else "it said nothing"

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def ours(model: Path, threads: int, *options: str) -> Server:
    """``main.py serve`` on a folder."""
    port = free_port()
    command = [sys.executable, ROOT / "main.py", "serve", "--model", model, "--port", port]
    # Random weights repeat themselves, which is easily guessed: that would measure something else.
    more = ["--name", "model", "--threads", threads, "--offline", "--speculate", "off"]
    return Server("tiny_llm", "model", [*map(str, command + more), *options], port, "/health", threads)


def llama_server(model: Path, slots: int, room: int, threads: int, folder: Path) -> Server:
    """llama.cpp's, with ``slots`` of ``room`` tokens each. Raises PeerMissing where it is not made."""
    port = free_port()
    command: list[object] = [binary_of(folder), "--model", model, "--port", port, "--parallel", slots]
    command += ["--ctx-size", slots * room, "--threads", threads, "--threads-batch", threads]
    command += ["--batch-size", 512, "--ubatch-size", 512, "--flash-attn", "off"]
    command += ["--no-webui", "--cache-ram", 0]
    return Server("llama-server", "model", [*map(str, command)], port, "/health", threads)


def mlx_lm_server(model: Path, threads: int, folder: Path) -> Server:
    """mlx-lm's. Raises PeerMissing where it is not made."""
    port = free_port()
    command = [python_of("mlx-lm", folder), "-m", "mlx_lm", "server", "--model", model, "--port", port]
    return Server("mlx_lm.server", str(model), [*map(str, command)], port, "/v1/models", threads)


def smg(urls: Sequence[str], policy: str, *options: str) -> Server:
    """The gateway smg before servers of ours. Raises PeerMissing where it is not installed."""
    program, port = Path(sys.executable).with_name("smg"), free_port()
    if not program.exists():
        raise PeerMissing("smg is not installed: the extra `test` has it.")
    command: list[object] = [program, "launch", "--host", "127.0.0.1", "--port", port, "--policy", policy]
    # Else it shows its figures to the whole network, and looks for servers every 30 s.
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", free_port()]
    command += ["--worker-startup-check-interval", 1, *options, "--worker-urls", *urls]
    server = Server("smg", "demo", [*map(str, command)], port, "/workers", threads=1)
    end = time.monotonic() + PATIENCE_S
    while sum(one["is_healthy"] for one in workers(server.target.url)) < len(urls):
        if time.monotonic() > end:
            server.close()
            raise ServerError(f"smg did not find {' and '.join(urls)} in {PATIENCE_S:.0f} s.")
        time.sleep(0.1)
    return server


def workers(gateway: str) -> list[dict[str, Any]]:
    """What smg knows of each server: ``is_healthy``, and ``load``, requests that it has sent there."""
    with urllib.request.urlopen(gateway + "/workers", timeout=5) as answer:
        known: list[dict[str, Any]] = json.load(answer)["workers"]
    return known


class EngineAlone:
    """Our engine without HTTP, in a process of its own: workers/engine_alone.py."""

    name = "engine alone"

    def __init__(self, model: Path, threads: int) -> None:
        command = [sys.executable, Path(__file__).parents[1] / "workers" / "engine_alone.py", model]
        environment = os.environ | {"TINY_LLM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def run(self, plan: dict[str, object]) -> dict[str, object]:
        """One run; what is asked and answered is told in the worker. Raises ServerError if it ends."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(plan) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ServerError(f"the engine ended ({self._process.wait()})")
        answer: dict[str, object] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
