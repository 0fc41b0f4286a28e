"""The benchmarks' helpers: workers and what they say, rounds, the quiet machine, peers that are missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from measure import environments
from measure.ceiling import KINDS, Ceilings
from measure.comparison import Answer, ask_all, shared_cores, trials
from measure.environments import Peer, PeerMissing, make, python_of
from measure.machine import Watch, warning
from measure.sides import OURS, Sides, numbers
from measure.worker import WORKERS, Worker, WorkerError

from tiny_llm.planning.rounds import Rate

ENGINE = """
import sys
sys.path.insert(0, {workers!r})
from protocol import serve
class Engine:
    settings = ("fast", "slow")
    def __init__(self, shape, config, threads, folder):
        if shape == "impossible":
            raise ValueError("no such shape")
        self.about = {{"version": "1", "weight_bytes": 1000, "given": [shape, config, threads, folder]}}
    def open(self, rows, room):
        print("noise that is no answer")
        self.rows = rows
    def prefill(self, setting, tokens):
        return tokens * (1.0 if setting == "fast" else 2.0)
    def decode(self, setting, context, steps):
        if context == 13:
            sys.exit(3)
        return float(context + steps * self.rows)
serve(Engine)
"""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Worker]:
    """A worker whose engine answers with sums of what it is asked."""
    file = tmp_path / "engine.py"
    file.write_text(ENGINE.format(workers=str(WORKERS)))
    with closing(Worker(OURS, [sys.executable, file], threads=2)) as worker:
        yield worker


def test_a_worker_answers_and_its_prints_are_no_answers(engine: Worker) -> None:
    engine.load("a-shape", {"hidden_size": 8}, Path("there"))
    engine.open(rows=3, room=64)
    assert engine.settings == ("fast", "slow")
    assert engine.about["given"] == ["a-shape", {"hidden_size": 8}, 2, "there"]
    assert engine.prefill("slow", 512) == 1024.0
    assert engine.decode("fast", context=100, steps=4) == 112.0


def test_a_worker_that_refuses_or_dies_says_why(engine: Worker) -> None:
    with pytest.raises(WorkerError, match="tiny_llm failed to load: ValueError: no such shape"):
        engine.load("impossible", {}, Path("there"))
    with pytest.raises(WorkerError, match="failed to prefill: AssertionError: load comes first"):
        engine.prefill("fast", 1)
    engine.load("a-shape", {}, Path("there"))
    engine.open(rows=1, room=64)
    with pytest.raises(WorkerError, match=r"tiny_llm ended \(3\) when asked to decode: .*noise"):
        engine.decode("fast", context=13, steps=1)


def test_a_side_that_fails_is_lost_and_the_others_go_on(
    engine: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Worker("peer", [sys.executable, tmp_path / "engine.py"], threads=2)) as peer:
        sides = Sides(2, [engine, peer])
        for worker in sides.ready:
            worker.load("a-shape", {}, tmp_path)
        sides.open(1, 64)
        asked = trials(
            sides, lambda _: 4, lambda w, way: w.decode(way, 13 if w.name == "peer" else 6, 4), "decode"
        )
    assert [trial.key for trial in asked] == [(OURS, "fast", "decode"), (OURS, "slow", "decode")]
    assert "peer ended (3)" in sides.missing["peer"] and "peer is missing" in capsys.readouterr().err


def test_an_answer_compares_with_each_setting_and_with_the_better_one(engine: Worker) -> None:
    engine.load("a-shape", {}, Path("there"))
    engine.open(1, 64)
    answer = ask_all(Sides(2, [engine]), lambda _: 8, lambda w, way: w.prefill(way, 8), 2, None)
    assert answer.best(OURS) == 1.0 and answer.ratios == {} and answer.read_gb_s is None
    peers = {("peer", "one"): Rate(0.5, 0.4, 0.6), ("peer", "two"): Rate(0.25, 0.2, 0.3)}
    both = Answer({**answer.rates, **peers}, 2, None, None, None)
    assert both.ratios == {"peer": 2.0, "peer, one": 2.0, "peer, two": 4.0}


def test_a_watch_tells_our_own_time_from_others() -> None:
    watch = Watch([])
    if watch.foreign_share() is None:
        pytest.skip("no /proc here, so nothing is known of other processes")
    spin = "import time; end = time.monotonic() + 0.6\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as other:
        watch, known = Watch([]), Watch([other.pid])
        time.sleep(0.4)
        as_foreign, as_own = watch.foreign_share(), known.foreign_share()
    assert as_foreign is not None and as_own is not None
    assert as_foreign > as_own, "a process that spins was not seen, or not known as ours"
    assert "took 20% of this machine" in warning(0.2, "meanwhile")
    assert warning(0.01, "meanwhile") == warning(None, "meanwhile") == ""


def test_two_threads_on_one_core_are_said() -> None:
    assert "2 threads were given 1.0 cores" in shared_cores(1.0, 2)
    assert shared_cores(1.95, 2) == shared_cores(None, 2) == ""


def test_numbers_are_read_from_commas_and_checked() -> None:
    assert numbers("1,2,16") == (1, 2, 16)
    for wrong in ("0", "1,-2", "x", ""):
        with pytest.raises(ValueError):
            numbers(wrong)


def test_a_peer_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(PeerMissing, match=r"not made yet; run: python benchmarks/peers\.py make torch"):
        python_of("torch", tmp_path)
    with pytest.raises(
        PeerMissing, match="no peer 'vllm'; there are llamacpp, ik_llama, openvino, torch, mlx-lm"
    ):
        python_of("vllm", tmp_path)


@pytest.mark.slow
def test_a_peer_is_made_once_and_again_when_its_recipe_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Peer("x.py", ("pip",))  # there already: no network is needed
    monkeypatch.setattr(environments, "PEERS", {"good": good})
    made = make("good", tmp_path)
    assert made == python_of("good", tmp_path)
    said = subprocess.run([made, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True)
    assert Path(said.stdout.strip()) == (tmp_path / "good").resolve()
    monkeypatch.setattr(environments, "PEERS", {"good": Peer("x.py", ("pip",), variables={"A": "1"})})
    with pytest.raises(PeerMissing, match="made of other versions"):
        python_of("good", tmp_path)


def test_a_peer_that_cannot_be_made_is_reported_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ensurepip is not available\nexit 1\n")  # Debian without python3-venv
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    for what in (make, python_of):
        with pytest.raises(PeerMissing, match=r"could not be made \(ensurepip is not available\)"):
            what("torch", tmp_path)
    assert "ensurepip" in (tmp_path / "torch.log").read_text()


def test_peers_are_built_within_cores_and_memory_and_by_clang_for_amx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler took a gigabyte, and ninja began as many as it liked; by g++ 12 llama.cpp crashed on AMX."""
    for name, flags in (("clang-18", ""), ("cpuinfo", "flags : avx512_vnni amx_int8")):
        (tmp_path / name).write_text(flags)
    (tmp_path / "clang-18").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CMAKE_BUILD_PARALLEL_LEVEL", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for available, compilers in ((3 * 10**9, "3"), (10**8, "1"), (10**12, "64")):
        monkeypatch.setattr(environments, "available_memory_bytes", lambda most=available: most)
        assert environments.compiler()["CMAKE_BUILD_PARALLEL_LEVEL"] == compilers
    monkeypatch.setattr(environments, "_CPUS", tmp_path / "cpuinfo")
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "5")
    clang = {"CC": "clang-18", "CXX": "clang++-18"}
    assert environments.compiler() == {"CMAKE_BUILD_PARALLEL_LEVEL": "5", **clang}


