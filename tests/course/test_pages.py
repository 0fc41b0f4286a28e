"""Pages and code stay together: blocks run, tables are what the experiments print, answers are computed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from book.course.manifest import ROOT, Chapter, read_manifest
from tiny_llm.ops.attention import attention_ref

BOOK = ROOT / "book"
CHAPTERS = list(read_manifest().values())
PAGES = sorted((BOOK / "docs").rglob("*.md"))
SECTIONS = [
    "The goal",
    "Predict first",
    "Tasks",
    "Check",
    "Break it",
    "Measure it",
    "Questions",
    "In production",
]
TO_READ = ["The goal", "Predict first", "The ledger", "Check", "Questions", "In production"]
COMMANDS = ("list", "next", "start", "check", "hint", "diff", "solution", "break")
each_chapter = pytest.mark.parametrize("it", CHAPTERS, ids=lambda it: it.id)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def text_of(it: Chapter) -> str:
    """A chapter's page."""
    return (BOOK / "docs" / it.page).read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Each code block's language and content."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)


def python(*arguments: str) -> str:
    """What a script prints, in the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@each_chapter
def test_a_page_follows_the_template(it: Chapter) -> None:
    text = text_of(it)
    assert text.startswith(f"# {it.id} {it.title}\n\n*{it.minutes} minutes.")
    found = re.findall(r"^## (.+)$", text, re.M)
    assert found == (SECTIONS if it.teaches else TO_READ), "the template's sections, in its order"
    words = len(re.findall(r"[\w'-]+", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)))
    assert 1200 <= words <= 1800, f"{words} words"
    assert text.count('??? note "') >= 4, "answers to the prediction and to three questions, folded"
    assert all(definition.partition(":")[2] in text for definition in it.teaches)


@each_page
def test_pictures_are_there_and_say_what_they_show(page: Path) -> None:
    for words, target in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert words and (page.parent / target).is_file(), target


@each_page
def test_a_page_speaks_of_chapters_that_there_are(page: Path) -> None:
    named = re.findall(r"\bchapters? (\d\.\d+)", page.read_text(encoding="utf-8"), re.I)
    assert set(named) <= set(read_manifest()), "a chapter that is not written is spoken of by its week"


@each_page
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    found = list(blocks(page.read_text(encoding="utf-8")))
    known = {"python", "sh", "text", "mermaid", "cpp", "toml"}
    assert {language for language, _ in found} <= known, "each block says what it is"
    tomllib.loads("\n".join(code for language, code in found if language == "toml"))
    script = tmp_path / "page.py"
    script.write_text("\n".join(code for language, code in found if language == "python"))
    python(str(script))


@each_page
def test_commands_exist(page: Path) -> None:
    chapters = read_manifest()
    shell = [code for kind, code in blocks(page.read_text(encoding="utf-8")) if kind == "sh"]
    for line in "".join(shell).splitlines():
        words = line.removeprefix("TINY_LLM_COURSE=my_llm ").partition("#")[0].split()
        if words[:3] == ["python", "main.py", "course"]:
            assert words[3] in COMMANDS and (len(words) < 5 or words[4] in {"--all", *chapters}), line
            it = chapters[words[4]] if len(words) > 5 else None
            known = (
                {m.name for m in it.mutants} if it and words[3] == "break" else set(it.hints if it else ())
            )
            assert it is None or words[5] in {"--code", *known}, line
        elif words[:3] == ["python", "main.py", "--course"]:
            known = {f".cache/course/{it.id}-{m.name}" for it in CHAPTERS for m in it.mutants}
            assert words[3] in {"my_llm", *known}, line
        elif words[0] == "python":
            assert words[1] == "main.py" or (ROOT / words[1]).is_file(), line
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
        else:
            others = page.parent.name == "appendix"  # which tells of programs that stand beside this one
            assert others or line in ("source .venv/bin/activate",), line


def close(got: str, expected: str) -> bool:
    """The same text, and numbers that differ by at most 0.2: another machine rounds otherwise."""
    number = r"\d+\.\d+"
    same = re.sub(number, "", got) == re.sub(number, "", expected)
    pairs = zip(re.findall(number, got), re.findall(number, expected), strict=True) if same else []
    return same and all(abs(float(a) - float(b)) <= 0.2 for a, b in pairs)


def test_the_experiment_of_1_1_prints_what_the_page_shows(tmp_path: Path) -> None:
    drawn = tmp_path / "attention.svg"
    printed = python("book/experiments/attention.py", "--svg", str(drawn))
    tables = [code for language, code in blocks(text_of(read_manifest()["1.1"])) if language == "text"]
    assert len(tables) == 1 and close(printed, tables[0]), f"copy this into the page:\n{printed}"
    svg = (BOOK / "docs" / "img" / "attention.svg").read_text(encoding="utf-8")
    assert close(drawn.read_text(encoding="utf-8"), svg), "draw it again: book/experiments/attention.py --svg"


def test_the_predictions_of_1_1() -> None:
    text = text_of(read_manifest()["1.1"])
    scores = mx.matmul(mx.zeros((12, 1000, 64)), mx.zeros((12, 64, 1000)))
    assert f"**{scores.nbytes // 10**6} MB**" in text
    q, k = mx.random.normal((2, 100_000, 64), key=mx.random.key(0))
    deviation = mx.std(mx.sum(q * k, axis=-1)).item()
    assert f"standard deviation is **{deviation:.0f}**" in text


def test_what_1_1_says_of_the_first_token() -> None:
    q, k, v = mx.random.normal((3, 4, 2, 8), key=mx.random.key(0))
    assert mx.allclose(attention_ref(q, k, v, scale=0.3, offset=0)[0], v[0]).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "said"),
    [
        ("not-scaled", "The password of the pimbro."),
        ("sees-the-future", "The password of the red door is zimbro."),
        ("no-largest-subtracted", "The password of the red door is zimbro."),
        ("heads-mixed", None),
    ],
)
def test_the_symptoms_of_1_1_are_as_told(run, book, mutant: str, said: str | None) -> None:
    book.add_mutant(next(m for m in read_manifest()["1.1"].mutants if m.name == mutant))
    asked = "The password of the red door is zimbro. Which password opens the red door?"
    told = run("main.py", "generate", "--prompt", asked, "--max-tokens", "24", "--course", book.folder).stdout
    assert told.strip() == said if said else "zimbro" not in told


def test_the_way_of_a_request_is_as_drawn(tmp_path: Path) -> None:
    drawn = tmp_path / "request.svg"
    printed = python("book/experiments/request.py", "--svg", str(drawn))
    page = (BOOK / "docs" / "request.md").read_text(encoding="utf-8")
    assert f"```text\n{printed}```" in page, "make book-experiments"
    assert drawn.read_text(encoding="utf-8") == (BOOK / "docs" / "img" / "request.svg").read_text(
        encoding="utf-8"
    )
