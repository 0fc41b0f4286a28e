"""Any split of any text gives the same parts in chat and responses, whole and streamed, as the library's."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.messages.test_message import FRAGMENTS
from tiny_llm.data import Chunk, Completion, Timing
from tiny_llm.messages.chat_format import ChatFormat
from tiny_llm.messages.message import message_of
from tiny_llm.messages.tool_parser import ToolFormat
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.server.chat_bodies import ChatBody
from tiny_llm.server.chat_completions import ChatWriter
from tiny_llm.server.jobs import Job
from tiny_llm.server.response_bodies import ResponseBody
from tiny_llm.server.responses import ResponsesWriter

if TYPE_CHECKING:
    from tests.server.conftest import Running
    from tiny_llm.server.service import Service

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g", "h")]
ANSWERS = ('{"ok": true}', "</think>", '</think>\n\n{"ok": true}', '[TOOL_CALLS]f[ARGS]{"a": [1]}')
TIMING = Timing(1, 1, 0.0, 0.0, 0.0)


class Parts(NamedTuple):
    """What a message says: its content, what was thought, its calls' names and arguments."""

    content: str
    reasoning: str
    calls: list[tuple[str, str]]


def chunks_of(pieces: Sequence[str]) -> list[Chunk]:
    text = "".join(pieces)
    ended = Completion(text, [1], "stop", [1], None, TIMING)
    return [*(Chunk(piece, [1]) for piece in pieces), Chunk("", (), ended)]


def events_in(stream: bytes) -> list[dict[str, Any]]:
    lines = stream.decode().split("\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def of_library(form: ChatFormat, text: str) -> Parts:
    parser = form.parser()
    told = message_of(parser.push(text) + parser.finish())
    calls = [(call.name, call.arguments) for call in told.tool_calls]
    return Parts(told.content or "", told.reasoning or "", calls)


def of_chat(message: dict[str, Any]) -> Parts:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    told = [(call["name"], call["arguments"]) for call in calls]
    return Parts(message.get("content") or "", message.get("reasoning_content") or "", told)


def of_deltas(events: Sequence[dict[str, Any]]) -> Parts:
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    calls: list[tuple[str, str]] = []
    for part in (part for delta in deltas for part in delta.get("tool_calls") or ()):
        function = part["function"]
        if part.get("id"):
            calls.append((function["name"], ""))
        name, arguments = calls[part["index"]]
        calls[part["index"]] = name, arguments + function.get("arguments", "")
    said = ["".join(delta.get(name) or "" for delta in deltas) for name in ("content", "reasoning_content")]
    return Parts(said[0], said[1], calls)


def of_items(items: Sequence[dict[str, Any]]) -> Parts:
    texts = {"message": "", "reasoning": ""}
    for item in items:
        if item["type"] in texts:
            texts[item["type"]] += "".join(part["text"] for part in item["content"])
    calls = [(item["name"], item["arguments"]) for item in items if item["type"] == "function_call"]
    return Parts(texts["message"], texts["reasoning"], calls)


def told(service: Service, form: ChatFormat, pieces: Sequence[str]) -> dict[str, Parts]:
    """The parts in each interface."""
    job = Job([[1]], SamplingParams(), 0, "", None)
    messages: list[Any] = [{"role": "user", "content": "a"}]
    body, chunks = ChatBody(messages=messages), chunks_of(pieces)
    asked = ResponseBody(input="a")
    ended = [chunk.completion for chunk in chunks if chunk.completion is not None]
    whole: Any = ChatWriter(service, body, form, job).whole([chunks], ended)
    streamed, events = (
        ChatWriter(service, body, form, job),
        ResponsesWriter(service, asked, form, lambda _: None),
    )
    grown = events_in(b"".join(events.events(0, chunk) for chunk in chunks))
    return {
        "chat": of_chat(whole["choices"][0]["message"]),
        "chat's stream": of_deltas(events_in(b"".join(streamed.events(0, chunk) for chunk in chunks))),
        "responses": of_items(
            ResponsesWriter(service, asked, form, lambda _: None).whole([chunks], ended)["output"]
        ),
        "responses' stream": of_items([e["item"] for e in grown if e["type"] == "response.output_item.done"]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("tool_format", [None, "hermes", "llama3_json", "mistral", "mistral_args"])
def test_any_split_of_any_text_gives_the_same_parts_everywhere(
    running: Running, tool_format: ToolFormat | None, thinking: bool
) -> None:
    """Thoughts that the prompt opened, and forms and calls behind them, among them."""
    rng = random.Random(11)
    form = ChatFormat(TOOLS if tool_format else None, tool_format or "hermes", thinking=thinking)
    for _ in range(120):
        text = "".join(rng.choices((*FRAGMENTS, *ANSWERS), k=rng.randrange(1, 9)))
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8)))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        expected = of_library(form, text)
        for split in (pieces, list(text)):
            for interface, parts in told(running.service, form, split).items():
                assert parts == expected, (interface, split)
