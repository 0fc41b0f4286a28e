"""A file of prompts through the command line: a line each, and clear errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tiny_llm import LLM, SamplingParams
from tiny_llm.cli import main


def run(path: Path, *options: str) -> int:
    return main(["generate", "--file", str(path), "--max-tokens", "12", *options])


@pytest.mark.slow
def test_each_line_is_answered_as_if_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM("demo")
    path = tmp_path / "prompts.jsonl"
    questions = [f"What is {i} + {i + 3}?" for i in range(10, 40)]
    lines = [json.dumps({"prompt": question}) for question in questions]
    lines.append(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "n": 2, "seed": 1})
    )
    path.write_text("\n\n".join(lines))
    assert run(path, "--trace", str(tmp_path / "trace.json")) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.strip().split("\n")]
    assert "31 prompts" in err and "tok/s" in err
    assert re.match(r"weights \d+\.\d\d GB · keys and values up to \d+\.\d\d GB, [\d,]+ tokens\n", err)
    answered = {row["line"]: row for row in rows}
    for index, question in enumerate(questions):
        expected = llm.chat([{"role": "user", "content": question}], SamplingParams(max_tokens=12))
        assert answered[2 * index + 1]["text"] == expected.text
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {event["tid"] for event in events if event["name"] == "decode"}
    assert len(tracks) == 32, "one for each sequence that was decoded"
    by_name = {name: [e for e in events if e["name"] == name] for name in ("step", "prefill", "waiting")}
    assert sum(e["args"]["tokens"] for e in by_name["prefill"]) <= sum(row["prompt_tokens"] for row in rows)
    assert len(by_name["waiting"]) == 31 and all(event["dur"] >= 0 for event in events if event["ph"] == "X")
    guesses = [sum(e["args"].values()) for e in events if e["name"] == "guesses"]
    assert sum(e["args"]["drafted"] for e in by_name["step"]) == max(guesses, default=0)
    last = [row for row in rows if row["line"] == 61]
    assert sorted(row["index"] for row in last) == [0, 1]
    assert all(row["completion_tokens"] == 2 for row in last)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: Expecting property name"),
        ("[1]", 'line 2: expected an object with "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'line 2: expected an object with "prompt" or "messages"'),
        ('{"prompt": "a", "temprature": 1}', "line 2: 'temprature' is unknown; a line may set max_tokens"),
        ('{"prompt": "a", "max_tokens": 0}', "line 2: max_tokens is 0"),
        ('{"prompt": ""}', "line 2: "),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, complaint: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    assert run(path, *(["--raw"] if '""' in line else [])) == 2
    out, err = capsys.readouterr()
    assert out == "", "nothing ran"
    assert complaint in err


def test_a_text_may_have_any_character_that_json_allows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """U+2028 ends a line for str.splitlines, not for JSON; U+0085 likewise."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028two\u0085three"}\r\n{"prompt": "x"}', encoding="utf-8")
    assert run(path) == 0
    assert sorted(json.loads(line)["line"] for line in capsys.readouterr().out.strip().split("\n")) == [1, 2]


def test_a_file_that_is_not_utf_8_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "Gr\xfc\xdfe"}')
    assert run(path) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("not valid UTF-8 at byte 14; convert it first.")


def test_log_probabilities_and_penalties_of_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "Hello", "max_tokens": 3, "logprobs": 2, "stop_token_ids": [], "ignore_eos": true}'
    )
    assert run(path) == 0
    row = json.loads(capsys.readouterr().out)
    assert len(row["token_ids"]) == len(row["logprobs"]) == 3
    for token, likely in zip(row["token_ids"], row["logprobs"], strict=True):
        assert str(token) in likely and all(value <= 0 for value in likely.values())
