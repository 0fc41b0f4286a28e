"""A chat's message: the same from any cut of a text, and a call never shown as text."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tiny_llm.data import AssistantMessage, Chunk, Completion, Timing
from tiny_llm.messages.message import MessageParser, message_of, opens_thinking, with_messages
from tiny_llm.messages.tool_parser import ToolFormat, ToolParser, tool_format_of

ONE = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call> {\\"", "b": [1, {}]}}\n</tool_call>'
TWO = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
ODD = '<tool_call>{"arguments": {"x": 1}, "name": "h"}</tool_call>'
BARE = '{"name": "f", "parameters": {"a": "b; }"}}; {"name": "g", "parameters": {}}'
EXTRA = '<tool_call>\n{"name": "f", "arguments": {}, "id": 7}</tool_call>'
BAD_ESCAPE = '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>'
SURROGATE = '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'
UNKNOWN = '<tool_call>\n{"name": "x", "arguments": {}}\n</tool_call>'
LISTED = (
    '{"name": "f", "arguments": {"a": "</tool_call> {\\"", "b": [1, {}]}, "id": "123456789"}'
    ', {"name": "g", "arguments": {}}'
)
NAMED_ID = "[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{}"
ARGUMENTS = '{"a": "</tool_call> {\\"", "b": [1, {}]}'
NAMED = f"[TOOL_CALLS]f[ARGS]{ARGUMENTS}[TOOL_CALLS]g[ARGS]{{}}"
BARE_ARGUMENTS = '{"a": "b; }"}'
NAMES = ("f", "g", "h")
Calls = list[tuple[str, str]]
CASES: list[tuple[ToolFormat | None, str, str | None, str | None, Calls]] = [
    ("hermes", "Just text, 1 < 2.", "Just text, 1 < 2.", None, []),
    ("hermes", ONE, None, None, [("f", ARGUMENTS)]),
    ("hermes", f"Let me see.\n{ONE}\n{TWO}\n", "Let me see.", None, [("f", ARGUMENTS), ("g", "{}")]),
    ("hermes", ODD, None, None, [("h", '{"x": 1}')]),
    ("hermes", "<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", None, []),
    ("hermes", "<tool_call>never closed", "<tool_call>never closed", None, []),
    ("hermes", ONE[:40], None, None, [("f", ARGUMENTS[: 40 - ONE.index('{"a"')])]),
    ("hermes", f"<think>\nHm. <tool_call>\n</think>\n\n{TWO}", None, "Hm. <tool_call>\n", [("g", "{}")]),
    ("hermes", "<think>never ends", "", "never ends", []),
    (None, f"<think>a</think>b {TWO}", f"b {TWO}", "a", []),
    (None, "<thin", "<thin", None, []),
    ("hermes", f"{EXTRA}\n{TWO}\nDone.", "\nDone.", None, [("f", "{}"), ("g", "{}")]),
    ("hermes", EXTRA[: EXTRA.index("7")], None, None, [("f", "{}")]),
    ("hermes", EXTRA.replace("}, ", "}") + "Done.", '"id": 7}</tool_call>Done.', None, [("f", "{}")]),
    ("hermes", EXTRA.replace(', "id": 7}', "") + TWO, None, None, [("f", "{}"), ("g", "{}")]),
    ("hermes", EXTRA.replace("7}", '"') + TWO, None, None, [("f", "{}"), ("g", "{}")]),
    ("hermes", BAD_ESCAPE, BAD_ESCAPE, None, []),
    ("hermes", SURROGATE, SURROGATE, None, []),
    ("hermes", f"Well.\n{UNKNOWN}\n{TWO}", f"Well.\n{UNKNOWN}", None, [("g", "{}")]),
    ("hermes", ODD.replace('"h"', '"x"'), ODD.replace('"h"', '"x"'), None, []),
    ("hermes", f"<tool_call>{{never {TWO}", "<tool_call>{never", None, [("g", "{}")]),
    ("hermes", ODD.replace("1", '"</tool_call>"'), None, None, [("h", '{"x": "</tool_call>"}')]),
    ("mistral", f"So.\n[TOOL_CALLS] [{LISTED}]", "So.", None, [("f", ARGUMENTS), ("g", "{}")]),
    ("mistral", f"[TOOL_CALLS][{LISTED}] Done.", " Done.", None, [("f", ARGUMENTS), ("g", "{}")]),
    ("mistral", "[TOOL_CALLS] f", "[TOOL_CALLS] f", None, []),
    ("mistral", '[TOOL_CALLS] [{"name": "x", ', '[TOOL_CALLS] [{"name": "x", ', None, []),
    ("mistral_args", f"So.\n{NAMED}", "So.", None, [("f", ARGUMENTS), ("g", "{}")]),
    ("mistral_args", f"<think>\n{NAMED}</think>{NAMED_ID} Done.", " Done.", f"{NAMED}", [("f", "{}")]),
    ("mistral_args", NAMED[:40], None, None, [("f", ARGUMENTS[: 40 - NAMED.index('{"a"')])]),
    ("mistral_args", f"[TOOL_CALLS] [{LISTED}]", None, None, [("f", ARGUMENTS), ("g", "{}")]),
    ("mistral_args", "[TOOL_CALLS]x[ARGS]{} a", "[TOOL_CALLS]x[ARGS]{} a", None, []),
    ("mistral_args", "[TOOL_CALLS]f or g?", "[TOOL_CALLS]f or g?", None, []),
    ("mistral_args", "[TOOL_CALLS]f[ARGS]5", "[TOOL_CALLS]f[ARGS]5", None, []),
    ("mistral_args", "[TOOL_CALLS]f[CALL_ID]1", "[TOOL_CALLS]f[CALL_ID]1", None, []),
    ("mistral", NAMED_ID, None, None, [("f", "{}")]),
    ("llama3_json", '{"name": "x", "parameters": {}}', '{"name": "x", "parameters": {}}', None, []),
    ("llama3_json", BARE, None, None, [("f", BARE_ARGUMENTS), ("g", "{}")]),
    ("llama3_json", "<|python_tag|>" + BARE, None, None, [("f", BARE_ARGUMENTS), ("g", "{}")]),
    ("llama3_json", "A {word}.", "A {word}.", None, []),
    ("llama3_json", '{"just": "json"}', '{"just": "json"}', None, []),
]
FRAGMENTS = (
    *("<think>", "</think>", "\n", " ", "I add.", "4", "1 < 2", "<", "ünï 🔑"),
    *(
        ONE,
        TWO,
        ODD,
        "<tool_call>",
        "</tool_call>",
        "no json",
        '{"name": "g", ',
        '"arguments": {}}',
        '{"a": 1}',
    ),
    *(NAMED, NAMED_ID, "f", "[ARGS]", "[CALL_ID]", "{}"),
    *(EXTRA, BAD_ESCAPE, SURROGATE, UNKNOWN, LISTED, "[TOOL_CALLS]", "[", "]", ", "),
    *(BARE, "; ", "<|python_tag|>", "<|other|>", '"', "{", "}"),
)


def read(tool_format: ToolFormat | None, pieces: Sequence[str], *, parallel: bool = True) -> AssistantMessage:
    parser = MessageParser(ToolParser(tool_format, NAMES, parallel=parallel) if tool_format else None)
    return message_of([delta for piece in pieces for delta in parser.push(piece)] + parser.finish())


def cut(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def shown(message: AssistantMessage) -> tuple[str | None, str | None, Calls]:
    """A message without the ids of its calls, which are drawn."""
    return message.content, message.reasoning, [(call.name, call.arguments) for call in message.tool_calls]


@pytest.mark.parametrize(("tool_format", "text", "content", "reasoning", "calls"), CASES)
def test_every_cut_of_a_text_reads_the_same(
    tool_format: ToolFormat | None, text: str, content: str | None, reasoning: str | None, calls: Calls
) -> None:
    for size in (1, 2, 3, 7, len(text)):
        message = read(tool_format, cut(text, size))
        assert shown(message) == (content, reasoning, calls), f"in pieces of {size}"
        assert len({call.id for call in message.tool_calls}) == len(calls)


@pytest.mark.parametrize("tool_format", [None, "hermes", "llama3_json", "mistral", "mistral_args"])
def test_any_split_of_any_text_gives_the_same_message(tool_format: ToolFormat | None) -> None:
    rng = random.Random(7)
    for _ in range(2_000):
        text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 9)))
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8)))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert shown(read(tool_format, pieces)) == shown(read(tool_format, [text])), pieces


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("I add.\n</think>\n\n4", "4", "I add.\n"),
        ("\nI add.</think>4", "4", "I add."),
        ("I never end", "", "I never end"),
        ("</think>4", "4", None),
        (f"Which? {TWO}</think>4", "4", f"Which? {TWO}"),
    ],
)
def test_a_thought_that_the_prompt_has_opened_is_reasoning(
    text: str, content: str, reasoning: str | None
) -> None:
    for size in (1, 2, 3, len(text)):
        parser = MessageParser(ToolParser("hermes", NAMES), thinking=True)
        deltas = [delta for piece in cut(text, size) for delta in parser.push(piece)]
        message = message_of(deltas + parser.finish())
        assert shown(message) == (content, reasoning, []), f"in pieces of {size}"


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|assistant|>", False),
        ("<|assistant|><think>\n", True),
        ("<|assistant|><think>", True),
        ("<|assistant|><think>\n\n</think>\n\n", False),
        ("What does <think> mean?<|assistant|>", False),
    ],
)
def test_a_prompt_tells_whether_it_opens_a_thought(prompt: str, opened: bool) -> None:
    assert opens_thinking(prompt) == opened


@pytest.mark.parametrize("tool_format", ["hermes", "llama3_json", "mistral", "mistral_args"])
def test_of_what_is_no_call_nothing_is_lost(tool_format: ToolFormat) -> None:
    """No function is offered, so that every text is content, to the last space."""
    rng = random.Random(8)
    for _ in range(2_000):
        text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 9)))
        parser = ToolParser(tool_format, ())
        told = message_of(parser.push(text) + parser.finish())
        assert (told.content, told.tool_calls) == (text, ()), text


@pytest.mark.parametrize("size", [1, 3, 500])
@pytest.mark.parametrize("tool_format", ["hermes", "mistral", "mistral_args"])
def test_the_only_call_that_is_wanted_ends_where_it_ends(tool_format: ToolFormat, size: int) -> None:
    listed = NAMED if tool_format == "mistral_args" else f"[TOOL_CALLS] [{LISTED}]"
    text = f"{ONE}\n{TWO}\nDone." if tool_format == "hermes" else f"{listed} Done."
    assert shown(read(tool_format, cut(text, size), parallel=False)) == (None, None, [("f", ARGUMENTS)])


@pytest.mark.parametrize("size", [1, 3, len(BARE)])
def test_after_the_only_bare_call_that_is_wanted_nothing_more_is_told(size: int) -> None:
    message = read("llama3_json", cut(BARE, size), parallel=False)
    assert shown(message) == (None, None, [("f", BARE_ARGUMENTS)])


def test_a_template_tells_the_format() -> None:
    assert tool_format_of("within <tool_call></tool_call> tags") == "hermes"
    assert tool_format_of('{"name": function name, "parameters": dictionary}') == "llama3_json"
    assert tool_format_of("") == "hermes"
    assert tool_format_of('{{ "[TOOL_CALLS] [" }} {"parameters"') == "mistral"
    assert tool_format_of('{{ "[TOOL_CALLS]" + name + "[ARGS]" }}') == "mistral_args"


def test_each_answer_of_a_prompt_has_a_parser_of_its_own() -> None:
    """Two answers' chunks come in turns; each last one carries the message that its deltas make."""
    texts = [f"<think>hm</think>Yes. {TWO}", "No <think>."]
    chunks = [Chunk(text[at : at + 4], index=i) for at in range(0, 100, 4) for i, text in enumerate(texts)]
    timing = Timing(1, 1, 0.0, 0.0, 0.0)
    for i, text in enumerate(texts):
        ended = Completion(text, [1], "stop", [1], None, timing, index=i)
        chunks.append(Chunk("", (), ended, i))
    stream = (chunk for chunk in chunks)
    told = list(with_messages(stream, lambda: MessageParser(ToolParser("hermes", NAMES))))
    messages = [chunk.completion.message for chunk in told if chunk.completion]
    assert [message and shown(message) for message in messages] == [
        ("Yes.", "hm", [("g", "{}")]),
        ("No <think>.", None, []),
    ]
    for i, message in enumerate(messages):
        assert message_of([d for chunk in told if chunk.index == i for d in chunk.deltas]) == message
    assert "".join(chunk.text for chunk in told if chunk.index == 0) == texts[0], "the text stays as it was"
