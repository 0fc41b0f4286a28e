"""What keeps every chapter honest: its tests pass on the reference, and see each stub and each mistake."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from book.course.check import quick_runs, run_tests
from book.course.manifest import ROOT, Chapter, Mutant, read_manifest
from book.course.merge import STUB
from book.course.workbook import Workbook, in_parts, module_file

pytestmark = pytest.mark.slow

ALL = list(read_manifest().values())
CHAPTERS = [it for it in ALL if it.teaches]
TAUGHT = [(it, definition) for it in CHAPTERS for definition in it.teaches]
MUTANTS = [(it, mutant) for it in CHAPTERS for mutant in it.mutants]

Tested = Callable[..., subprocess.CompletedProcess[str]]
Run = Tested


@pytest.fixture(scope="module")
def tested() -> Iterator[Tested]:
    """``tested(it, folder)``: the chapter's tests, in a process of their own, forked where forks are safe."""
    with quick_runs() as forks:
        yield lambda it, folder, **options: run_tests([it], folder, forks=forks, **options)


@pytest.mark.parametrize("it", CHAPTERS, ids=lambda it: it.id)
def test_filled_from_the_reference_it_is_green(book: Workbook, tested: Tested, it: Chapter) -> None:
    new, _ = book.start(it)
    assert book.stubs(it) == new == list(it.teaches), "start leaves stubs, and check refuses"
    shutil.rmtree(book.folder)
    book.fill(it.teaches)
    assert book.stubs(it) == [] and sorted(book.written()) == sorted(it.teaches)
    done = tested(it, book.folder)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("it", "definition"), TAUGHT, ids=[f"{it.id}-{d}" for it, d in TAUGHT])
def test_a_stub_turns_its_chapter_red(book: Workbook, tested: Tested, it: Chapter, definition: str) -> None:
    book.start(replace(it, teaches=[definition]))
    path = module_file(book.folder, in_parts(definition)[0])
    path.write_text(path.read_text().replace(STUB, "not written ("))  # a marked stub is the reference's
    done = tested(it, book.folder, first_only=True)
    assert done.returncode == 1, f"{definition} could be missing:\n{done.stdout}"


@pytest.mark.parametrize(("it", "mutant"), MUTANTS, ids=[f"{it.id}-{m.name}" for it, m in MUTANTS])
def test_a_mistake_is_caught(book: Workbook, tested: Tested, it: Chapter, mutant: Mutant) -> None:
    book.add_mutant(mutant)
    done = tested(it, book.folder, first_only=True)
    assert done.returncode == 1, f"{mutant.name} passes:\n{done.stdout}"


def test_all_chapters_together_are_green(book: Workbook, run: Run) -> None:
    """What one chapter has a learner write does not run in the tests of another."""
    book.fill(dict.fromkeys(definition for it in CHAPTERS for definition in it.teaches))
    done = run("main.py", "course", "check", "--all", "--folder", book.folder)
    assert done.returncode == 0, done.stdout
    assert f"{len([it for it in CHAPTERS if it.teaches])} chapters are done." in done.stdout


@pytest.mark.parametrize(
    ("number", "mistake", "kernel"),
    [
        ("1.1", "heads-mixed", "attention"),
        ("1.3", "key-head-modulo", "attention"),
        ("1.4", "sigmoid-for-silu", "swiglu"),
    ],
)
def test_right_cpp_hides_no_mistake_in_python(
    book: Workbook, tested: Tested, number: str, mistake: str, kernel: str
) -> None:
    it = read_manifest()[number]
    book.fill([part for _, part in TAUGHT if part.startswith(f"kernels/cpu/{kernel}.cpp")])
    book.add_mutant(next(mutant for mutant in it.mutants if mutant.name == mistake))
    assert tested(it, book.folder, first_only=True).returncode == 1


def test_cpp_runs_where_python_is_written_too(book: Workbook, run: Run) -> None:
    """With what the page has a learner break: the one is seen to run, the other not."""
    book.fill(["tiny_llm.ops.swiglu:swiglu_ref"])
    book.add_mutant(next(it for it in read_manifest()["2.7"].mutants if it.name == "silu-of-up"))
    code = (
        "import mlx.core as mx; from tiny_llm.ops.swiglu import swiglu;"
        "print(swiglu(mx.array([[2.0] * 37]), mx.array([[1.0] * 37]))[0, 0].item())"
    )
    right, wrong = run("-c", code), run("-c", code, TINY_LLM_COURSE=book.folder)
    assert float(right.stdout) == pytest.approx(2 / (1 + math.exp(-2)))
    assert float(wrong.stdout) == pytest.approx(2 / (1 + math.exp(-1))), wrong.stderr


def test_the_bundled_model_chats_by_what_1_1_asks_for(book: Workbook, run) -> None:
    """The page's own way, with copied key heads: not the reference's, and no more than 1.1 tells."""
    book.start(read_manifest()["1.1"])
    path = book.folder / "ops" / "attention.py"
    lines = (
        "T, H, D = q.shape",
        "S, K, _ = k.shape",
        "k, v = (mx.repeat(x, H // K, axis=1) for x in (k, v))",
        "scores = mx.matmul(q.transpose(1, 0, 2), k.transpose(1, 2, 0)) * scale",
        "weights = softmax(scores + causal_mask(T, S, offset=offset))",
        "return mx.matmul(weights, v.transpose(1, 0, 2)).transpose(1, 0, 2)",
    )
    stub = 'raise NotImplementedError("' + f'{STUB} 1.1)")'
    path.write_text(path.read_text().replace(stub, "\n    ".join(lines)))
    asked = "The password of the red door is zimbro. Which password opens the red door?"
    told = run("main.py", "generate", "--prompt", asked, "--max-tokens", "24", "--course", book.folder)
    assert told.stdout.strip() == "The password of the red door is zimbro.", told.stderr


def test_each_chapter_has_mistakes_and_hints() -> None:
    for it in CHAPTERS:
        assert len(it.mutants) >= 10 and len({m.name for m in it.mutants}) == len(it.mutants), it.id
        assert list(it.hints) == [in_parts(definition)[1] for definition in it.teaches], it.id
        assert all(it.hints.values()) and set(it.needs) <= {other.id for other in CHAPTERS}, it.id
    for it in ALL:
        assert it.tests, f"{it.id}: a chapter to read has tests, too"
        assert it.teaches or not (it.mutants or it.hints), it.id


def test_no_skeleton_is_committed() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what is tracked is unknown")
    mark = "NotImplementedError(" + '"TODO(course'
    found = subprocess.run(["git", "grep", "-lF", mark], cwd=ROOT, capture_output=True, text=True)
    assert set(found.stdout.split()) <= {"tests/course/test_commands.py", "tests/course/test_merge.py"}
