"""What the environment says to the kernels: the instruction set and the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.instruction_sets import NAMES, SETS
from tiny_llm.ops import backend

pytestmark = pytest.mark.skipif(not backend.works(), reason="the CPU kernels are not built")
CODE = "import mlx.core, tiny_llm._cpu as c; print(c.isa(), c.num_threads())"


def settings(**environment: str) -> tuple[str, int, str]:
    """A new process's instruction set, its threads, and what it says on stderr."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TINY_LLM_CPU_ISA", "TINY_LLM_THREADS")}
    result = subprocess.run(
        [sys.executable, "-c", CODE], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    isa, threads = result.stdout.split()
    return isa, int(threads), result.stderr


def test_the_best_set_and_the_physical_cores_are_the_default() -> None:
    isa, threads, said = settings()
    assert isa == backend.cpu.best_isa() and said == ""
    assert 1 <= threads <= (os.cpu_count() or 1)
    assert settings(TINY_LLM_CPU_ISA="", TINY_LLM_THREADS="")[:2] == (isa, threads), "empty is unset"


@pytest.mark.parametrize("wanted", SETS)
def test_a_lower_set_can_be_forced(wanted: str) -> None:
    there = SETS.index(wanted) <= SETS.index(backend.cpu.best_isa())
    isa, _, said = settings(TINY_LLM_CPU_ISA=wanted)
    assert isa == (wanted if there else backend.cpu.best_isa())
    assert ("warning: TINY_LLM_CPU_ISA" in said) == (not there), said


def test_an_unknown_set_is_a_warning() -> None:
    isa, _, said = settings(TINY_LLM_CPU_ISA="sse9")
    assert isa == backend.cpu.best_isa()
    assert f"warning: TINY_LLM_CPU_ISA is 'sse9', expected {NAMES}, and one" in said


@pytest.mark.parametrize("wanted", ["1", "3", "1024"])
def test_threads_can_be_set(wanted: str) -> None:
    assert settings(TINY_LLM_THREADS=wanted)[1:] == (int(wanted), "")


@pytest.mark.parametrize("wanted", ["0", "-2", "two", "4x", "1025", "99999999999999999999"])
def test_threads_that_make_no_sense_are_a_warning(wanted: str) -> None:
    _, threads, said = settings(TINY_LLM_THREADS=wanted)
    assert threads == settings()[1]
    assert f"warning: TINY_LLM_THREADS is '{wanted}', expected 1 to 1024; using {threads}." in said


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_set_num_threads_refuses_nonsense(threads: int) -> None:
    before = backend.cpu.num_threads()
    with pytest.raises(ValueError, match=f"threads is {threads}, expected 1 to 1024"):
        backend.cpu.set_num_threads(threads)
    assert backend.cpu.num_threads() == before


def test_set_isa_refuses_what_is_not_there() -> None:
    before = backend.cpu.isa()
    with pytest.raises(ValueError, match=f"isa is 'sse9', expected {NAMES}, at most"):
        backend.cpu.set_isa("sse9")
    assert backend.cpu.isa() == before
