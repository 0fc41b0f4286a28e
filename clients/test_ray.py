"""deploy/ray_serve.py in Ray Serve: answers, refusals, streams; a replica that is killed is there again."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = ROOT / ".venv-ray/bin"
PATIENCE_S = 600.0  # on a busy machine Ray takes minutes to start
OPTIONS = ("model=demo", "least=2", "most=2", "cores=0.5", "kv_memory_mb=64")


def until(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.5)


def replicas() -> set[int]:
    """Ids of the processes that hold one."""
    told = subprocess.run(["ps", "axo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return {int(line.split()[0]) for line in told.splitlines() if re.search(r"\d+ ray::ServeReplica:", line)}


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with socket.socket() as bound:
        if bound.connect_ex(("127.0.0.1", 8000)) == 0:  # where serve run listens, whatever it is told
            pytest.skip("something listens on port 8000")
    home = tmp_path_factory.mktemp("ray")  # its token lies there
    own = {"PYTHONPATH": str(ROOT), "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**os.environ, **own, "PATH": f"{BIN}:{os.environ['PATH']}"}
    with (home / "log").open("w") as log:
        child = subprocess.Popen(
            [BIN / "serve", "run", "ray_serve:build", *OPTIONS],
            cwd=ROOT / "deploy",
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url="http://127.0.0.1:8000", timeout=60) as client:
            until(lambda: child.poll() is not None or is_ready(client), "Ray to serve")
            assert child.poll() is None, (home / "log").read_text("utf-8")[-3000:]
            yield client
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(60)
        finally:
            child.kill()


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_it_is_the_same_server(ray: httpx.Client, url: str) -> None:
    body = {"prompt": "A KV cache", "max_tokens": 16, "temperature": 0}
    texts = [
        client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        for client in (ray, httpx.Client(base_url=url, timeout=60))
    ]
    assert texts[0] == texts[1] and texts[0]
    lines = ray.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == texts[0]
    assert lines[-2] == "data: [DONE]"
    refused = ray.post("/v1/completions", json={**body, "nonsense": 1})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "nonsense"


def test_a_killed_replica_is_there_again(ray: httpx.Client) -> None:
    until(lambda: len(replicas()) == 2, "both replicas")
    before = replicas()
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(replicas() - {victim}) == 2, "another one")
    body = {"prompt": "Hi", "max_tokens": 2}
    until(lambda: ray.post("/v1/completions", json=body).status_code == 200, "an answer")
    assert [ray.post("/v1/completions", json=body).status_code for _ in range(20)] == [200] * 20
