"""Past calls and tools before templates of each family's way: shown as they are, or refused; never lost.

The templates are our own, as small as they can be and still differ as the published ones do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from tiny_llm.errors import RequestError
from tiny_llm.messages.chat_prompt import ChatPrompts
from tiny_llm.tokenizer.files import TokenizerFiles
from tiny_llm.tokenizer.tokenizer import Tokenizer

HEAD = "{% for m in messages %}{% if m.role == 'user' or m.role == 'system' %}<{{ m.role }}>{{ m.content }}"
TOOLS = "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
FAMILIES: Mapping[str, str] = {
    # Qwen2.5, Hermes: the object is written by tojson
    "object": TOOLS + HEAD + "{% elif m.role == 'assistant' %}<assistant>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</call>{% endfor %}{% elif m.role == 'tool' %}<result>{{ m.content }}{% endif %}{% endfor %}",
    # Qwen3: either
    "either": TOOLS + HEAD + "{% elif m.role == 'assistant' %}<assistant>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
    "{% endfor %}{% elif m.role == 'tool' %}<result>{{ m.content }}{% endif %}{% endfor %}",
    # DeepSeek: text, and calls only where content is none; shows no tools
    "text": HEAD + "{% elif m.role == 'assistant' and m.content is none %}<assistant>"
    "{% for c in m.tool_calls %}{{ '<call>' + c.function.name + '\n' + c.function.arguments }}{% endfor %}"
    "{% elif m.role == 'assistant' %}<assistant>{{ m.content }}<end>"
    "{% elif m.role == 'tool' %}<result>{{ m.content }}{% endif %}{% endfor %}",
    # Mistral: ids of nine characters, turns that alternate, tools at the last question
    "mistral": "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% set ns = namespace(n=0) %}{% for m in messages if m.role != 'tool' and m.tool_calls is not defined %}"
    "{% if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == asked[-1] %}[TOOLS]{{ tools | tojson }}{% endif %}[INST]{{ m.content }}[/INST]"
    "{% elif m.tool_calls is defined %}[CALLS][{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' }}{{ ', ' if not loop.last }}{% endfor %}]"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('9') }}{% endif %}"
    "[RESULT]{{ m.tool_call_id }} {{ m.content }}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
    # LLaMA 3.1: one call a message, in place of its text
    "llama": TOOLS + "{% for m in messages %}{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls only') }}{% endif %}"
    '<assistant>{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}<{{ m.role }}>{{ m.content | trim }}{% endif %}{% endfor %}",
    # Qwen3-Coder, GLM: no JSON, an argument a line
    "lines": TOOLS + HEAD + "{% elif m.role == 'assistant' %}<assistant>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}{% endfor %}"
    "{% elif m.role == 'tool' %}<result>{{ m.content }}{% endif %}{% endfor %}",
    # Hermes 2 Pro: a tool must say all that it may; results have names; an empty content shows as None
    "named": "{% for t in tools or [] %}{{ t.function.name + ': ' + t.function.description }}"
    "{% for p in t.function.parameters.properties %} {{ p }}{% endfor %}\n{% endfor %}"
    + HEAD
    + "{% elif m.role == 'assistant' %}<assistant>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function | tojson }}{% endfor %}"
    "{% elif m.role == 'tool' %}<result>{{ m.name + ' ' + m.content }}{% endif %}{% endfor %}",
    # Zephyr, DeepSeek-coder: what they do not know is left out
    "none": HEAD + "{% elif m.role == 'assistant' %}<assistant>{{ m.content }}{% endif %}{% endfor %}",
    # Qwen1.5: every message's content, whatever the role
    "contents": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    # Mistral v0.1 and others whose system message goes nowhere
    "no system": "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}",
}
WITH_CALLS = ("object", "either", "text", "mistral", "llama", "lines", "named")
TOOL: Mapping[str, Any] = {"type": "function", "function": {"name": "look"}}
USER: Mapping[str, Any] = {"role": "user", "content": "Q"}
ID = "call-0123456789abcdef"


def prompts(family: str) -> ChatPrompts:
    files = TokenizerFiles(Backend(models.BPE()), {}, {"default": FAMILIES[family]}, add_bos=None)
    return ChatPrompts(Tokenizer(files))


def calling(*arguments: object, content: str | None = None) -> dict[str, Any]:
    calls = [
        {"id": f"{ID}{n}", "type": "function", "function": {"name": f"look{n}", "arguments": one}}
        for n, one in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(number: int = 0, content: str = "R") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"{ID}{number}", "content": content}


ASKED = '{"of": "a \\"b\\""}'


@pytest.mark.parametrize(
    ("family", "shown"),
    [
        ("object", '<user>Q<assistant><call>{"name": "look0", "arguments": ' + ASKED + "}</call><result>R"),
        ("either", f"<user>Q<assistant><call>look0 {ASKED}<result>R"),
        ("text", f"<user>Q<assistant><call>look0\n{ASKED}<result>R"),
        ("llama", '<user>Q<assistant>{"name": "look0", "parameters": ' + ASKED + "}<tool>R"),
        ("lines", '<user>Q<assistant><call>look0<of>a "b"<result>R'),
        ("named", '<user>Q<assistant><call>{"name": "look0", "arguments": ' + ASKED + "}<result>look0 R"),
    ],
)
def test_a_past_call_is_shown_as_it_was(family: str, shown: str) -> None:
    assert prompts(family).text([USER, calling(ASKED), result()]) == shown
    assert prompts(family).text([USER, calling(json.loads(ASKED)), result()]) == shown, "as LLM.chat's users"


def test_ids_are_nine_characters_where_the_template_demands_it() -> None:
    text = prompts("mistral").text([USER, calling(ASKED), result()])
    (call,) = json.loads(text.partition("[CALLS]")[2].partition("[RESULT]")[0])
    assert call == {"name": "look0", "arguments": json.loads(ASKED), "id": call["id"]}
    assert len(call["id"]) == 9 and text.endswith(f"[RESULT]{call['id']} R"), "one id for call and result"
    own = [USER, calling(ASKED), result()]
    own[1]["tool_calls"][0]["id"] = own[2]["tool_call_id"] = "abcDEF123"
    assert "abcDEF123" in prompts("mistral").text(own), "an id that will do is kept"


@pytest.mark.parametrize("family", WITH_CALLS)
@pytest.mark.parametrize("given", ["", "  ", "null", None, "{}", {}], ids=repr)
def test_no_arguments_are_an_empty_object(family: str, given: object) -> None:
    empty = prompts(family).text([USER, calling("{}"), result()])
    assert prompts(family).text([USER, calling(given), result()]) == empty


CUT = '{"of": "a'


@pytest.mark.parametrize(
    ("family", "shown"),
    [
        ("object", json.dumps(CUT)),
        ("either", CUT),
        ("text", CUT),
        ("mistral", json.dumps(CUT)),
        ("llama", json.dumps(CUT)),
        ("lines", "<of>a<"),  # it wants an object: the one that was begun
        ("named", json.dumps(CUT)),
    ],
)
def test_arguments_cut_short_by_a_token_limit_are_taken(family: str, shown: str) -> None:
    assert shown in prompts(family).text([USER, calling(CUT), result(content="invalid arguments")])


def test_what_no_object_begins_is_refused_where_an_object_is_wanted() -> None:
    with pytest.raises(RequestError, match=r"arguments of a call of 'look0' are '\[1\]', but must be"):
        prompts("lines").text([USER, calling("[1]"), result()])


def test_text_beside_calls_is_not_lost() -> None:
    messages = [
        USER,
        calling(ASKED, content="I look."),
        result(),
        {"role": "assistant", "content": "A"},
        USER,
    ]
    for family in WITH_CALLS:
        if family != "mistral":
            text = prompts(family).text(messages)
            assert "I look." in text and text.index("I look.") < text.index("look0"), family
    with pytest.raises(RequestError, match=r"messages\[1\]\.content: .* shows no text beside calls"):
        prompts("mistral").text(messages)


def test_several_calls_are_shown_one_by_one_where_the_template_takes_one() -> None:
    """What the server itself answers must not make the next turn an error."""
    messages = [USER, calling(ASKED, "{}"), result(1, "second"), result(0, "first")]
    assert prompts("llama").text(messages) == (
        '<user>Q<assistant>{"name": "look0", "parameters": ' + ASKED + "}<tool>first"
        '<assistant>{"name": "look1", "parameters": {}}<tool>second'
    )
    shown = prompts("object").text(messages)
    assert shown.count("<assistant>") == 1 and shown.endswith("<result>second<result>first"), "else as said"


def test_a_result_is_named_by_the_call_before_it_that_has_its_id() -> None:
    """Some clients number the calls of each turn anew."""
    other = calling("{}")
    other["tool_calls"][0]["function"]["name"] = "find"
    text = prompts("named").text([USER, calling("{}"), result(content="1"), other, result(content="2")])
    assert "<result>look0 1" in text and "<result>find 2" in text


@pytest.mark.parametrize("family", ["text", "none", "contents", "no system"])
def test_tools_that_the_template_cannot_show_are_refused(family: str) -> None:
    with pytest.raises(RequestError, match=r"^tools: this model's chat template shows none") as caught:
        prompts(family).text([USER], tools=[TOOL])
    assert caught.value.param == "tools"
    assert prompts(family).text([USER]) == prompts(family).text([USER], tools=[]), "none are none"


@pytest.mark.parametrize("family", ["object", "either", "mistral", "llama", "lines", "named"])
def test_tools_that_the_template_shows_are_taken(family: str) -> None:
    """Also a tool that says no description and no parameters, which OpenAI's may leave out."""
    assert "look" in prompts(family).text([USER], tools=[TOOL])
    assert "look" in prompts(family).text([USER, calling(ASKED), result()], tools=[TOOL])


