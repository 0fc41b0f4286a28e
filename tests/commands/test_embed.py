"""``main.py embed``: vectors as JSON, or how alike texts are."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tiny_llm import LLM
from tiny_llm.cli import main

GOLDEN = Path(__file__).resolve().parents[1] / "golden_embeddings" / "qwen3_last"


def rows(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


def test_json_has_a_line_a_text(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "a fox", "a wolf", "--json"]) == 0
    expected = LLM(demo).embed(["a fox", "a wolf"])
    assert rows(capsys) == [
        {"model": "demo", "text": text, "prompt_tokens": one.prompt_tokens, "embedding": one.vector}
        for text, one in zip(("a fox", "a wolf"), expected, strict=True)
    ]


def test_a_table_shows_how_alike_texts_are(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "What is a KV cache?"
    assert main(["embed", asked, f"[b]{asked}[/b]" * 4, asked]) == 0
    said = capsys.readouterr().out
    cosines = [re.findall(r"-?\d\.\d\d\b", line) for line in said.splitlines() if "KV cache" in line]
    assert [line[i] for i, line in enumerate(cosines)] == ["1.00"] * 3 and cosines[0][2] == "1.00"
    assert cosines[0][1] == cosines[1][0] != "1.00" and "[b]What" in said


def test_each_line_of_a_pipe_is_a_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n\ntwo\n")))
    assert main(["embed", "--json", "--dimensions", "4"]) == 0
    told = rows(capsys)
    assert [one["text"] for one in told] == ["one", "two"] and {len(one["embedding"]) for one in told} == {4}


def test_prompts_and_instructions(capsys: pytest.CaptureFixture[str]) -> None:
    asked = json.loads((GOLDEN / "vectors.json").read_text())
    for one in asked:
        options = {"--prompt-name": one.get("prompt"), "--instruction": one.get("instruction")}
        given = [part for name, value in options.items() if value is not None for part in (name, value)]
        if given:
            arguments = ["embed", one["text"], "--model", str(GOLDEN), "--dtype", "float32", "--json", *given]
            assert main(arguments) == 0
            (told,) = rows(capsys)
            pairs = zip(told["embedding"], one["vector"], strict=True)
            assert max(abs(a - b) for a, b in pairs) < 1e-5


def test_a_prompt_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "a", "--prompt-name", "query"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
