"""Ranks as users start them, each a process: an answer, and what clients see when one dies or stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.conftest import Process, wait_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ASK = (
    "generate",
    "--prompt",
    "What is a KV cache?",
    "--max-tokens",
    "12",
    "--temperature",
    "1",
    "--seed",
    "3",
)
LONG = {"prompt": "Tell me a story.", "max_tokens": 900, "ignore_eos": True, "seed": 1}
PATIENCE_S = 240


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "main.py"), *arguments, "--threads", "1"]


def tokens(text: str) -> list[int]:
    found: list[int] = json.loads(text)["token_ids"]
    return found


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What one process answers."""
    done = subprocess.run(
        command(*ASK, "--json"), capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    return tokens(done.stdout)


def test_two_processes_answer_as_one(expected: list[int]) -> None:
    done = subprocess.run(
        command(*ASK, "--json", "--ranks", "2"),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert tokens(done.stdout) == expected
    assert done.stderr == "", "all leave in silence"


def test_a_rank_comes_from_elsewhere_and_another_secret_is_told(expected: list[int]) -> None:
    """By --rank-address and `follow`, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    started: list[subprocess.Popen[str]] = []

    def start(secret: str, *arguments: str) -> subprocess.Popen[str]:
        own = {**os.environ, "TINY_LLM_RANK_SECRET": secret}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command(*arguments), env=own, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    try:
        first = start("one", *ASK, "--json", "--ranks", "2", "--rank-address", place)
        stranger = start("another", "follow", "--leader", place)
        refused = stranger.communicate(timeout=PATIENCE_S)
        second = start("one", "follow", "--leader", place)
        told = first.communicate(timeout=PATIENCE_S)
        assert (*second.communicate(timeout=PATIENCE_S), second.returncode) == ("", "", 0)
    finally:
        for process in started:
            process.kill()
    assert first.returncode == 0 and tokens(told[0]) == expected, told[1]
    assert stranger.returncode == 2
    assert refused[1].startswith("error: Ranks cannot meet: It has another secret.")


@pytest.fixture
def server() -> Iterator[Process]:
    one = Process("--ranks", "2", "--rank-timeout", "3", "--threads", "1")
    yield one
    one.end()


def other_rank(server: Process) -> int:
    """The process that the server has started."""
    found = subprocess.run(
        ["pgrep", "-P", str(server._child.pid)], capture_output=True, text=True, check=True
    )
    (number,) = found.stdout.split()
    return int(number)


def has_left(process: int) -> bool:
    """Whether a process has ended; one that nobody has asked about since is a zombie."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return shown.stdout.strip()[:1] in ("", "Z")


@pytest.mark.parametrize(
    "number, said",
    [
        (signal.SIGKILL, "Rank 1 is gone"),
        (signal.SIGSTOP, "Rank 1 has not been heard of for"),
    ],
)
def test_clients_hear_that_a_rank_is_lost_and_the_server_leaves(
    server: Process, number: signal.Signals, said: str
) -> None:
    other = other_rank(server)
    with (
        server.http() as http,
        http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        whole = server.ask(LONG)
        wait_for(
            lambda: 'num_requests_running{model_name="demo"} 2.0' in http.get("/metrics").text, "both run"
        )
        os.kill(other, number)
        *_, fault, done = [line for line in lines if line]
        refused = b"".join(iter(lambda: whole.recv(65536), b"")).decode()  # head and body may come apart
    assert done == "data: [DONE]"
    problem = json.loads(fault.removeprefix("data: "))["error"]
    assert said in problem["message"] and (problem["type"], problem["code"]) == (
        "server_error",
        "engine_dead",
    )
    assert refused.startswith("HTTP/1.1 503") and said in refused
    assert server.wait() == 2
    assert server.rest_of_stderr().count("error: Rank 1") == 1
    wait_for(lambda: has_left(other), "nothing is left behind")


def test_when_rank_0_is_killed_the_others_leave(server: Process) -> None:
    other = other_rank(server)
    server.tell(signal.SIGKILL)
    wait_for(lambda: has_left(other), "nothing is left behind")


def test_mlx_launch_s_ring_answers_as_one(expected: list[int], tmp_path: Path) -> None:
    """With the environment that ``mlx.launch`` gives each."""
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{free.getsockname()[1]}"] for free in (one, other)]
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps(hosts))
    processes = [
        subprocess.Popen(
            command(*ASK, "--json"),
            env={**os.environ, "MLX_HOSTFILE": str(hostfile), "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=PATIENCE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], told
    assert tokens(told[0][0]) == expected and told[1][0] == ""