def test_a_template_that_fails_on_the_tools_names_them() -> None:
    odd = {"type": "function", "function": {"name": "f", "description": 7, "parameters": {"properties": {}}}}
    with pytest.raises(RequestError, match=r"^tools: .* fails on this conversation: TypeError") as caught:
        prompts("named").text([USER], tools=[odd])
    assert caught.value.param == "tools"


@pytest.mark.parametrize("family", ["none", "contents"])
def test_calls_that_the_template_cannot_show_are_refused(family: str) -> None:
    with pytest.raises(
        RequestError, match=r"^messages\[1\]\.tool_calls: this model's chat template does not"
    ):
        prompts(family).text([USER, calling(ASKED), result()])


def test_results_that_the_template_cannot_show_are_refused() -> None:
    with pytest.raises(RequestError, match=r"^messages\[1\]\.content: .* not show it \(role 'tool'\)"):
        prompts("none").text([USER, result()])
    assert prompts("contents").text([USER, result()]) == "<user>Q<tool>R"


def test_a_system_message_that_the_template_leaves_out_is_refused() -> None:
    system = {"role": "system", "content": "S"}
    with pytest.raises(RequestError, match=r"^messages\[0\]\.content: .* Put it into the user's message"):
        prompts("no system").text([system, USER])
    assert prompts("none").text([system, USER]) == "<system>S<user>Q"


