"""Chapter 4.7: each figure stands where the ledger says, on its side; commands are there; promises hold."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from book.course.manifest import ROOT
from tests.course.conftest import page_of
from tiny_llm import LLM, SamplingParams
from tiny_llm.ops.backend import use, works
from tiny_llm.planning.memory import plan_memory

pytestmark = pytest.mark.chapter("4.7")

SOURCES = {"README": ROOT / "README.md", "log": ROOT / "book" / "log.md"}
COSTS = "| what | how much | stands in | command |"
COMMANDS = "| | command |"
KEPT = "| claim | figure | command |"
PAGE = page_of("4.7")


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The experiment, which reads the page's tables."""
    monkeypatch.syspath_prepend(ROOT / "book" / "experiments")
    return importlib.import_module("ledger")


def place(stands_in: str) -> tuple[str, list[str]]:
    """The text around a place that the ledger names, and its lines with the words: rows of tables, if any."""
    name, words = stands_in.split(", ", 1)
    text = SOURCES[name].read_text(encoding="utf-8")
    found = [line for line in text.splitlines() if words.lower() in line.lower()]
    assert found, f"{name} has no line with {words!r}"
    return text, [line for line in found if line.startswith("|")] or found


def columns(text: str, row: str) -> list[str]:
    """The names of the columns of the table that has this row."""
    above = text[: text.index(row)]
    return [cell.strip() for cell in re.findall(r"^(\|.*)\n\|---", above, re.M)[-1].strip("|").split("|")]


def cell_of(text: str, row: str, who: str, machine: str) -> str:
    """What a row of the README says of somebody on a machine: AMX's columns are the last ones."""
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    names = columns(text, row)
    first = next((number for number, name in enumerate(names) if name.startswith("AMX")), len(names))
    apart = range(first, len(names)) if machine == "AMX" else range(first)
    return next(cells[number] for number in apart if names[number].removeprefix("AMX: ") == who)


def test_each_figure_stands_in_its_row_and_column(ledger: ModuleType) -> None:
    for claim in ledger.claims(PAGE):
        text, found = place(claim.stands_in)
        if claim.stands_in.startswith("log"):
            assert claim.machine in section(text, found[0]), f"{claim.what}: another machine"
            if found[0].startswith("|"):
                assert f"| {claim.ours} / {claim.theirs}, " in found[0], f"{claim.what}: not that pair"
            else:
                (prose,) = around(text, found)
                said = {*ledger.numbers(claim.ours), *ledger.numbers(claim.theirs)}
                assert said <= {*ledger.numbers(prose)}, f"{claim.what}: {prose}"
            continue
        (row,) = found
        ours = "our server" if claim.who == "llama-server" else "ours"
        for cell, who in ((claim.ours, ours), (claim.theirs, claim.who)):
            there = cell_of(text, row, who, claim.machine)
            parts = [part.strip() for part in there.split("/")]
            assert cell in parts, f"{claim.what}: {who} is {there} there, not {cell}"
            which = [
                ledger.numbers(claim.what)[0] in ledger.numbers(part) for part in row.split("|")[1].split("/")
            ]
            assert len(parts) == 1 or parts.index(cell) == which.index(True), f"{claim.what}: another part"


def around(text: str, found: list[str]) -> list[str]:
    """Lines, each with the one before and the one behind: prose goes on."""
    lines = text.splitlines()
    return [" ".join(lines[max(0, lines.index(line) - 1) : lines.index(line) + 2]) for line in found]


def section(text: str, line: str) -> str:
    """The part between two headings that has this line."""
    return next(part for part in re.split(r"^## ", text, flags=re.M) if line in part)


def test_each_cost_stands_in_its_place(ledger: ModuleType) -> None:
    costs = ledger.rows(PAGE, COSTS)
    assert len(costs) >= 6
    for what, figure, stands_in, _ in costs:
        _, (line,) = place(stands_in)
        there = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        said = any(ledger.numbers(figure)[0] in ledger.numbers(cell) for cell in there)
        assert said or figure in stands_in, f"{what}: {figure} is not said there"


def test_both_sides_are_told_and_counted(ledger: ModuleType) -> None:
    sides = [claim.quotient()[1] for claim in ledger.claims(PAGE)]
    assert [sides.count(side) for side in ("won", "lost", "neither")] == [18, 4, 2]
    assert "Eighteen are to our good and four are not" in PAGE and "Two are neither" in PAGE


