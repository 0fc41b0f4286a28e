"""Twenty small tasks, judged by their outcome: files and answers, not by what was said on the way.

The model is a function of what it has seen, so that it solves a task by the actions and not by heart. Each
check is tried on a model that does nothing, too. With a real model the same tasks are run by
``agent TASK -w FOLDER --allow "python3 test.py" --approve always``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Speaks = Callable[[Any], Any]
Check = Callable[[Path, str], bool]
TEST = "python3 test.py"


@dataclass(frozen=True)
class Task:
    """``files`` are there at the start; ``check`` looks at the folder and the answer at the end."""

    name: str
    asked: str
    files: Mapping[str, str]
    speaks: Speaks
    check: Check
    allow: list[str] = field(default_factory=list)


def read(path: str, first: int = 1, last: int = 200) -> Any:
    return "read", {"path": path, "first": first, "last": last}


def search(text: str) -> Any:
    return "search", {"text": text}


def compute(expression: str) -> Any:
    return "calculator", {"expression": expression}


def edit(path: str, old: str, new: str) -> Any:
    return "edit", {"path": path, "old": old, "new": new}


def run(command: str = TEST) -> Any:
    return "run", {"command": command, "arguments": []}


def shown(history: Any, step: int = -1) -> str:
    return str(history.steps[step].shown)


def found(history: Any, pattern: str, step: int = -1) -> str:
    return re.search(pattern, shown(history, step), re.M)[1]  # type: ignore[index]


def script(*turns: Any) -> Speaks:
    """One turn after the other; one that is a function is asked for what it says."""

    def speaks(history: Any) -> Any:
        turn = turns[len(history.steps)]
        return turn(history) if callable(turn) else turn

    return speaks


def numbers(history: Any, pattern: str = r"^\w+,(\d+)$") -> list[str]:
    return re.findall(pattern, shown(history), re.M)


def answers(value: str) -> Check:
    return lambda _, answer: value in re.findall(r"[\w.]+", answer)


def holds(name: str, *texts: str) -> Check:
    return lambda root, _: all(text in (root / name).read_text() for text in texts)


SALES = "name,count\nnuts,17\nbolts,25\ngears,8\n"
BROKEN = {
    "mean.py": "def mean(xs):\n    return sum(xs) / (len(xs) + 1)\n",
    "test.py": "from mean import mean\nassert mean([2, 4]) == 3, mean([2, 4])\nprint('passed')\n",
}
LONG = "\n".join(f"{n:05d} {'ERROR disk sda7' if n == 3210 else 'ok'}" for n in range(6000))


def passes(root: Path, _: str) -> bool:
    """Held out: other numbers than the test has, in a fresh namespace."""
    names: dict[str, Any] = {}
    exec((root / "mean.py").read_text(), names)  # our own scripted edit
    return bool(names["mean"]([1, 2, 3, 6]) == 3)


def compiles(root: Path, _: str) -> bool:
    compile((root / "a.py").read_text(), "a.py", "exec")
    return True


TASKS = [
    Task(
        "find a value",
        "Which port does the server use?",
        {"conf/server.toml": "[net]\nport = 8123\n", "readme": "none"},
        script(search("port"), lambda h: "It is " + found(h, r"port = (\d+)")),
        answers("8123"),
    ),
    Task(
        "find a definition",
        "In which file is the function area?",
        {"a.py": "area = 1", "geo/shape.py": "def area(r):\n    return r\n"},
        script(search("def area"), lambda h: found(h, r"^(\S+?):")),
        lambda _, answer: "geo/shape.py" in answer,
    ),
    Task(
        "count lines",
        "How many lines has list.txt?",
        {"list.txt": "\n".join("abcdefg")},
        script(read("list.txt"), lambda h: found(h, r"of (\d+)\]")),
        answers("7"),
    ),
    Task(
        "fix a test by one line",
        "Make the test pass.",
        BROKEN,
        script(run(), read("mean.py"), edit("mean.py", "(len(xs) + 1)", "len(xs)"), run(), "It passes."),
        passes,
        [TEST],
    ),
    Task(
        "sum a column",
        "What is the sum of count in sales.csv?",
        {"sales.csv": SALES},
        script(read("sales.csv"), lambda h: compute(f"sum([{', '.join(numbers(h))}])"), shown),
        answers("50"),
    ),
    Task(
        "average a column",
        "What is the mean of count in sales.csv, to two places?",
        {"sales.csv": SALES},
        script(read("sales.csv"), lambda h: compute(f"round(({'+'.join(numbers(h))}) / 3, 2)"), shown),
        answers("16.67"),
    ),
    Task(
        "the largest of a column",
        "What is the largest count in sales.csv?",
        {"sales.csv": SALES},
        script(read("sales.csv"), lambda h: compute(f"max({','.join(numbers(h))})"), shown),
        answers("25"),
    ),
    Task(
        "a price",
        "What do 12 gears cost?",
        {"prices.txt": "gear 17\nbolt 2\n"},
        script(search("gear"), lambda h: compute("12 * " + found(h, r"gear (\d+)")), shown),
        answers("204"),
    ),
    Task(
        "follow a name",
        "What is the password of the owner of door 7?",
        {"doors.txt": "door 6: ada\ndoor 7: finn\n", "keys.txt": "ada zim\nfinn tolo\n"},
        script(
            search("door 7"),
            lambda h: search(found(h, r"door 7: (\w+)") + " "),
            lambda h: found(h, r"keys\.txt:\d+: \w+ (\w+)"),
        ),
        answers("tolo"),
    ),
    Task(
        "rename in two files",
        "Rename LIMIT to MOST everywhere.",
        {"a.py": "LIMIT = 3\n", "b.py": "from a import LIMIT\n"},
        script(
            search("LIMIT"),
            edit("a.py", "LIMIT", "MOST"),
            edit("b.py", "LIMIT", "MOST"),
            search("LIMIT"),
            "Done.",
        ),
        lambda root, _: (
            (root / "a.py").read_text() + (root / "b.py").read_text() == "MOST = 3\nfrom a import MOST\n"
        ),
    ),
    Task(
        "make a file",
        "Write notes/today.txt with one line: started.",
        {"notes/yesterday.txt": "rested\n"},
        script(edit("notes/today.txt", "", "started\n"), "Done."),
        lambda root, _: (
            (root / "notes/today.txt").is_file() and (root / "notes/today.txt").read_text() == "started\n"
        ),
    ),
    Task(
        "add a line",
        "Add gamma to the end of names.txt.",
        {"names.txt": "alpha\nbeta\n"},
        script(read("names.txt"), edit("names.txt", "beta\n", "beta\ngamma\n"), "Done."),
        lambda root, _: (root / "names.txt").read_text() == "alpha\nbeta\ngamma\n",
    ),
    Task(
        "mend a word",
        "Mend the spelling mistake in readme.md.",
        {"readme.md": "The quick brown fox.\nIt jmups.\n"},
        script(read("readme.md"), edit("readme.md", "jmups", "jumps"), "Done."),
        holds("readme.md", "It jumps.", "The quick brown fox."),
    ),
    Task(
        "make it compile",
        "a.py has a syntax error; mend it.",
        {"a.py": "def f(x:\n    return x\n"},
        script(
            run("python3 -m py_compile a.py"),
            read("a.py"),
            edit("a.py", "f(x:", "f(x):"),
            run("python3 -m py_compile a.py"),
            "Done.",
        ),
        compiles,
        ["python3 -m py_compile a.py"],
    ),
    Task(
        "change a setting",
        "Set retries to 5 in settings.json.",
        {"settings.json": '{"name": "x", "retries": 2}\n'},
        script(
            read("settings.json"),
            lambda h: edit("settings.json", found(h, '("retries": \\d+)'), '"retries": 5'),
            "Done.",
        ),
        lambda root, _: json.loads((root / "settings.json").read_text()) == {"name": "x", "retries": 5},
    ),
    Task(
        "remove a line",
        "Remove the print from f.py.",
        {"f.py": "def f(x):\n    print(x)\n    return x\n"},
        script(search("print"), edit("f.py", "    print(x)\n", ""), "Done."),
        lambda root, _: (root / "f.py").read_text() == "def f(x):\n    return x\n",
    ),
    Task(
        "what a program says",
        "What does say.py print?",
        {"say.py": "print(6 * 7)\n"},
        script(run("python3 say.py"), lambda h: found(h, r"^(\d+)$")),
        answers("42"),
        ["python3 say.py"],
    ),
    Task(
        "how a program ends",
        "With which code does end.py exit?",
        {"end.py": "raise SystemExit(9)\n"},
        script(run("python3 end.py"), lambda h: found(h, r"\[exit (\d+)\]")),
        answers("9"),
        ["python3 end.py"],
    ),
    Task(
        "the middle of a long file",
        "What stands in line 3001 of log.txt?",
        {"log.txt": "\n".join(f"line {n * n}" for n in range(6000))},
        script(
            read("log.txt", 1, 6000),
            lambda h: ("recall", {"result": found(h, r"^\[result (\w+)"), "first": 3002, "last": 3002}),
            lambda h: found(h, r"line (\d+)"),
        ),
        answers(str(3000**2)),
    ),
    Task(
        "a needle",
        "Which disk has an error?",
        {"log.txt": LONG},
        script(search("ERROR"), lambda h: found(h, r"disk (\w+)")),
        answers("sda7"),
    ),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name.replace(" ", "-"))
def test_task(bench: Any, task: Task) -> None:
    for name, text in task.files.items():
        bench.write(name, text)
    try:
        before = task.check(bench.root, "I do not know.")
    except SyntaxError:
        before = False
    assert not before, "the check holds for who does nothing"
    end = bench.run(task.speaks, task=task.asked, allow=task.allow)
    assert end["reason"] == "finished", [record["shown"] for record in bench.receipts()]
    assert task.check(bench.root, end["answer"]), end["answer"]


def test_there_are_twenty() -> None:
    assert len({task.name for task in TASKS}) == 20
