"""LLM.chat with tools, with a form, with both: the same words and the same answers as over HTTP."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tiny_llm import LLM, SamplingParams
from tiny_llm.data import ToolCall
from tiny_llm.errors import RequestError
from tiny_llm.messages.message import message_of


def function(name: str, **parameters: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "required": [*parameters]}
    return {"type": "function", "function": {"name": name, "description": f"A {name}.", "parameters": schema}}


CALCULATOR = function("calculator", expression={"type": "string", "description": "For example 12 * 7."})
LOOKUP = function("lookup", query={"type": "string", "description": "What to look up."})
TOOLS = [CALCULATOR, LOOKUP]
SUM = [{"role": "user", "content": "What is 123 + 456?"}]
STORY = [{"role": "user", "content": "Tell me a story."}]
GREEDY = SamplingParams(max_tokens=200)
WILD = SamplingParams(max_tokens=400, temperature=3.0, seed=3, n=3)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo")


def test_a_tool_loop_ends_with_the_right_number(llm: LLM) -> None:
    asked = llm.chat(SUM, GREEDY, tools=TOOLS)
    assert asked.message is not None and asked.finish_reason == "stop"
    (call,) = asked.message.tool_calls
    assert asked.message.content is None, "a call never shows as text"
    assert (call.name, json.loads(call.arguments)) == ("calculator", {"expression": "123 + 456"})
    called = {"name": call.name, "arguments": json.loads(call.arguments)}
    said = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": called}]}
    told = llm.chat([*SUM, said, {"role": "tool", "content": "579"}], GREEDY, tools=TOOLS)
    assert told.message is not None and not told.message.tool_calls
    assert told.message.content == told.text and "579" in told.text


def test_a_streams_deltas_make_the_message(llm: LLM) -> None:
    whole = llm.chat(SUM, GREEDY, tools=TOOLS)
    chunks = list(llm.stream_chat(SUM, GREEDY, tools=TOOLS))
    assert "".join(chunk.text for chunk in chunks) == whole.text, "the text itself stays as it was made"
    made = message_of([delta for chunk in chunks for delta in chunk.deltas])
    ended = chunks[-1].completion
    assert ended is not None and ended.message == made and whole.message is not None
    assert [(c.name, c.arguments) for c in made.tool_calls] == [
        (c.name, c.arguments) for c in whole.message.tool_calls
    ]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "lookup"}}])
def test_a_call_that_is_demanded_is_made(llm: LLM, choice: Any) -> None:
    """At temperature 3 the model says nonsense; each answer must still be a call."""
    chunks = llm.stream_chat(STORY, WILD, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    ended = [chunk.completion for chunk in chunks if chunk.completion is not None]
    whole = [one.message for one in ended if one.finish_reason == "stop"]
    assert len(ended) == 3 and len(whole) >= 2, "one may have run into max_tokens"
    for message in whole:
        assert message is not None and message.content is None
        (call,) = message.tool_calls
        assert call.name in (["lookup"] if isinstance(choice, dict) else ["lookup", "calculator"])
        (argument,) = json.loads(call.arguments).values()
        assert isinstance(argument, str)
    assert len({call.id for message in whole if message for call in message.tool_calls}) == len(whole)


def test_an_answer_has_the_form_that_is_asked_for(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "green"]}, "width": {"type": "integer", "maximum": 99}},
        "required": ["color", "width"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "door", "schema": schema}}
    one = llm.chat(STORY, SamplingParams(max_tokens=100, temperature=3.0, seed=1), response_format=form)
    assert one.message is not None and one.finish_reason == "stop"
    jsonschema.validate(json.loads(one.message.content or ""), schema)


def test_without_leave_no_call_is_read(llm: LLM) -> None:
    free = llm.chat(SUM, GREEDY)
    none = llm.chat(SUM, GREEDY, tools=TOOLS, tool_choice="none")
    assert none.prompt_token_ids == free.prompt_token_ids and none.message == free.message
    assert free.message is not None and free.message.content == free.text


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": [{"name": "lookup"}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": ["lookup"]}, "tools"),
        ({"tools": [function("a", b={"not": {}})], "tool_choice": "required"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        (
            {"response_format": {"type": "json_object"}, "params": SamplingParams(min_tokens=3)},
            "min_tokens",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(
    llm: LLM, asked: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        llm.stream_chat(STORY, **asked)
    assert caught.value.param == param and len(llm.engine) == 0


def test_a_call_that_is_cut_short_is_shown_as_far_as_it_came(llm: LLM) -> None:
    whole = llm.chat(SUM, GREEDY, tools=TOOLS)
    short = llm.chat(SUM, SamplingParams(max_tokens=len(whole.token_ids) - 4), tools=TOOLS)
    assert short.finish_reason == "length" and short.message is not None and whole.message is not None
    (cut,), (full,) = short.message.tool_calls, whole.message.tool_calls
    assert isinstance(cut, ToolCall) and full.arguments.startswith(cut.arguments) and cut != full


def test_a_chat_that_is_left_early_runs_no_longer(llm: LLM) -> None:
    chunks = llm.stream_chat(STORY, replace(GREEDY, ignore_eos=True))
    next(chunks)
    assert len(llm.engine) == 1
    chunks.close()
    assert len(llm.engine) == 0 and llm.engine.scheduler.usage().used == 0


def test_a_model_whose_template_names_arguments_apart_is_read_and_held_so(demo_copy: Path) -> None:
    """Mistral's newer style: the tag, a name, a tag, the arguments; whole and streamed."""
    config = json.loads((demo_copy / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("<tool_call>", "[TOOL_CALLS]name[ARGS]")
    (demo_copy / "tokenizer_config.json").write_text(json.dumps(config))
    mistral = LLM(demo_copy)
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    chunks = list(mistral.stream_chat(STORY, replace(WILD, n=1), **asked))
    ended = chunks[-1].completion
    assert ended is not None and ended.message is not None
    assert re.match(r"\[TOOL_CALLS\](calculator|lookup)\[ARGS\]\{", ended.text), ended.text
    assert message_of([delta for chunk in chunks for delta in chunk.deltas]) == ended.message
    (call,) = ended.message.tool_calls
    assert ended.finish_reason == "length" or isinstance(json.loads(call.arguments), dict)
    assert ended.message.content is None
