"""An action is one of a tool that is there, with the arguments that it wants: checked, and as a grammar."""

from __future__ import annotations

import json
from functools import cache
from typing import Annotated, Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import Field

from tiny_llm.agent.action import Actions, AgentTool, Arguments, Outcome, Prepared
from tiny_llm.decoding.grammar import schema_grammar
from tiny_llm.errors import RequestError

pytestmark = pytest.mark.chapter("3.7")


class _Walk(Arguments):
    where: str
    steps: Annotated[int, Field(ge=1)]


class _Visit(Arguments):
    stops: list[str]


def never(_: Any) -> Prepared:
    raise AssertionError("nothing is prepared while an action is checked")


WALK = AgentTool.of("walk", "Go somewhere.", _Walk, never)
VISIT = AgentTool.of("visit", "Go to many places.", _Visit, never)
HAND = {"type": "string", "enum": ["left", "right"]}
WAVE = AgentTool(
    "wave",
    "Another's tool.",
    {"type": "object", "properties": {"hand": HAND}, "required": ["hand"], "additionalProperties": False},
    never,
)
ACTIONS = Actions([WALK, VISIT, WAVE])


def why(what: Any, *given: Any) -> str:
    """The error that it ends with, in a line."""
    with pytest.raises(RequestError) as caught:
        what(*given)
    assert "\n" not in str(caught.value), "the model reads one line"
    return str(caught.value)


def test_arguments_are_what_the_tool_wants() -> None:
    given = {"where": "home", "steps": 3}
    assert WALK.arguments(given) == _Walk(where="home", steps=3)
    assert given == {"where": "home", "steps": 3}, "what was given is left as it was"


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"where": "home"}, "steps: Field required"),
        ({"where": "home", "steps": 0}, "steps: Input should be greater than or equal to 1"),
        ({"where": "home", "steps": "3"}, "steps: Input should be a valid integer"),
        ({"where": "home", "steps": True}, "steps: Input should be a valid integer"),
        ({"where": 3, "steps": 3}, "where: Input should be a valid string"),
        ({"where": "home", "steps": 3, "fast": True}, "fast: Extra inputs are not permitted"),
        ({}, "where: Field required"),
        ({"where": 3, "steps": 0}, "where: Input should be a valid string"),
    ],
)
def test_other_arguments_are_refused_with_the_first_place(given: Any, where: str) -> None:
    assert why(WALK.arguments, given) == f"walk: {where}."


def test_a_place_within_an_argument_is_told_with_points() -> None:
    assert why(VISIT.arguments, {"stops": ["a", 2]}) == "visit: stops.1: Input should be a valid string."


@pytest.mark.parametrize("tool", [WALK, WAVE], ids=lambda tool: tool.name)
@pytest.mark.parametrize("given", [None, [], [["where", "home"]], 7, '{"where": "home", "steps": 3}'])
def test_arguments_are_an_object(tool: AgentTool, given: Any) -> None:
    assert why(tool.arguments, given) == f"{tool.name}: the arguments are {given!r}, but must be an object."


def test_arguments_of_anothers_tool_are_handed_on() -> None:
    for given in ({"hand": "left"}, {"foot": 7}, {}):
        assert WAVE.arguments(given) is given, "its server checks them"


def test_an_action_is_found_by_its_name() -> None:
    action = {"name": "walk", "arguments": {"where": "home", "steps": 3}}
    assert ACTIONS.find(action) == (WALK, _Walk(where="home", steps=3))
    assert ACTIONS.find({"name": "wave", "arguments": {"hand": "left"}}) == (WAVE, {"hand": "left"})


@pytest.mark.parametrize("name", ["run", "finish", "Walk", "", "walk ", None, 7, True, ["walk"], {"walk": 1}])
def test_another_name_is_told_what_there_is(name: Any) -> None:
    told = why(ACTIONS.find, {"name": name, "arguments": {"where": "home", "steps": 3}})
    assert told.startswith(f"There is no action {name!r}, but: walk, visit, wave.")


def test_a_near_name_is_told() -> None:
    assert why(ACTIONS.find, {"name": "visti"}).endswith("wave. Did you mean 'visit'?")
    assert "mean" not in why(ACTIONS.find, {"name": "launch"})
    assert why(ACTIONS.find, {}) == "There is no action None, but: walk, visit, wave."
    assert why(Actions([]).find, {"name": "walk"}) == "There is no action 'walk', but: none."


def test_a_name_is_a_text_and_compared_as_it_is() -> None:
    actions = Actions([AgentTool(name, "", {}, never) for name in ("7", "None", "True")])
    for name in (7, None, True):
        assert why(actions.find, {"name": name, "arguments": {}}).startswith(f"There is no action {name!r}")
    assert why(actions.find, {"arguments": {}}).startswith("There is no action None")


def test_arguments_of_what_is_found_are_checked() -> None:
    for action in ({"name": "walk"}, {"name": "walk", "arguments": None}):
        assert why(ACTIONS.find, action) == "walk: the arguments are None, but must be an object."
    told = why(ACTIONS.find, {"name": "walk", "arguments": {"where": "home", "steps": 0}})
    assert told.startswith("walk: steps: ")


