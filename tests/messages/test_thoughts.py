"""Who thinks first keeps to the form behind the thought; in a thought nothing is held, and nothing a call."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny_llm import LLM, SamplingParams
from tiny_llm.data import AssistantMessage
from tiny_llm.decoding.grammar import Grammar, lark_grammar, regex_grammar, schema_grammar
from tiny_llm.decoding.stop import StopChecker
from tiny_llm.errors import RequestError
from tiny_llm.messages.chat_format import ChatFormat
from tiny_llm.messages.message import message_of
from tiny_llm.messages.tool_grammar import strict_grammar
from tiny_llm.messages.tool_parser import CLOSE, OPEN

SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOL = {"type": "function", "function": {**FUNCTION, "description": "An f."}}
CALL = f'{OPEN}\n{{"name": "f", "arguments": {{}}}}\n{CLOSE}'
BAD = CALL.replace("{}", '{"a": 1}')
ASK = [{"role": "user", "content": "What is a token?"}]
OPENS = "{%- if add_generation_prompt %}{{ '<think>\\n' }}{%- endif %}"
SWITCHED = (
    "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "text"])
def opening(thinking_model: Callable[..., Path], request: pytest.FixtureRequest) -> LLM:
    """A model whose template opens the thought; its tags are tokens, or text."""
    return LLM(thinking_model(OPENS, has_tags=request.param))


@pytest.fixture(scope="module")
def switched(thinking_model: Callable[..., Path]) -> LLM:
    """A model that opens its thoughts itself, as Qwen3, unless the template says that there is none."""
    return LLM(thinking_model(SWITCHED))


def is_taken(llm: LLM, grammar: Grammar, text: str) -> bool:
    """Whether an answer may be that text, and end there."""
    constraint = llm.grammars.compile(grammar)()
    ids = [*llm.tokenizer.encode(text, add_special_tokens=False), min(llm.end_ids)]
    return all(constraint(ids[:at])[token] for at, token in enumerate(ids))


@pytest.mark.parametrize(
    "form",
    [schema_grammar(SCHEMA), regex_grammar(r"\[[0-9]\]"), lark_grammar('start: "[" N "]"\nN: /[0-9]/')],
    ids=["schema", "regex", "grammar"],
)
def test_a_form_waits_for_the_end_of_a_thought(opening: LLM, form: Grammar) -> None:
    opened, free = replace(form, thought="opened"), replace(form, thought="may")
    thoughts = ["</think>", f"1 < 2?\n{BAD}</think>\n\n", "[1], <b> ünï 🔑\n</think>\n"]
    for thought in thoughts:
        assert is_taken(opening, opened, f"{thought}[1]"), thought
        assert is_taken(opening, free, f"<think>{thought}[1]"), thought
        assert not is_taken(opening, opened, f"{thought}1"), thought
        assert not is_taken(opening, free, f"<think>{thought}1"), thought
    assert is_taken(opening, free, "[1]") and not is_taken(opening, free, "1</think>[1]")
    for unfinished in ("[1]", "hm", "hm</think>", "hm<|im_end|></think>[1]"):
        assert not is_taken(opening, opened, unfinished), "a thought ends by its tag, and the form is kept"


def test_a_strict_functions_calls_may_be_named_in_a_thought(opening: LLM) -> None:
    """There it is no call; behind the thought, one is held to its schema.

    Where the tag is text, and the model opens it, llguidance cannot tell it from other text: only there a
    call in a thought is held, too.
    """
    tags = {tag: opening.tokenizer.encode(tag, add_special_tokens=False)[0] for tag in (OPEN, CLOSE)}
    text = strict_grammar([{**FUNCTION, "strict": True}], "hermes", several=True, tags=tags)
    assert text is not None
    opened, free = (replace(lark_grammar(text), thought=thought) for thought in ("opened", "may"))
    assert is_taken(opening, free, f"<think>Which?</think>\n\nI see. {CALL}")
    is_token = len(opening.tokenizer.encode("<think>", add_special_tokens=False)) == 1
    for grammar, begun in ((opened, ""), (free, "<think>"))[: 1 + is_token]:
        assert is_taken(opening, grammar, f"{begun}Which? {BAD}</think>\n\nI see. {CALL}")
        assert not is_taken(opening, grammar, f"{begun}Which? {BAD}</think>\n\nI see. {BAD}")
    assert not is_taken(opening, free, BAD)


@pytest.mark.parametrize(
    ("template", "prompt", "strict", "thought"),
    [
        (SWITCHED, "<|im_start|>assistant\n", False, "may"),
        (SWITCHED, "<|im_start|>assistant\n<think>\n\n</think>\n\n", False, None),
        (SWITCHED, "<|im_start|>assistant\n<think>\n\n</think>\n\n", True, "may"),
        (OPENS, "<|im_start|>assistant\n<think>\n", False, "opened"),
        ("", "<|im_start|>assistant\n", False, None),
        ("", "<|im_start|>assistant\n", True, "may"),
    ],
)
def test_a_prompt_and_its_template_tell_whether_a_form_waits(
    switched: LLM, monkeypatch: pytest.MonkeyPatch, template: str, prompt: str, strict: bool, thought: str
) -> None:
    """What text is free is read as a thought if it begins as one; a form is only where models think."""
    monkeypatch.setattr(type(switched.tokenizer), "chat_template", template)
    ids = switched.tokenizer.encode(prompt, add_special_tokens=False)
    form = ChatFormat(None, "hermes", grammar=regex_grammar("a"), is_strict=strict)
    after = form.after(switched.tokenizer, ids)
    assert after.grammar is not None and after.grammar.thought == thought
    assert after.thinking == (thought == "opened")


def said(llm: LLM, **asked: Any) -> AssistantMessage:
    """The message of a model that says nonsense, and closes its thought soon where that is a token."""
    tag = llm.tokenizer.encode("</think>", add_special_tokens=False)
    bias = {tag[0]: 8.0} if len(tag) == 1 else None
    params = SamplingParams(max_tokens=600, temperature=2.0, seed=4, logit_bias=bias)
    chunks = list(llm.stream_chat(ASK, params, **asked))
    ended = chunks[-1].completion
    assert ended is not None and ended.error is None, ended
    assert ended.message is not None, ended
    streamed = message_of([delta for chunk in chunks for delta in chunk.deltas])
    assert streamed == ended.message
    return ended.message


@pytest.mark.parametrize("opening", [True], indirect=True, ids=["tokens"])
def test_a_thinking_model_thinks_and_then_answers_in_the_form(opening: LLM) -> None:
    message = said(opening, response_format=FORM)
    assert message.reasoning and isinstance(json.loads(message.content or ""), list), message


@pytest.mark.parametrize("opening", [True], indirect=True, ids=["tokens"])
def test_a_thinking_model_thinks_and_then_makes_the_call_that_is_demanded(opening: LLM) -> None:
    message = said(opening, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    assert message.reasoning and message.content is None, message
    assert [(call.name, call.arguments) for call in message.tool_calls] == [("f", "{}")]


def test_a_form_that_cannot_be_kept_is_refused_though_a_thought_comes_first(opening: LLM) -> None:
    for bad in (regex_grammar("("), lark_grammar("start: start"), schema_grammar({"not": {}})):
        with pytest.raises(RequestError) as caught:
            opening.grammars.compile(replace(bad, thought="opened"))
        assert caught.value.param == bad.param


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            f"Which? {BAD}\n</tool_call></think>\n\nI see.\n{CALL} and more",
            f"I see.\n{CALL.rpartition('}')[0]}}}",
        ),
        (f"</think>{CALL.replace('f', 'x', 1)}{CALL}more", None),
        (f"</think>{CALL.replace('{}', '{' + repr(CLOSE).replace(chr(39), chr(34)) + ': 1}')} more", None),
    ],
)
def test_the_only_call_that_is_wanted_ends_the_answer_and_a_thoughts_does_not(
    opening: LLM, text: str, shown: str | None
) -> None:
    """Nor one of a function that is not offered, nor a tag within an argument."""
    form = replace(ChatFormat.of(opening.tokenizer, tools=[TOOL], parallel_tool_calls=False), thinking=True)
    ids = opening.tokenizer.encode(text, add_special_tokens=False)
    checker = StopChecker(opening.tokenizer.stream(), form.params(SamplingParams(max_tokens=len(ids))), ())
    for token in ids:
        checker.push(token)
        fork = checker.copy()
        if checker.finish_reason:
            break
    assert checker.finish_reason == "stop" and fork.finish_reason == "stop"
    assert checker.shown_tokens == checker.num_tokens
    assert not checker.text.endswith("more") and checker.text.endswith("}}")
    if shown is not None:
        assert checker.text.endswith(shown)
    parser = form.parser()
    (call,) = message_of(parser.push(checker.text) + parser.finish()).tool_calls
    assert call.name == "f" and isinstance(json.loads(call.arguments), dict)
