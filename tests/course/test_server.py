"""Chapter 3.6: tables are what the experiment prints, answers are computed, the mistakes as told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from book.course.manifest import ROOT
from tests.course.conftest import page_of, tables_of
from tiny_llm.data import Chunk, MessageDelta
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.server.chat_completions import ChatWriter
from tiny_llm.server.events import EventStream
from tiny_llm.server.jobs import Job

PAGE, TABLES = page_of("3.6"), tables_of("3.6")

EXPERIMENT = "book/experiments/streaming.py"


def chat_event(text: str) -> bytes:
    """How the server tells that a chat's answer has grown."""
    parser: Any = SimpleNamespace(push=lambda text: [MessageDelta(text)], finish=list)
    body: Any = SimpleNamespace(stream=True, stream_options=None, logprobs=False, top_logprobs=None, n=1)
    service: Any = SimpleNamespace(settings=SimpleNamespace(name="demo"), llm=SimpleNamespace(tokenizer=None))
    form: Any = SimpleNamespace(parser=lambda: parser)
    writer = ChatWriter(service, body, form, Job([[1]], SamplingParams()))
    writer.events(0, Chunk("first", (1,)))
    return writer.events(0, Chunk(text, (1,)))


def test_the_predictions() -> None:
    event, shown = chat_event(" the"), TABLES[0]
    ours, theirs = (json.loads(text[6:]) for text in (event.decode(), shown))
    assert ours == {**theirs, "id": ours["id"], "created": ours["created"]}
    assert len(event) == len(shown.encode()) + 1, "with the empty line"
    assert f"these are {len(event)} bytes" in PAGE and HIGH_WATER_LIMIT == 64 * 1024
    assert f"4 of {len(event)} bytes, **{round(100 * 4 / len(event))} %**" in PAGE
    assert f"{HIGH_WATER_LIMIT:,} / {len(event)}: **{HIGH_WATER_LIMIT // len(event)}** tokens" in page_of(
        "3.6"
    )
    assert f"**{256 * 20:,}** and **20** times" in PAGE
    assert len(event) / 4 > 50, "50 times as large as their text"
    assert dict(EventStream(None).raw_headers)[b"x-accel-buffering"] == b"no"  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_table(run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    printed = run(EXPERIMENT, "--svg", drawn, PYTHONPATH=ROOT).stdout
    assert printed == TABLES[2], f"copy this into the page:\n{printed}"
    assert drawn.read_text() == (ROOT / "book/docs/img/streaming.svg").read_text(), "draw it again"
    for row in printed.splitlines()[2:]:
        period, pieces, largest, held, _ = map(int, re.findall(r"\d+", row))
        assert pieces == 1 + -(-59 // period) + 1, "the first token, 59 / k pieces, [DONE]"
        if 1 < period <= 16:  # later the answer is too short for it
            assert largest == period, "k tokens gather while a piece is under way"
            assert held == 2 * period - 1, "k under way and k - 1 more"


@pytest.mark.slow
def test_the_mistakes(run) -> None:
    printed = run(EXPERIMENT, "--mistakes", PYTHONPATH=ROOT).stdout
    assert printed == TABLES[1], f"copy this into the page:\n{printed}"
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:]}
    assert all(row[1] == "60" for row in rows.values()), "none costs the quick reader a token"
    assert rows["one-at-a-time"][4] == rows["sent-ahead"][4] == str(61 * 8) == "488"
    assert rows["(none)"][5] == "1" and rows["never-cancelled"][5] == str(60 - 10)
    assert rows["told-as-an-end"][6:] == ["[DONE]"] and rows["(none)"][6:] == ["error,", "[DONE]"]