def test_a_system_message_that_stands_in_the_last_question_is_not_missed_after_tools() -> None:
    """Mistral's templates show it in the last message alone, if that is the user's."""
    before_it = "{{ messages[0].content + ' ' if loop.last }}"
    question = f"{{% if m.role == 'user' %}}<user>{before_it}{{{{ m.content }}}}{{% endif %}}"
    template = FAMILIES["object"].replace("<{{ m.role }}>{{ m.content }}", question)
    files = TokenizerFiles(Backend(models.BPE()), {}, {"default": template}, add_bos=None)
    messages = [{"role": "system", "content": "S"}, USER, calling(ASKED), result()]
    shown = ChatPrompts(Tokenizer(files))
    assert shown.text(messages[:2]) == "<user>S Q"
    assert "<result>R" in shown.text(messages)


def test_a_call_that_is_none_is_refused_by_its_place() -> None:
    with pytest.raises(RequestError, match=r"messages\[1\]\.tool_calls\[0\] is 7, but must be like"):
        prompts("object").text([USER, {"role": "assistant", "tool_calls": [7]}])
    bare = {"role": "assistant", "tool_calls": [{"name": "look0", "arguments": {}}]}
    assert '"name": "look0"' in prompts("object").text([USER, bare]), "as transformers' users write them"


PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=6,
)
SHOWN = {name: prompts(name) for name in ("object", "either", "text", "mistral", "llama", "named")}


@given(st.dictionaries(PLAIN, VALUES, max_size=4), st.sampled_from(sorted(SHOWN)), st.booleans())
def test_any_arguments_are_shown_as_the_same_json(value: dict[str, Any], family: str, compact: bool) -> None:
    given_text = json.dumps(value, ensure_ascii=compact, separators=(",", ":") if compact else None)
    text = SHOWN[family].text([USER, calling(given_text), result()])
    marks = {"either": "look0 ", "text": "look0\n", "llama": '"parameters": '}
    begins = text.index(marks.get(family, '"arguments": ')) + len(marks.get(family, '"arguments": '))
    assert json.JSONDecoder().raw_decode(text, begins)[0] == value


@given(
    st.dictionaries(PLAIN, VALUES, min_size=1, max_size=4), st.floats(0, 1), st.sampled_from(sorted(SHOWN))
)
def test_arguments_cut_anywhere_are_shown_as_far_as_they_go(
    value: dict[str, Any], share: float, family: str
) -> None:
    whole = json.dumps(value)
    cut = whole[: 1 + int(share * (len(whole) - 1))]
    text = SHOWN[family].text([USER, calling(cut), result()])
    shown_whole = cut == whole
    assert shown_whole or cut in text or json.dumps(cut, ensure_ascii=False) in text