def test_prepare_is_the_tools_own() -> None:
    tool = AgentTool.of("walk", "", _Walk, lambda given: Prepared(f"walk {given.where}", lambda: Outcome("")))
    found, arguments = Actions([tool]).find({"name": "walk", "arguments": {"where": "home", "steps": 1}})
    assert found.prepare(arguments).what == "walk home"


@cache
def grammar(schema: str) -> str:
    """A grammar, made once for all texts."""
    return schema_grammar(json.loads(schema)).text


def can_be_drawn(text: str, actions: Actions = ACTIONS) -> bool:
    """Whether a grammar of the actions' schema leaves the whole of a text, and lets it end there."""
    tokens = LLTokenizer("byte")
    matcher = LLMatcher(tokens, grammar(json.dumps(actions.schema())))
    return bool(matcher.try_consume_tokens(ids := tokens.tokenize_str(text)) == len(ids)) and bool(
        matcher.is_accepting()
    )


def said(name: str, arguments: Any, thought: str = "why") -> str:
    return json.dumps({"thought": thought, "action": {"name": name, "arguments": arguments}})


@pytest.mark.parametrize(
    "text",
    [
        said("walk", {"where": "home", "steps": 3}),
        said("walk", {"where": "", "steps": 10**6}, thought=""),
        said("visit", {"stops": []}),
        said("wave", {"hand": "left"}),
        said("finish", {"answer": "done"}),
    ],
)
def test_an_action_can_be_drawn(text: str) -> None:
    assert can_be_drawn(text)


@pytest.mark.parametrize(
    "text",
    [
        said("run", {"where": "home", "steps": 3}),
        said("walk", {"hand": "left"}),
        said("walk", {"answer": "done"}),
        said("walk", {"where": "home"}),
        said("walk", {"where": "home", "steps": "3"}),
        said("walk", {"where": "home", "steps": 3, "fast": True}),
        said("walk", {}),
        said("wave", {"hand": "both"}),
        said("finish", {}),
        said("finish", {"answer": 7}),
        said("finish", {"answer": "done", "sure": True}),
        json.dumps({"thought": "why", "action": {"name": "finish"}}),
        json.dumps({"thought": "why", "action": "walk"}),
        json.dumps({"thought": "why", "action": [{"name": "finish", "arguments": {"answer": "done"}}]}),
        json.dumps({"thought": 7, "action": {"name": "finish", "arguments": {"answer": "done"}}}),
        json.dumps({"thought": None, "action": {"name": "finish", "arguments": {"answer": "done"}}}),
        json.dumps({"action": {"name": "finish", "arguments": {"answer": "done"}}}),
        json.dumps({"name": "finish", "arguments": {"answer": "done"}}),
        '{"thought": "why"}',
        "I am done.",
        "",
    ],
)
def test_what_is_no_action_cannot_be_drawn(text: str) -> None:
    assert not can_be_drawn(text)


def test_no_key_can_be_beside_and_no_second_action_behind() -> None:
    whole = json.loads(said("finish", {"answer": "done"}))
    assert not can_be_drawn(json.dumps({**whole, "next": 1}))
    assert not can_be_drawn(json.dumps({**whole, "action": {**whole["action"], "id": 1}}))
    assert not can_be_drawn(2 * said("finish", {"answer": "done"}))


def test_the_thought_comes_before_the_action() -> None:
    """What is said first is what the model has thought of when it chooses."""
    whole = json.loads(said("finish", {"answer": "done"}))
    assert not can_be_drawn(json.dumps(dict(reversed(whole.items()))))


def test_other_servers_know_the_words_of_the_schema() -> None:
    """Those that hold a schema want anyOf, and all properties required and no others."""
    action = ACTIONS.schema()["properties"]["action"]
    assert list(action) == ["anyOf"]
    assert all(one["required"] == ["name", "arguments"] for one in action["anyOf"])
    names = [one["properties"]["name"]["enum"] for one in action["anyOf"]]
    assert sorted(names) == [["finish"], ["visit"], ["walk"], ["wave"]]


def test_a_run_without_tools_can_only_end() -> None:
    assert can_be_drawn(said("finish", {"answer": "done"}), Actions([]))
    assert not can_be_drawn(said("walk", {"where": "home", "steps": 3}), Actions([]))


def test_a_schema_with_references_is_left_to_its_server() -> None:
    """A reference leads from the root of a schema, and would lead elsewhere in ours."""
    parameters = {"$defs": {"A": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/A"}}}
    actions = Actions([AgentTool("far", "", parameters, never), WALK])
    assert can_be_drawn(said("far", {"b": 1}), actions)
    assert not can_be_drawn(said("near", {"b": 1}), actions)
    assert not can_be_drawn(said("walk", {"b": 1}), actions)


def test_tools_are_left_as_they_are() -> None:
    before = json.dumps(dict(WAVE.parameters))
    assert ACTIONS.schema() == ACTIONS.schema()
    assert json.dumps(dict(WAVE.parameters)) == before and "finish" not in ACTIONS.by_name
