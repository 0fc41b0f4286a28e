"""What an answer must match: made from a schema, a regex, a grammar; compiled once; copied at any token."""

from __future__ import annotations

import json
import re
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny_llm import LLM, SamplingParams
from tiny_llm.decoding import structured_output
from tiny_llm.decoding.grammar import lark_grammar, regex_grammar, response_grammar, schema_grammar
from tiny_llm.decoding.regex import constraint_ref
from tiny_llm.decoding.structured_output import GrammarCompiler
from tiny_llm.errors import ConfigError, RequestError

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}

NEEDS_ITSELF = {
    "type": "object",
    "properties": {"a": {"$ref": "#"}},
    "required": ["a"],
    "additionalProperties": False,
}
CIRCLE = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
BROAD = {
    "type": "object",
    "properties": {f"p{number}": {"type": "integer"} for number in range(2_000)},
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo")


@pytest.fixture
def compiler(llm: LLM) -> GrammarCompiler:
    return GrammarCompiler(llm.tokenizer, llm.config.vocab_size, llm.end_ids)


def test_a_grammar_is_compiled_once_and_the_latest_are_kept(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured_output, "MAX_KEPT", 2)
    a, b, c = (regex_grammar(letter) for letter in "abc")
    first, again = compiler.compile(a), compiler.compile(a)
    assert first() is not again(), "each answer has a place of its own"
    compiler.compile(b)
    compiler.compile(a)
    compiler.compile(c)
    assert [compiler.is_kept(one) for one in (a, b, c)] == [True, False, True], "b was asked for longest ago"


def test_a_copy_at_any_token_goes_on_by_itself(llm: LLM, compiler: GrammarCompiler) -> None:
    """Beams fork an answer in its middle: what one of them draws then is nothing to the others."""
    one = llm.tokenizer.encode('{"x": 1, "y": 2}', add_special_tokens=False)
    other = llm.tokenizer.encode('{"x": 34567, "y": -2}', add_special_tokens=False)
    make = compiler.compile(schema_grammar(POINT))

    def masks(tokens: list[int]) -> list[bytes]:
        constraint = make()
        return [constraint(tokens[:end]) for end in range(len(tokens) + 1)]

    alone, shared = masks(other), next(i for i in range(9) if one[i] != other[i])
    for at in range(shared + 1):
        constraint = make()
        for end in range(at + 1):
            constraint(one[:end])
        fork = copy(constraint)
        for end in range(at + 1, len(one) + 1):  # the first goes its way
            constraint(one[:end])
        assert [fork(other[:end]) for end in range(at, len(other) + 1)] == alone[at:], f"forked at {at}"


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, schema_grammar({"type": "object"})),
        ({"type": "json_schema", "json_schema": {"name": "p", "schema": POINT}}, schema_grammar(POINT)),
        ({"type": "json_schema", "json_schema": {"name": "p"}}, schema_grammar({})),
    ],
)
def test_a_response_format_is_a_grammar(given: Any, grammar: object) -> None:
    assert response_grammar(given) == grammar


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": 5}}, "response_format.json_schema"),
        ({"type": "yaml"}, "response_format"),
        ({}, "response_format"),
        ("json", "response_format"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": {1, 2}}}}, "response_format"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": float("nan")}}}, "response_format"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": "\ud800"}}}, "response_format"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": "a" * 2**18}}}, "response_format"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_response_format_is_refused(given: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        response_grammar(given)
    assert caught.value.param == param and param in str(caught.value)


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: regex_grammar("("), "regex"),
        (lambda: regex_grammar("a" * 2**18), "regex"),
        (lambda: lark_grammar("no rule"), "grammar"),
        (lambda: lark_grammar("start: start"), "grammar"),
        (lambda: lark_grammar('start: "a" start'), "grammar"),
        (lambda: lark_grammar('start: "a" <[2045-2045]> "b"'), "grammar"),
        (lambda: schema_grammar({"$ref": "#"}), "response_format"),
        (lambda: schema_grammar({"allOf": [{"$ref": "#"}]}), "response_format"),
        (lambda: schema_grammar(NEEDS_ITSELF), "response_format"),
        (lambda: schema_grammar({"type": "array", "items": NEEDS_ITSELF, "minItems": 1}), "response_format"),
        (lambda: schema_grammar(CIRCLE), "response_format"),
        (lambda: schema_grammar(BROAD), "response_format"),
        (lambda: schema_grammar({"not": {}}), "response_format"),
    ],
)
def test_what_cannot_be_kept_is_refused_without_a_parsers_inner_state(
    compiler: GrammarCompiler, make: Any, param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        compiler.compile(make())
    assert caught.value.param == param and param in str(caught.value)
    assert not re.search("<state|<non|items|bias", str(caught.value), re.I) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"$ref": "#/$defs/leaf"}, NEEDS_ITSELF], "$defs": {"leaf": {"type": "null"}}},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False},
        {"type": "array", "items": {"$ref": "#"}},
        {"$defs": {"a/b": {"type": "integer"}}, "$ref": "#/$defs/a~1b"},
    ],
)
def test_a_schema_that_may_refer_to_itself_can_be_kept(
    compiler: GrammarCompiler, schema: dict[str, Any]
) -> None:
    compiler.compile(schema_grammar(schema))