def test_what_a_peer_is_built_with_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ik_llama.cpp's source lacked a script, and no build of it had ended."""
    ran: list[dict[str, str]] = []
    monkeypatch.setattr(environments, "_run", lambda command, log, variables: ran.append({**variables}))
    make("ik_llama", tmp_path)
    (path,) = re.findall(r"CMAKE_PROJECT_INCLUDE=(\S+)", ran[-1]["CMAKE_ARGS"])
    assert Path(path).is_file(), path


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
def test_ceilings_are_measured_by_a_program_made_here() -> None:
    with closing(Ceilings()) as ceilings:
        rates = {kind: ceilings.rate(kind, 1) for kind in KINDS}
    assert rates["read"] > 0 and rates["fma"] > 0 and rates["int8"] >= 0, rates


@pytest.mark.slow
@pytest.mark.parametrize("script", ["decode.py", "prefill.py", "busy.py", "scaling.py"])
def test_a_benchmark_without_its_peers_ends_in_one_json_line(script: str, tmp_path: Path) -> None:
    options = ["--peers-only", "--against", "torch", "--folder", tmp_path]
    command = [sys.executable, WORKERS.parent / script, *options]
    environment = os.environ | {"PYTHONPATH": str(WORKERS.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["benchmark"] == script.removesuffix(".py")
    assert report["missing"] == {"torch": "not made yet; run: python benchmarks/peers.py make torch"}
    assert "torch is missing" in done.stderr
