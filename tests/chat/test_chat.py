"""The chat as a person meets it, in a pseudo-terminal."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PASTE = "\x1b[200~{}\x1b[201~"
"""What a terminal sends that says what is pasted."""
PROMPT = r"\n(\x1b\[\?2004h)?> "
"""A terminal is asked before it to say so."""


def hear_ctrl_c() -> None:
    """In the child: tests that run in the background of a script would have it ignored, as all else there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def opened_terminal(*options: str, term: str = "dumb", columns: int = 200) -> Iterator[pexpect.spawn[str]]:
    """``python main.py`` in a pseudo-terminal, after its first prompt."""
    environment = {**os.environ, "TERM": term, "NO_COLOR": "1", "COLUMNS": "", "INPUTRC": os.devnull}
    child = pexpect.spawn(
        sys.executable,
        ["main.py", *options],
        env=environment,
        cwd=str(ROOT),
        encoding="utf-8",
        timeout=30,
        dimensions=(50, columns),
        preexec_fn=hear_ctrl_c,
    )
    child.expect("> ")
    yield child
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_conversation_in_a_terminal(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    turns = [
        ("/system", "There is no system message."),
        ("/system Be kind.", "From the next message on."),
        ("/system -", "no system message from the next"),
        ("/system", "There is no system message."),
        ("/system Be brief.", "From the next message on."),
        ("Hello", "tok/s"),
        ("/sytem", "Did you mean '/system'"),
        ("/help", "/save FILE"),
        (f"/save {file}", "Saved 3 messages"),
        (f"/save {file}", "exists already"),
        ("/save", "needs a file's name"),
        ("/save /no/such/folder/x", "No such file or directory"),
        ("/save ~no-such-user/x", "No such file or directory"),
        ("/reset", "forgotten"),
        (f"/save {tmp_path / 'reset.json'}", "Saved 1 messages"),
    ]
    with opened_terminal("--max-tokens", "8") as terminal:
        for line, answer in turns:
            terminal.sendline(line)
            terminal.expect_exact(answer)
            terminal.expect(PROMPT)
        terminal.sendline("/exit now")
    assert [m["role"] for m in json.loads(file.read_text())] == ["system", "user", "assistant"]


def test_ctrl_c_stops_the_answer_and_not_the_program(endless: list[str]) -> None:
    with opened_terminal(*endless) as terminal:
        terminal.sendline("Hello")
        terminal.expect_exact("Hello\r\n")
        terminal.expect(r"\S")  # the answer has begun
        terminal.sendintr()
        terminal.expect_exact("Stopped.")
        terminal.expect("> ")
        terminal.send("half a li")
        terminal.expect_exact("half a li")  # readline misses a signal while it reads a key
        terminal.sendintr()
        terminal.expect_exact("Ctrl-D or /exit leaves.")
        terminal.expect("> ")
        terminal.sendline("/system")
        terminal.expect_exact("There is no system message.")
        terminal.expect("> ")
        terminal.sendeof()


def test_the_up_arrow_brings_a_line_back() -> None:
    with opened_terminal("--max-tokens", "8") as terminal:
        terminal.sendline("/system Be kind.")
        terminal.expect("From the next")
        terminal.expect("> ")
        terminal.send("\x1b[A")
        terminal.expect_exact("/system Be kind.")
        terminal.sendline("er")
        terminal.expect("From the next")
        terminal.sendline("/system")
        terminal.expect_exact("Be kind.er")
        terminal.sendeof()


def saved(terminal: pexpect.spawn[str], file: Path) -> list[tuple[str, str]]:
    """What the chat remembers, by its own /save: who said what."""
    terminal.sendline(f"/save {file}")
    terminal.expect("Saved")
    terminal.expect(PROMPT)
    return [(message["role"], message["content"]) for message in json.loads(file.read_text())]


def said(terminal: pexpect.spawn[str], text: str) -> None:
    """Send ``text`` as it is, and wait for the answer's end."""
    terminal.send(text)
    terminal.expect("tok/s")
    terminal.expect(PROMPT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("term", "sent"),
    [
        ("xterm", PASTE.format("one\n  two\n/exit\nthree") + "\n"),
        ("xterm", "one\n  two\n/exit\nthree\n"),
        ("dumb", "one\n  two\n/exit\nthree\n"),
    ],
    ids=["said to be pasted", "all at once", "a dumb terminal"],
)
def test_pasted_lines_are_one_message(term: str, sent: str, tmp_path: Path) -> None:
    with opened_terminal("--max-tokens", "8", term=term) as terminal:
        said(terminal, sent)
        messages = saved(terminal, tmp_path / "talk.json")
        terminal.sendeof()
    assert [text for who, text in messages if who == "user"] == ["one\n  two\n/exit\nthree"]


def test_a_message_may_begin_with_a_slash(tmp_path: Path) -> None:
    texts = [" /exit is a word", "/usr/bin/python3 is what?", "// TODO: say it", "/"]
    with opened_terminal("--max-tokens", "8") as terminal:
        for text in texts:
            said(terminal, f"{text}\n")
        messages = saved(terminal, tmp_path / "talk.json")
        terminal.sendeof()
    assert [text for who, text in messages if who == "user"] == [text.strip() for text in texts]


@pytest.mark.slow
def test_what_is_typed_during_an_answer_waits_for_the_next_prompt(endless: list[str], tmp_path: Path) -> None:
    with opened_terminal(*endless, "--max-tokens", "30", columns=60) as terminal:
        terminal.sendline("Hello")
        terminal.expect_exact("Hello\r\n")
        terminal.expect(r"\S")  # the answer has begun
        terminal.send("typed")
        terminal.send(" early")
        terminal.expect("tok/s")
        assert "typed" not in terminal.before and "early" not in terminal.before
        terminal.expect_exact("> typed early")
        terminal.sendline(" and late")
        terminal.expect("tok/s")
        terminal.expect(PROMPT)
        messages = saved(terminal, tmp_path / "talk.json")
        terminal.sendeof()
    assert messages[2] == ("user", "typed early and late")


@pytest.mark.slow
def test_a_saved_conversation_is_loaded_and_gone_on_with(tmp_path: Path) -> None:
    with opened_terminal("--system", "Be kind.") as terminal:
        said(terminal, "The password of the red door is zimbro.\n")
        before = saved(terminal, tmp_path / "talk.json")
        terminal.sendeof()
    (tmp_path / "bad.json").write_text('[{"role": "user", "content": "?"}]')
    with opened_terminal() as terminal:
        for line, answer in (
            ("/load", "needs a file's name"),
            ("/load /no/such/file", "/no/such/file cannot be read: No such file"),
            (f"/load {ROOT}", "cannot be read: Is a directory"),
            (f"/load {tmp_path / 'bad.json'}", "ends with a question"),
            (f"/load {tmp_path / 'talk.json'}", "Loaded 3 messages"),
            ("/system", "Be kind."),
        ):
            terminal.sendline(line)
            terminal.expect_exact(answer)
            terminal.expect(PROMPT)
        terminal.sendline("Which password opens the red door?")
        terminal.expect_exact("The password of the red door is zimbro.")
        terminal.expect(PROMPT)
        assert saved(terminal, tmp_path / "again.json")[:3] == before
        terminal.sendeof()


def test_retry_answers_the_last_question_again(tmp_path: Path) -> None:
    with opened_terminal("--max-tokens", "8", "--temperature", "2") as terminal:
        terminal.sendline("/retry")
        terminal.expect_exact("error: Nothing was asked yet")
        terminal.expect(PROMPT)
        said(terminal, "Tell me a story.\n")
        first = saved(terminal, tmp_path / "first.json")
        said(terminal, "/retry\n")
        second = saved(terminal, tmp_path / "second.json")
        terminal.sendeof()
    assert [who for who, _ in second] == ["user", "assistant"]
    assert second[0] == first[0]


def test_words_are_whole_at_the_terminal_s_edge(tmp_path: Path) -> None:
    with opened_terminal(columns=30) as terminal:
        terminal.sendline("What is paged attention?")
        terminal.expect_exact("attention?\r\n")
        terminal.expect(r"\n\d+ prompt")
        answer = terminal.before
        terminal.expect(PROMPT)
        messages = saved(terminal, tmp_path / "talk.json")
        terminal.sendeof()
    rows = answer.split("\r\n")
    assert max(map(len, rows)) <= 30 and len(rows) > 3
    assert " ".join(rows).split() == messages[1][1].split(), "each word is as it was"