@pytest.mark.parametrize(
    ("make", "answer"),
    [
        (lambda: schema_grammar({"const": "<tool_call>"}), '"<tool_call>"'),
        (lambda: schema_grammar({"enum": ["a <|im_end|> b"]}), '"a <|im_end|> b"'),
        (lambda: regex_grammar(r"x<\|im_end\|>y"), "x<|im_end|>y"),
        (lambda: lark_grammar('start: "<tool_call>" "a"'), "<tool_call>a"),
        (lambda: lark_grammar('start: <tool_call> "a"'), "<tool_call>a"),
    ],
)
def test_the_text_of_an_added_token_is_kept(llm: LLM, make: Any, answer: str) -> None:
    """As letters; as the token where a grammar names that."""
    params = llm.grammars.constrain(SamplingParams(max_tokens=40), make())
    (completion,) = llm.generate("Say it.", params)
    assert completion.error is None and completion.text == answer, completion


@pytest.mark.parametrize(
    "form",
    [
        'start: "a" {end} "b"',
        "start: /a+/ {end}",
        'start: "a" x\nx: "b" | {end} // "c"',
        'start: "a" ({end} "a")*',
    ],
)
@pytest.mark.parametrize("end", ["<|im_end|>", "<[{id}]>", "<[5,{id}]>"])
def test_a_grammar_that_names_what_ends_an_answer_is_refused(llm: LLM, form: str, end: str) -> None:
    """The answer would end there, complete or not."""
    (im_end,) = llm.tokenizer.encode("<|im_end|>", add_special_tokens=False)
    with pytest.raises(RequestError, match="ends an answer") as caught:
        llm.grammars.compile(lark_grammar(form.format(end=end.format(id=im_end))))
    assert caught.value.param == "grammar"


def test_text_and_comments_name_no_token(llm: LLM) -> None:
    (im_end,) = llm.tokenizer.encode("<|im_end|>", add_special_tokens=False)
    form = rf'start: "<|im_end|>" /<\|im_end\|>/ // <|im_end|> and <[{im_end}]>'
    params = llm.grammars.constrain(SamplingParams(max_tokens=40), lark_grammar(form))
    assert llm.generate("Say it.", params)[0].text == "<|im_end|>" * 2


@pytest.mark.parametrize("some", ["<[*]>", "<[^5]>", "<[2040-2047]>"])
def test_a_token_of_many_is_none_that_ends_an_answer_before_it_is_complete(llm: LLM, some: str) -> None:
    grammar = lark_grammar(f'start: "a" {some} "b"')
    place = llm.grammars.compile(grammar)()
    (a,) = llm.tokenizer.encode("a", add_special_tokens=False)
    allowed = place([a])
    assert any(allowed) and not any(allowed[end] for end in llm.end_ids)


