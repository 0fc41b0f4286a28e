"""Grammars of calls: what they take, in each format; text is free until a call begins."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tiny_llm import LLM
from tiny_llm.decoding.grammar import lark_grammar
from tiny_llm.errors import RequestError
from tiny_llm.messages.chat_format import ChatFormat
from tiny_llm.messages.tool_grammar import calls_grammar, strict_grammar
from tiny_llm.messages.tool_parser import ARGS, CALLS, CLOSE, OPEN, ToolFormat

NUMBER = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
FUNCTIONS = [{"name": "f", "parameters": NUMBER, "strict": True}, {"name": "g", "parameters": NUMBER}]
GOOD, BAD = '{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "arguments": {"b": 1}}'
LOOSE = BAD.replace("f", "g", 1)


def tagged(call: str) -> str:
    return f"{OPEN}\n{call}\n{CLOSE}"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo")


@pytest.fixture(scope="module")
def tags(llm: LLM) -> Mapping[str, int]:
    """The bundled model has no token of Mistral's; another one stands in."""
    ids = {tag: llm.tokenizer.encode(tag, add_special_tokens=False)[0] for tag in (OPEN, CLOSE)}
    return {**ids, CALLS: ids[OPEN]}


def is_taken(llm: LLM, grammar: str, text: str) -> bool:
    """Whether an answer may be that text, and end there."""
    constraint = llm.grammars.compile(lark_grammar(grammar))()
    ids = [*llm.tokenizer.encode(text, add_special_tokens=False), min(llm.end_ids)]
    return all(constraint(ids[:at])[token] for at, token in enumerate(ids))


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("", True),
        ("Hello < you.", True),
        (tagged(GOOD), True),
        (f"Hm.\n{tagged(GOOD)}\n{tagged(GOOD)} Done.", True),
        (tagged(BAD), False),
        (f"Hm. {tagged(BAD)}", False),
        (tagged(LOOSE), True),
        (tagged(GOOD.replace("f", "h", 1)), False),
        (BAD, True),
    ],
)
def test_text_is_free_until_a_call_begins(llm: LLM, tags: Mapping[str, int], text: str, taken: bool) -> None:
    grammar = strict_grammar(FUNCTIONS, "hermes", several=True, tags=tags)
    assert grammar is not None and is_taken(llm, grammar, text) == taken


@pytest.mark.parametrize(("text", "taken"), [("Hi {", True), (GOOD, True), (BAD, False), (LOOSE, True)])
def test_a_bare_call_begins_with_its_brace(llm: LLM, tags: Mapping[str, int], text: str, taken: bool) -> None:
    grammar = strict_grammar(FUNCTIONS, "llama3_json", several=False, tags=tags)
    assert grammar is not None
    assert is_taken(llm, grammar, text.replace("arguments", "parameters")) == taken


@pytest.mark.parametrize("space", ["", " "])
def test_mistrals_calls_are_a_list(llm: LLM, tags: Mapping[str, int], space: str) -> None:
    demanded = calls_grammar(FUNCTIONS, "mistral", several=True, tags=tags)
    strict = strict_grammar(FUNCTIONS, "mistral", several=True, tags=tags)
    assert strict is not None
    for grammar in (demanded, strict):
        assert is_taken(llm, grammar, f"{OPEN}{space}[{GOOD}, {GOOD}]")
        assert not is_taken(llm, grammar, f"{OPEN}{space}[{BAD}]")


def test_mistrals_newer_calls_have_each_a_name_before_their_arguments(
    llm: LLM, tags: Mapping[str, int]
) -> None:
    tags = {**tags, ARGS: tags[CLOSE]}
    demanded = calls_grammar(FUNCTIONS, "mistral_args", several=True, tags=tags)
    alone = calls_grammar(FUNCTIONS, "mistral_args", several=False, tags=tags)
    strict = strict_grammar(FUNCTIONS, "mistral_args", several=True, tags=tags)
    assert strict is not None
    good, bad = f'{OPEN}f{CLOSE}{{"a": 1}}', f'{OPEN}f{CLOSE}{{"b": 1}}'
    for grammar in (demanded, alone, strict):
        assert is_taken(llm, grammar, good)
        assert not is_taken(llm, grammar, bad)
        assert not is_taken(llm, grammar, good.replace("f", "h"))
        assert is_taken(llm, grammar, good + good) == (grammar is not alone)
    assert is_taken(llm, strict, f"Hm. {good} Done.") and is_taken(llm, strict, bad.replace("f", "g"))


@pytest.mark.parametrize("tool_format", ["hermes", "mistral", "mistral_args"])
def test_where_no_token_opens_a_call_nothing_can_wait_for_it(tool_format: ToolFormat) -> None:
    assert strict_grammar(FUNCTIONS, tool_format, several=True, tags={}) is None


def test_parameters_are_an_object(llm: LLM) -> None:
    with pytest.raises(RequestError) as caught:
        ChatFormat.of(llm.tokenizer, tools=[{"type": "function", "function": {"name": "f", "parameters": 5}}])
    assert caught.value.param == "tools[0].function.parameters"