def test_the_quotients_are_printed_and_drawn(ledger: ModuleType) -> None:
    claims = ledger.claims(PAGE)
    (told,) = re.findall(r"^```text\n(.*?)^```$", PAGE, re.S | re.M)
    assert told == ledger.table(claims) + "\n", f"copy this into the page:\n{ledger.table(claims)}"
    drawn = (ROOT / "book" / "docs" / "img" / "ledger.svg").read_text(encoding="utf-8")
    assert drawn == ledger.picture(claims), "draw it again: book/experiments/ledger.py --svg"


def commands(ledger: ModuleType) -> dict[str, str]:
    """Each command by its letter, and those of the last table."""
    named = {letter: re.findall(r"`([^`]+)`", cell)[0] for letter, cell in ledger.rows(PAGE, COMMANDS)}
    kept = [found[0] for *_, cell in ledger.rows(PAGE, KEPT) if (found := re.findall(r"`([^`]+)`", cell))]
    return named | {command: command for command in kept}


def test_each_line_has_its_command(ledger: ModuleType) -> None:
    asked = {claim.command for claim in ledger.claims(PAGE)} | {row[-1] for row in ledger.rows(PAGE, COSTS)}
    named = [letter for letter in commands(ledger) if len(letter) == 1]
    assert sorted(asked) == sorted(named), "a letter without a command, or a command that shows nothing"


@pytest.mark.slow
def test_each_command_is_there_and_knows_its_options(ledger: ModuleType) -> None:
    made = (ROOT / "Makefile").read_text(encoding="utf-8")
    helps = dict[str, str]()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    for command in commands(ledger).values():
        program, *words = command.split()
        if program == "make":
            assert re.search(rf"^{words[0]}:", made, re.M), command
            continue
        script = " ".join(words[: 2 if words[0] == "main.py" else 1])
        if script not in helps:
            line = [sys.executable, *script.split(), "--help"]
            done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            helps[script] = done.stdout
        unknown = [
            word for word in words if word.startswith("--") and not re.search(rf"{word}\b", helps[script])
        ]
        assert not unknown, f"{command}: {unknown}"
        files = [word for word in words[1:] if "/" in word and "://" not in word]
        assert all((ROOT / file).is_file() for file in files), command


def test_the_predictions_of_4_7(ledger: ModuleType) -> None:
    readme = SOURCES["README"].read_text(encoding="utf-8")
    assert "35 GB/s" in readme and f"35,000 / 278 = **{35_000 / 278:.0f}** tokens" in PAGE
    assert f"**{35_000 / 278 / 100:.2f} times**" in PAGE
    (row,) = place("README, 4 bits, int8 activations")[1]
    assert "82.1" in row and "97.2" in row and "97.2 %, the small one **82.1 %**" in PAGE


def test_what_is_said_of_figures_is_so() -> None:
    """Sentences around the tables."""
    readme, log = (SOURCES[name].read_text(encoding="utf-8") for name in ("README", "log"))
    assert "before weights were prefetched" in readme and "no GPU yet" in readme
    assert "Exact activations make 22 tokens of 77" in PAGE and "a prompt of 256 at 77 tokens a second" in log
    streams = [place(f"README, {number} streams")[1][0] for number in (8, 16)]
    assert "| 76 " in streams[0] and "| 77 " in streams[1] and "| 236 " in streams[1]


@pytest.mark.skipif(not works(), reason="the CPU kernels are not built: memory is another one without")
def test_what_serving_is_foretold_to_take() -> None:
    with use("cpu"):
        plans = [
            plan_memory("qwen2-0.5b", available=32 * 10**9, quantize=4, context=n) for n in (64, 1024, 4096)
        ]
    told = [plan.need.total / 1e6 for plan in plans]
    assert [f"{size:,.0f}" for size in told] == ["493", "851", "1,233"], told
    assert "493, 851, 1,233 MB" in PAGE and round(plans[0].need.weights / 1e6) == 278
    assert all(f"{size:,.0f}" in place("log, qwen2-0.5b | 64")[1][0] for size in told)


def test_an_answer_is_the_one_that_its_prompt_gets_alone(tmp_path: Path) -> None:
    prompts = ["What is 48 + 35?", "Tell me a story.", "What is a KV cache?"]
    with LLM() as llm:
        asked = SamplingParams(max_tokens=12)
        together = [answer.token_ids for answer in llm.generate(prompts, asked)]
    with LLM() as llm:
        alone = [llm.generate([prompt], asked)[0].token_ids for prompt in prompts]
    assert together == alone, "company changed an answer"
