"""The README's commands, run as they are printed, in a copy of what git keeps and without a network.

Those that need a network or minutes are listed here with the reason; of them, options and files are checked.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.test_repository import tracked

ROOT = Path(__file__).resolve().parents[1]
NOT_RUN: Mapping[str, str] = {
    "make run": "sets up an environment, from a network",
    "make test": "sets up an environment, from a network",
    "make course": "sets up an environment, from a network",
    "source .venv/bin/activate": "the environment is the one that runs the tests",
    "python main.py --model qwen2-1.5b": "a download",
    "python benchmarks/peers.py make": "environments of the peers, from a network",
    "python benchmarks/decode.py --context 16,512,4096": "minutes",
    "python benchmarks/prefill.py --context 512,4096": "minutes",
    "python main.py bench --model qwen2-0.5b --load-format dummy --quantize 4": "half a minute",
}
FAILS: Mapping[str, str] = {"python main.py course check 1.1": "still to be written"}
"""Commands that are to fail where they stand, and what they then say."""
ANSWERED_MS = 30_000


def blocks_of(page: str) -> list[list[str]]:
    """The commands of each ``sh`` block: without comments, a line that goes on made one."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.S | re.M)
    whole = [block.replace("\\\n", " ").splitlines() for block in blocks]
    return [[c for line in lines if (c := re.sub(r"(^|\s+)#.*", "", line).strip())] for lines in whole]


BLOCKS = blocks_of((ROOT / "README.md").read_text(encoding="utf-8"))
TO_RUN = [block for block in BLOCKS if set(block) - set(NOT_RUN)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fresh clone has, and the extension module that its set-up builds."""
    folder = tmp_path_factory.mktemp("clone")
    built = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tiny_llm").glob("_cpu*.so")]
    for name in [*tracked(ROOT), *built]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture
def surroundings(clone: Path) -> dict[str, str]:
    """An environment with this Python, an empty cache, and no way out."""
    nowhere = "http://127.0.0.1:9"
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("TINY_LLM_COURSE")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HOME": str(clone / ".cache"),
        "HTTPS_PROXY": nowhere,
        "HTTP_PROXY": nowhere,
        "NO_PROXY": "localhost,127.0.0.1",
        "COLUMNS": "200",
    }


def run(command: str, clone: Path, surroundings: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """``command`` by sh, with a question on its stdin."""
    asked = "What is 48 + 35?\n"
    return subprocess.run(
        ["sh", "-c", command],
        cwd=clone,
        env=surroundings,
        input=asked,
        capture_output=True,
        text=True,
        timeout=120,
    )


def wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(ANSWERED_MS // 50):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the server is not ready")


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """What is started here is ended after the test."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for server in started:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("block", TO_RUN, ids=[block[-1] for block in TO_RUN])
def test_commands_work_as_printed(
    block: list[str],
    clone: Path,
    surroundings: dict[str, str],
    servers: list[subprocess.Popen[bytes]],
) -> None:
    port = free_port()  # 8000 may be somebody's
    for command in (c.replace("8000", str(port)) for c in block if c not in NOT_RUN):
        if " serve " in command:
            servers.append(subprocess.Popen(["sh", "-c", f"exec {command}"], cwd=clone, env=surroundings))
            wait_until_ready(port, servers[-1])
            continue
        if shutil.which(command.split()[0]) is None:
            continue  # no curl here
        done = run(command, clone, surroundings)
        expected = FAILS.get(command)
        assert (done.returncode != 0) == bool(expected), f"{command}: {done.stderr}{done.stdout}"
        assert (expected or "") in done.stderr, f"{command}: {done.stderr}"
        assert '"error": {' not in done.stdout, f"{command}: {done.stdout}"


def test_the_library_s_example_runs(clone: Path, surroundings: dict[str, str]) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    tool = {"type": "function", "function": {"name": "multiply", "parameters": {"type": "object"}}}
    assert "tools=[...]" in example
    (clone / "example.py").write_text(example.replace("tools=[...]", f"tools=[{tool}]"))
    done = run("python example.py", clone, surroundings)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("command", NOT_RUN)
def test_what_is_not_run_is_there_all_the_same(
    command: str, clone: Path, surroundings: dict[str, str]
) -> None:
    assert any(command in block for block in BLOCKS), f"the README no longer says {command!r}"
    if command.startswith("make "):
        assert re.search(f"^{command.split()[1]}:", (clone / "Makefile").read_text(), re.M)
    elif command.startswith("python "):
        told = run(f"{command} --help", clone, surroundings)
        assert told.returncode == 0, told.stderr
        for option in re.findall(r"(?<= )--[\w-]+", command):
            assert option in told.stdout, f"{command}: there is no {option}"


def test_commands_are_read_from_a_page() -> None:
    page = "```sh\na b  # c\n# d\nx \\\n  -d '{}'\n```\n```python\ne\n```\n```text\n$ f\n```\n```sh\ng\n```\n"
    assert blocks_of(page) == [["a b", "x    -d '{}'"], ["g"]]
