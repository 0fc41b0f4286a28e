"""Answers held to a form: always valid, whatever the model; what cannot be compiled is a 400."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any, Literal

import jsonschema
import pydantic
import pytest

from tiny_llm import LLM, SamplingParams
from tiny_llm.decoding import structured_output
from tiny_llm.decoding.grammar import schema_grammar
from tiny_llm.server.problems import Problem
from tiny_llm.server.service import GrammarThreads

if TYPE_CHECKING:
    import httpx2 as httpx
    import openai

    from tests.server.conftest import Running

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Describe the red door."}]
HOT = {"temperature": 5, "max_tokens": 400}


def object_of(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


SHORT = {"type": "string", "maxLength": 8}
SCHEMAS: list[dict[str, Any]] = [
    object_of(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 150}),
    object_of(color={"enum": ["red", "green", "blue"]}, ok={"type": "boolean"}, none={"type": "null"}),
    object_of(items={"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4}),
    object_of(inner=object_of(deep=object_of(value={"type": "number", "minimum": -1, "maximum": 1}))),
    {"type": "array", "items": {"anyOf": [SHORT, {"type": "integer"}]}, "minItems": 1, "maxItems": 3},
    object_of(code={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}),
    object_of(day={"type": "string", "format": "date"}, kind={"const": "event"}),
    {
        "$defs": {
            "node": object_of(value={"type": "integer", "maximum": 9, "minimum": 0}, next={"type": "null"})
        },
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/node"}, "right": {"$ref": "#/$defs/node"}},
        "required": ["left", "right"],
        "additionalProperties": False,
    },
]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_a_wild_model_is_always_valid_against_the_schema(http: httpx.Client, number: int) -> None:
    """At temperature 5 the model says nonsense; eight answers at a time must still be of the form."""
    schema = SCHEMAS[number]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    body = {"messages": ASK, "response_format": form, "n": 8, "seed": number, **HOT}
    answer = http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    ended = [choice for choice in choices if choice["finish_reason"] == "stop"]
    assert len(ended) >= 6, "a few may have run into max_tokens"
    for choice in ended:
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_a_stream_is_held_to_its_form_beside_free_ones(running: Running, http: httpx.Client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[0]}}
    with http.stream(
        "POST", CHAT, json={"messages": ASK, "response_format": form, "stream": True, **HOT}
    ) as one:
        free = running.http()
        plain = free.post(CHAT, json={"messages": ASK, "max_tokens": 20, "temperature": 0}).json()
        text = ""
        for line in one.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        again = free.post(CHAT, json={"messages": ASK, "max_tokens": 20, "temperature": 0}).json()
        free.close()
    jsonschema.validate(json.loads(text), SCHEMAS[0])
    assert plain["choices"] == again["choices"], "who is free is not changed by who is not"


def test_the_first_form_waits_for_no_vocabulary(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the interpreter for as long as it takes: a server does that before it is ready."""
    with start() as own, own.http() as client:
        monkeypatch.setattr(structured_output, "LLTokenizer", None)
        answer = client.post(CHAT, json={"messages": ASK, "regex": "[ab]"})
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] in "ab"


def test_parse_gives_a_pydantic_model(client: openai.OpenAI) -> None:
    class Door(pydantic.BaseModel):
        color: Literal["red", "green"]
        width: int

    got = client.chat.completions.parse(model="demo", messages=ASK, response_format=Door, temperature=0)
    assert isinstance(got.choices[0].message.parsed, Door)


def test_json_object_regex_and_grammar(http: httpx.Client) -> None:
    def ask(**form: Any) -> str:
        answer = http.post(
            CHAT, json={"messages": ASK, "temperature": 2, "seed": 1, "max_tokens": 300, **form}
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
        return str(answer.json()["choices"][0]["message"]["content"])

    assert re.fullmatch(r"[a-c]{3}-\d{2}", ask(regex=r"[a-c]{3}-[0-9]{2}"))
    assert ask(grammar='start: "yes" | "no"') in ("yes", "no")
    greedy = http.post(
        CHAT, json={"messages": ASK, "response_format": {"type": "json_object"}, "temperature": 0}
    ).json()["choices"][0]
    assert greedy["finish_reason"] == "length" or isinstance(json.loads(greedy["message"]["content"]), dict)
    assert ask(response_format={"type": "text"}, regex="[01]{4}") in {f"{i:04b}" for i in range(16)}


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "string", "if": {}}, "if"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "robot"}, "robot"),
        ({"$ref": "http://example.com/schema.json"}, "http://example.com"),
        ({"$ref": "file:///etc/passwd"}, "file:///etc/passwd"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "object", "uniqueItems": True, "x-guidance": {"lenient": True}, "not": {}}, "not"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_by_its_keyword(
    http: httpx.Client, schema: dict[str, Any], keyword: str
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = http.post(CHAT, json={"messages": ASK, "response_format": form})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "response_format" and keyword in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"regex": "("}, "regex"),
        ({"regex": ""}, "regex"),
        ({"regex": 5}, "regex"),
        ({"grammar": "start: nothing"}, "grammar"),
        ({"grammar": "no rule at all"}, "grammar"),
        ({"regex": "a", "grammar": 'start: "a"'}, "grammar"),
        ({"regex": "a", "min_tokens": 5}, "min_tokens"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"regex": "a" * 2**18}, "regex"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "text", "more": 1}}, "response_format.more"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "response_format.json_schema.name",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_form_is_refused(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = http.post(CHAT, json={"messages": ASK, **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_compiling_has_a_deadline(llm: LLM) -> None:
    """CVE-2026-55574 and others: a form is not waited for without end, and others can be compiled."""
    params = SamplingParams()
    wide = schema_grammar(object_of(**{f"property_{i}": {"type": "string"} for i in range(2_000)}))

    async def compile_one() -> None:
        with pytest.raises(Problem, match="took more than"):
            await GrammarThreads(1e-4).constrain(llm.grammars, params, wide)
        other = await GrammarThreads(20.0).constrain(llm.grammars, params, schema_grammar(SCHEMAS[0]))
        assert other.constraint is not None

    asyncio.run(compile_one())


@pytest.fixture(scope="module")
def llm(running: Running) -> LLM:
    return running.engine.llm