def test_the_vocabulary_has_each_tokens_bytes(llm: LLM) -> None:
    tokenizer = llm.tokenizer
    assert tokenizer.vocabulary() == [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]


def test_a_sentencepiece_vocabulary_keeps_forms_too(shared_data: Path) -> None:
    """Its first token has a space of its own, which the text in a form has not."""
    llama = LLM(shared_data / "models" / "stories260K")
    schema = {"type": "object", "properties": {"the name": {"const": "a <s> b"}}, "required": ["the name"]}
    grammar = schema_grammar({**schema, "additionalProperties": False})
    (completion,) = llama.generate("Once", llama.grammars.constrain(SamplingParams(max_tokens=60), grammar))
    assert json.loads(completion.text) == {"the name": "a <s> b"}, completion


def test_a_form_by_hand_gives_the_same_answers(llm: LLM) -> None:
    """Where the text is never forced, the masks are the same, and so is all that follows from them."""
    marks, pattern = set(llm.tokenizer.marks()), r"[0-9]+(\.[0-9]+)?"
    known = [b"" if i in marks else token for i, token in enumerate(llm.tokenizer.vocabulary())]
    known += [b""] * (llm.config.vocab_size - len(known))
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, n=4)
    by_hand = replace(params, constraint=constraint_ref(pattern, known, llm.end_ids))
    library = llm.grammars.constrain(params, regex_grammar(pattern))
    mine, theirs = (llm.generate("How much is it?", one) for one in (by_hand, library))
    assert [one.token_ids for one in mine] == [one.token_ids for one in theirs]
    assert len({one.text for one in mine}) > 1 and not any(one.error for one in mine)


def test_a_whole_number_may_be_written_with_a_point(compiler: GrammarCompiler) -> None:
    pair = {"type": "array", "items": {"type": "integer"}, "maxItems": 2}
    data = {"properties": {"maxItems": {"const": {"maxItems": 2.0}}}}
    assert schema_grammar({**pair, "maxItems": 2.0}) == schema_grammar(pair)
    assert '"maxItems": 2.0' in schema_grammar(data).text.replace('":2.0', '": 2.0'), "data stay as they are"
    compiler.compile(schema_grammar({"$defs": {"maxItems": {**pair, "maxItems": 2.0}}, **pair}))


def test_an_answer_cannot_go_on_beyond_its_form(compiler: GrammarCompiler) -> None:
    grammar = regex_grammar("a")
    for params, param in (
        (SamplingParams(min_tokens=2), "min_tokens"),
        (SamplingParams(ignore_eos=True), "ignore_eos"),
        (SamplingParams(constraint=compiler.compile(grammar)), "regex"),
    ):
        with pytest.raises(RequestError) as caught:
            compiler.constrain(params, grammar)
        assert caught.value.param == param


def test_a_tokenizer_that_knows_more_tokens_than_the_model(demo_copy: Path) -> None:
    tokenizer = json.loads((demo_copy / "tokenizer.json").read_text())
    last = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"].append({**last, "id": 2048, "content": "<|new|>"})
    (demo_copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    wide = LLM(demo_copy)
    params = wide.grammars.constrain(SamplingParams(max_tokens=9), regex_grammar("[0-9]{3}"))
    (completion,) = wide.generate("Count:", params)
    assert completion.error is None and re.fullmatch("[0-9]{3}", completion.text), completion


def test_a_model_without_end_tokens_is_told_that_no_form_could_end(llm: LLM) -> None:
    endless = GrammarCompiler(llm.tokenizer, llm.config.vocab_size, ())
    with pytest.raises(ConfigError, match="names no end token"):
        endless.compile(regex_grammar("a"))
