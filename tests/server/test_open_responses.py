"""/v1/responses against the schema of Open Responses, written down here in our words, and its text cases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

if TYPE_CHECKING:
    import httpx2 as httpx

Schema = dict[str, Any]
TEXT, WHOLE, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}
NULL: Schema = {"type": "null"}
STATUS: Schema = {"enum": ["in_progress", "completed", "incomplete"]}


def record(**fields: Schema) -> Schema:
    """An object that must have all these; it may have others."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


LIKELY = {"token": TEXT, "logprob": NUMBER, "bytes": listed(WHOLE)}
LOGPROBS = listed(record(**LIKELY, top_logprobs=listed(record(**LIKELY))))
OUTPUT_TEXT = record(type={"const": "output_text"}, text=TEXT, annotations=listed({}), logprobs=LOGPROBS)
REASONING_TEXT = record(type={"const": "reasoning_text"}, text=TEXT)
PART: Schema = {"anyOf": [OUTPUT_TEXT, REASONING_TEXT]}
MESSAGE = record(
    type={"const": "message"}, id=TEXT, status=STATUS, role={"const": "assistant"}, content=listed(PART)
)
CALL = record(
    type={"const": "function_call"}, id=TEXT, call_id=TEXT, name=TEXT, arguments=TEXT, status=STATUS
)
REASONING = record(type={"const": "reasoning"}, id=TEXT, summary=listed({}))
ITEM: Schema = {"anyOf": [MESSAGE, CALL, REASONING]}
TOOL = record(
    type={"const": "function"},
    name=TEXT,
    description=or_null(TEXT),
    parameters=or_null({"type": "object"}),
    strict=or_null(FLAG),
)
USAGE = record(
    input_tokens=WHOLE,
    output_tokens=WHOLE,
    total_tokens=WHOLE,
    input_tokens_details=record(cached_tokens=WHOLE),
    output_tokens_details=record(reasoning_tokens=WHOLE),
)
RESPONSE = record(
    id=TEXT,
    object={"const": "response"},
    created_at=WHOLE,
    completed_at=or_null(WHOLE),
    status=TEXT,
    incomplete_details=or_null(record(reason=TEXT)),
    model=TEXT,
    previous_response_id=or_null(TEXT),
    instructions=or_null(TEXT),
    output=listed(ITEM),
    error=or_null(record(code=TEXT, message=TEXT)),
    tools=listed(TOOL),
    tool_choice={"anyOf": [{"enum": ["none", "auto", "required"]}, record(type={"const": "function"})]},
    truncation={"enum": ["auto", "disabled"]},
    parallel_tool_calls=FLAG,
    text=record(format=record(type={"enum": ["text", "json_object", "json_schema"]})),
    top_p=NUMBER,
    presence_penalty=NUMBER,
    frequency_penalty=NUMBER,
    top_logprobs=WHOLE,
    temperature=NUMBER,
    reasoning=or_null(record(effort=or_null(TEXT), summary=or_null(TEXT))),
    user=or_null(TEXT),
    usage=or_null(USAGE),
    max_output_tokens=or_null(WHOLE),
    max_tool_calls=or_null(WHOLE),
    store=FLAG,
    background=FLAG,
    service_tier=TEXT,
    metadata={"type": "object"},
    safety_identifier=or_null(TEXT),
    prompt_cache_key=or_null(TEXT),
)
_ITEM_PLACE = {"item_id": TEXT, "output_index": WHOLE}
_PART_PLACE = {**_ITEM_PLACE, "content_index": WHOLE}
EVENTS: Mapping[str, Schema] = {
    "response.created": {"response": RESPONSE},
    "response.in_progress": {"response": RESPONSE},
    "response.completed": {"response": RESPONSE},
    "response.incomplete": {"response": RESPONSE},
    "response.output_item.added": {"output_index": WHOLE, "item": ITEM},
    "response.output_item.done": {"output_index": WHOLE, "item": ITEM},
    "response.content_part.added": {**_PART_PLACE, "part": PART},
    "response.content_part.done": {**_PART_PLACE, "part": PART},
    "response.output_text.delta": {**_PART_PLACE, "delta": TEXT, "logprobs": LOGPROBS},
    "response.output_text.done": {**_PART_PLACE, "text": TEXT, "logprobs": LOGPROBS},
    "response.function_call_arguments.delta": {**_ITEM_PLACE, "delta": TEXT},
    "response.function_call_arguments.done": {**_ITEM_PLACE, "arguments": TEXT},
}

USER = {"type": "message", "role": "user"}
WEATHER = {
    "type": "function",
    "name": "weather_of",
    "description": "The weather at a place.",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 20}},
        "required": ["place"],
    },
}
DEMANDED = {"tools": [WEATHER], "tool_choice": "required", "temperature": 0}
CASES: dict[str, dict[str, Any]] = {
    "one message": {"input": [{**USER, "content": "Greet me in three words."}]},
    "streamed": {"input": [{**USER, "content": "Count to five."}], "stream": True},
    "a system message": {
        "input": [
            {"type": "message", "role": "system", "content": "Speak as a sailor does."},
            {**USER, "content": "Greet me."},
        ]
    },
    "a tool": {"input": [{**USER, "content": "How is the weather in Rome?"}], **DEMANDED},
    "a tool, streamed": {
        "input": [{**USER, "content": "How is the weather in Rome?"}],
        "stream": True,
        **DEMANDED,
    },
    "several turns": {
        "input": [
            {**USER, "content": "I am called Ada."},
            {"type": "message", "role": "assistant", "content": "Hello Ada."},
            {**USER, "content": "What am I called?"},
        ]
    },
    "several turns with phases": {
        "input": [
            {**USER, "content": "I am called Ada."},
            {"type": "message", "role": "assistant", "content": "Let me see.", "phase": "commentary"},
            {"type": "message", "role": "assistant", "content": "Hello Ada.", "phase": "final_answer"},
            {**USER, "content": "What am I called?"},
        ]
    },
    "all that is repeated": {
        "input": "Hi",
        "reasoning": {"effort": "none"},
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "presence_penalty": 0.5,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "boolean"}}},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_case_of_open_responses_passes(http: httpx.Client, name: str) -> None:
    asked = CASES[name]
    answer = http.post("/v1/responses", json={"model": "demo", "temperature": 0, **asked})
    assert answer.status_code == 200, answer.text
    response = final_of(answer.text) if asked.get("stream") else answer.json()
    jsonschema.validate(response, RESPONSE)
    assert response["status"] == "completed" and response["completed_at"] >= response["created_at"]
    kinds = [item["type"] for item in response["output"]]
    assert kinds and ("tools" not in asked or "function_call" in kinds), kinds
    for name in ("safety_identifier", "prompt_cache_key", "presence_penalty"):
        assert response[name] == asked.get(name, 0 if name == "presence_penalty" else None)


def final_of(text: str) -> Any:
    """The response that a stream ends with, after looking at each of its events."""
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    for number, event in enumerate(events):
        fields = EVENTS[event["type"]]
        jsonschema.validate(event, record(type=TEXT, sequence_number={"const": number}, **fields))
    return events[-1]["response"]
