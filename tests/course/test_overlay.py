"""The finder, in processes of its own: what is swapped in, when it must refuse, what children inherit."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from book.course.manifest import ROOT
from book.course.workbook import Workbook

OWN = "import mlx.core as mx\n\n\ndef softmax_ref(x):\n    return mx.zeros_like(x) + 42\n"
SHOW = "import mlx.core as mx; from tiny_llm.ops.softmax import softmax; print(softmax(mx.zeros(1)).item())"


@pytest.fixture
def mine(book: Workbook) -> Path:
    """A folder with a softmax that is seen to be wrong."""
    (book.folder / "ops").mkdir(parents=True)
    (book.folder / "ops" / "softmax.py").write_text(OWN)
    return book.folder


def test_own_code_runs_and_leaves_no_trace(run, mine: Path) -> None:
    assert run("-c", SHOW, TINY_LLM_COURSE=mine).stdout.strip() == "42.0"
    assert run("-c", SHOW).stdout.strip() == "1.0", "the cache of compiled files holds the learner's code"


def test_children_inherit_it(run, mine: Path) -> None:
    child = f"import subprocess, sys, tiny_llm; subprocess.run([sys.executable, '-c', {SHOW!r}])"
    assert run("-c", child, TINY_LLM_COURSE=mine).stdout.strip() == "42.0"


def test_one_definition_can_be_left_out(run, mine: Path) -> None:
    without = "tiny_llm.ops.softmax:softmax_ref"
    assert run("-c", SHOW, TINY_LLM_COURSE=mine, TINY_LLM_COURSE_WITHOUT=without).stdout.strip() == "1.0"


def test_too_late_is_an_error(run, mine: Path) -> None:
    late = "import tiny_llm.data; from book.course.overlay import install; install('.')"
    assert "must be set before tiny_llm is imported" in run("-c", late).stderr


def test_no_folder_is_an_error(run, tmp_path: Path) -> None:
    assert "which is no folder" in run("-c", "import tiny_llm", TINY_LLM_COURSE=tmp_path / "none").stderr


@pytest.mark.slow
def test_a_learner_chats_with_their_own_code(run, mine: Path) -> None:
    said = ["--prompt", "What is 48 + 35?", "--max-tokens", "12"]
    ours = run("main.py", "generate", *said)
    theirs = run("main.py", "generate", *said, "--course", mine)
    assert "83" in ours.stdout
    assert theirs.returncode == 0 and theirs.stdout != ours.stdout, theirs.stderr


def test_what_memory_counts_does_not_depend_on_whose_code_counts_it(run, mine: Path) -> None:
    asked = ("memory", "--model", "llama-3-8b", "--quantize", "4", "--memory", "16GB", "--json")
    ours, theirs = run("main.py", *asked), run("main.py", *asked, "--course", mine)
    assert ours.returncode == 0 and theirs.stdout == ours.stdout, theirs.stderr


def test_course_without_a_folder_says_what_to_do(run) -> None:
    done = run("main.py", "--course", "nowhere")
    assert done.returncode == 2 and "course start 1.1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "learner", "said"),
    [
        (("-m", "tiny_llm", "course", "list"), "", "error: The course needs a checkout of tiny_llm"),
        (("-m", "tiny_llm", "--course", "."), "", "error: The course needs a checkout of tiny_llm"),
        (("-c", "import tiny_llm"), ".", "ImportError: TINY_LLM_COURSE is set, but"),
    ],
    ids=["command", "option", "variable"],
)
def test_an_installed_package_says_that_the_course_needs_a_checkout(
    arguments: tuple[str, ...], learner: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "tiny_llm").symlink_to(ROOT / "tiny_llm")
    # -S: without site, what is installed is there, and no editable checkout.
    path = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])
    environment = {**os.environ, "PYTHONPATH": path, "TINY_LLM_COURSE": learner}
    command = [sys.executable, "-S", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode and done.stderr.strip().splitlines()[-1].startswith(said), done.stderr
