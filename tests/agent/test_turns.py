"""Steps as messages: whole calls or objects of JSON, and nothing that a result says is a turn of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tiny_llm.agent.history import RunHistory, RunStep, step_turns, turns

pytestmark = pytest.mark.chapter("3.7")

ACTION = {"name": "read", "arguments": {"path": "a", "first": 1, "last": 2}}
STEP = RunStep(ACTION, "why", "one\ntwo", "1. read a")
MARKS = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_response>", "<think>", "</s>", "<|eot_id|>")


def test_a_step_is_a_call_and_its_result() -> None:
    called, result = step_turns(7, STEP, calls=True)
    (call,) = called["tool_calls"]
    assert (called["role"], called["content"]) == ("assistant", "why")
    assert (call["id"], call["type"], call["function"]["name"]) == ("call_00007", "function", "read")
    assert isinstance(call["function"]["arguments"], str), "arguments are a text of JSON"
    assert json.loads(call["function"]["arguments"]) == ACTION["arguments"]
    assert result == {"role": "tool", "tool_call_id": "call_00007", "content": "one\ntwo"}


def test_who_says_nothing_beside_a_call_has_no_content() -> None:
    assert step_turns(1, replace(STEP, said=""), calls=True)[0]["content"] is None


def test_a_step_is_an_object_and_its_result() -> None:
    said, result = step_turns(7, STEP, calls=False)
    assert said["role"] == "assistant"
    assert said["content"] == json.dumps({"thought": "why", "action": ACTION})
    assert result == {"role": "user", "content": "Result:\none\ntwo"}


@pytest.mark.parametrize("calls", [True, False])
def test_what_was_no_action_is_told_as_it_was_said(calls: bool) -> None:
    step = RunStep(None, "hm", "That was no valid action: x", "2. no action")
    said, told = step_turns(2, step, calls=calls)
    assert said == {"role": "assistant", "content": "hm"}
    assert told == {"role": "user", "content": "That was no valid action: x"}
    empty = step_turns(2, replace(step, said=""), calls=calls)[0]
    assert empty["content"] == "...", "templates refuse an empty turn"


@pytest.mark.parametrize("calls", [True, False])
@pytest.mark.parametrize("step", [STEP, replace(STEP, action=None)], ids=["action", "none"])
def test_the_users_hint_comes_last_and_as_it_is(step: RunStep, calls: bool) -> None:
    without = step_turns(1, step, calls=calls)
    hint = "  Mind <|im_end|>.\n"
    hinted = step_turns(1, replace(step, hint=hint), calls=calls)
    assert hinted == [*without, {"role": "user", "content": hint}]
    assert len(without) == 2


def texts(given: Any) -> list[str]:
    """All texts of messages."""
    if isinstance(given, dict):
        return [text for value in given.values() for text in texts(value)]
    if isinstance(given, list):
        return [text for value in given for text in texts(value)]
    return [given] if isinstance(given, str) else []


@pytest.mark.parametrize("calls", [True, False])
@pytest.mark.parametrize("where", ["shown", "said", "arguments", "no action", "what was no action"])
def test_no_mark_is_left_in_what_others_say(where: str, calls: bool) -> None:
    attack = "".join(f"4{mark}2" for mark in MARKS)
    step = {
        "shown": replace(STEP, shown=attack),
        "said": replace(STEP, said=attack),
        "arguments": replace(STEP, action={"name": "read", "arguments": {"path": attack}}),
        "no action": RunStep(None, "hm", attack, ""),
        "what was no action": RunStep(None, attack, "x", ""),
    }[where]
    told = step_turns(1, step, calls=calls)
    assert not [mark for text in texts(told) for mark in MARKS if mark in text]
    assert [text for text in texts(told) if attack.replace("<", "< ") in text], "it is readable all the same"


@pytest.mark.parametrize("calls", [True, False])
def test_a_text_is_told_whole_and_with_its_spaces(calls: bool) -> None:
    text = "  \n" + "word " * 2000 + "\n\n"
    said, told = step_turns(1, replace(STEP, shown=text, said=text), calls=calls)
    assert told["content"].endswith(text)
    assert (said["content"] if calls else json.loads(said["content"])["thought"]) == text


def test_what_is_no_mark_stays() -> None:
    text = 'if a < b and "<p>" in c: x |= d <| e'
    assert step_turns(1, replace(STEP, shown=text), calls=True)[1]["content"] == text


@pytest.mark.parametrize("calls", [True, False])
def test_a_prompt_begins_with_the_one_before_it(calls: bool) -> None:
    """So the prefix cache has all of it: a step has its number for good, and says the same each time."""
    history, before = RunHistory("do it"), []
    for number in range(3):
        history = history.with_step(replace(STEP, said=f"{number}"))
        now = [turn for at, step in enumerate(history.steps, 1) for turn in step_turns(at, step, calls=calls)]
        assert now[: len(before)] == before
        before = now
    if calls:
        assert turns(history)[2:] == before
        assert [turn["tool_call_id"][-1] for turn in before if turn["role"] == "tool"] == ["1", "2", "3"]


@pytest.mark.parametrize("calls", [True, False])
def test_a_step_is_left_as_it_is(calls: bool) -> None:
    action = json.loads(json.dumps(ACTION))
    step_turns(1, replace(STEP, action=action, shown="<think>"), calls=calls)
    assert action == ACTION
