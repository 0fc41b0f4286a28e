"""Chat templates: Qwen2.5's published renderings by hand, and transformers as the judge of the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tiny_llm.errors import ConfigError, RequestError
from tiny_llm.tokenizer.tokenizer import Tokenizer

Message = Mapping[str, object]

WEATHER: Mapping[str, object] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather & <wind> in a café",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def tool(content: str) -> Message:
    return {"role": "tool", "content": content}


CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
}
CONVERSATIONS: Sequence[Sequence[Message]] = (
    [user("Hi")],
    [system("Be brief."), user(" Hi \n"), assistant("Hello"), user("<b>&amp;</b> {{ 7 * 7 }} {% raw %}")],
    [user("Weather?"), CALL, tool('{"t": 3}')],
    [user("Weather?"), CALL, tool("3"), tool("4"), assistant("Cold."), user("Thanks")],
    [user("x"), {"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": {}}]}],
    [system("only")],
)


def with_template(folder: Path, template: object, **config: object) -> Tokenizer:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}), "utf-8")
    return Tokenizer.from_folder(folder)


def test_qwen2_without_a_system_message_gets_the_published_one(qwen2: Tokenizer) -> None:
    assert qwen2.render_chat([user("Hi")]) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_qwen2_multi_turn(qwen2: Tokenizer) -> None:
    messages = [system("Be brief."), user("Hi"), assistant("Hello!"), user("Bye")]
    assert qwen2.render_chat(messages, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
    )


def test_qwen2_tools_calls_and_answers(qwen2: Tokenizer) -> None:
    messages = [system("Be brief."), user("Weather?"), CALL, tool("3 C"), tool("dry")]
    assert qwen2.render_chat(messages, tools=[WEATHER]) == (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "weather", '
        '"description": "Today\'s weather & <wind> in a café", "parameters": {"type": "object", '
        '"properties": {"city": {"type": "string"}}, "required": ["city"]}}}\n'
        "</tools>\n\nFor each function call, return a json object with function name and arguments "
        "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWeather?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3 C\n</tool_response>\n"
        "<tool_response>\ndry\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_rendered_chat_is_encoded_with_its_special_tokens(qwen2: Tokenizer) -> None:
    ids = qwen2.encode(qwen2.render_chat([system("s"), user("Hi")]), add_special_tokens=False)
    assert ids == [
        151644,
        8948,
        198,
        82,
        151645,
        198,
        151644,
        872,
        198,
        13048,
        151645,
        198,
        151644,
        77091,
        198,
    ]


def judged(template: str, variables: Mapping[str, Any], specials: Mapping[str, str]) -> str:
    """What transformers makes of it."""
    given = dict(variables)
    [text], _ = render_jinja_template([given.pop("messages")], chat_template=template, **given, **specials)
    return text


@pytest.fixture(scope="session", params=["qwen2", "demo"])
def published(request: pytest.FixtureRequest) -> tuple[Tokenizer, str, Mapping[str, str]]:
    """A real tokenizer, its template and its special tokens."""
    folder = request.getfixturevalue({"qwen2": "qwen2_tokenizer_folder"}.get(request.param, request.param))
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    beside = folder / "chat_template.jinja"
    template = beside.read_text("utf-8") if beside.is_file() else config["chat_template"]
    specials = {name: config[name] for name in ("eos_token", "pad_token") if config.get(name)}
    return Tokenizer.from_folder(folder), template, specials


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("tools", [None, [WEATHER, WEATHER]], ids=["no tools", "tools"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_real_templates_render_as_transformers_renders_them(
    published: tuple[Tokenizer, str, Mapping[str, str]], messages: list[Message], tools: Any, generate: bool
) -> None:
    tokenizer, template, specials = published
    given = {"messages": messages, "tools": tools, "add_generation_prompt": generate}
    expected = judged(template, given, specials)
    assert tokenizer.render_chat(messages, tools=tools, add_generation_prompt=generate) == expected


CONSTRUCTS = (
    "{% for m in messages %}\n  {% if loop.first %}\n first\n  {% endif %}\n{{ m.role }}\n{% endfor %}",
    "{{ bos_token }}{% for m in messages %}{{ loop.index }}/{{ loop.length }}:{{ loop.last }}{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem }}>{{ loop.nextitem }}{% endfor %}",
    "{% for m in messages[::-1] if m.role == 'user' %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k ~ '=' ~ v ~ 1 }}{% endfor %}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% continue %}{% endfor %}x",
    "{% for m in messages %}{% generation %}{{ m.content }}{% set a = 1 %}{% endgeneration %}{{ a }}"
    "{% endfor %}",
    "{% set ns = namespace(n=0, l=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.l = ns.l + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.l }}",
    "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ messages | tojson(separators=(',', ':')) }}",
    "{{ messages | map(attribute='content') | join(', ') }}{{ messages | length }}{{ tools is none }}",
    "{% set g = messages | selectattr('role', 'equalto', 'user') %}{{ g | list | length }}"
    "{{ g | list | length }}",
    "{{ messages | groupby('role') | length }}{{ messages | batch(2) | list | length }}{{ [3, 1] | sort }}",
    "{% macro m(x, y='d') %}[{{ x }}{{ y }}{{ caller() if caller }}]{% endmacro %}{{ m(1) }}{{ m(2, 3) }}"
    "{% call m('c') %}body{% endcall %}",
    "{% for x in [[1, [2]], [3]] recursive %}({{ loop.depth }}{{ loop(x) if x is iterable else x }})"
    "{% endfor %}",
    "{% set block %}a {{ messages[0].content }}{% endset %}{{ block | upper }}"
    "{% filter trim %}  b {% endfilter %}",
    "{{ 7 // 2 }}{{ 7 % 2 }}{{ 2 ** 10 }}{{ 'ab' * 3 }}{{ [1] * 3 }}{{ -1 }}{{ 1.5 / 2 }}{{ 'n=%d' % 3 }}",
    "{{ '{:>5}|{x}'.format('a', x=messages[0].role) }}{{ '%s-%s' | format(1, 'b') }}{{ 'x'.center(5) }}"
    "{{ '20240101123456 {{}} {:.2f} {}'.format(1.234, 10**12) }}{{ '100%% %5.1f' % 2.25 }}",
    "{{ messages[0].content.split('a') }}{{ 'a-b'.replace('-', '+') }}{{ 'T' in 'aTb' }}{{ 'abc'[1:] }}",
    "{{ undefined_name }}{{ undefined_name is defined }}{{ messages[0].missing is defined }}{{ documents }}",
    "{{ eos_token }}{{ 'é<&>' | tojson }}{{ '<&>' | e }}{{ {'a': [1, none, true]} | tojson }}{{ dict(a=1) }}",
    "{{ strftime_now('%Y') | length }}{{ range(3) | list }}{{ range(2, 8, 3) | sum }}"
    "{{ cycler('a', 'b').next() }}",
    "{{- messages[0].content -}}  \n {#- note -#} \n {%- if true -%} x {%- endif -%} \n\n",
    "{{ extra }}{{ enable_thinking is defined and enable_thinking }}",
)


@pytest.mark.parametrize("template", CONSTRUCTS)
def test_every_construct_renders_as_in_transformers(folder: Path, template: str) -> None:
    tokenizer = with_template(folder, template, bos_token="<|im_start|>", eos_token="<|im_end|>")
    given: dict[str, Any] = {"messages": list(CONVERSATIONS[1]), "tools": [dict(WEATHER)]}
    extra = {"extra": ["a", {"b": 1}], "enable_thinking": True}
    expected = judged(
        template,
        {**given, **extra, "add_generation_prompt": True},
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    )
    assert tokenizer.render_chat(given["messages"], tools=given["tools"], **extra) == expected


def test_rendering_leaves_the_messages_alone_and_takes_any_mapping(folder: Path) -> None:
    tokenizer = with_template(folder, "{{ messages | tojson }}")
    message = MappingProxyType({"role": "user", "content": ("a", "b")})
    assert tokenizer.render_chat((message,)) == '[{"role": "user", "content": ["a", "b"]}]'
    with pytest.raises(RequestError, match="object cannot go into a chat template"):
        tokenizer.render_chat([{"role": "user", "content": object()}])


NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]


def test_the_template_for_tools_is_taken_when_there_are_tools(folder: Path) -> None:
    tokenizer = with_template(folder, NAMED)
    assert tokenizer.render_chat([user("x")]) == "plain"
    assert tokenizer.render_chat([user("x")], tools=[WEATHER]) == "with tools"


def test_files_beside_the_config_win_over_it(folder: Path) -> None:
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert with_template(folder, "config").render_chat([user("x")]) == "json"
    (folder / "chat_template.jinja").write_text("jinja é", "utf-8")
    assert with_template(folder, "config").render_chat([user("x")]) == "jinja é"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert with_template(folder, "config").render_chat([user("x")], tools=[WEATHER]) == "tools"


def test_no_template_says_what_to_do(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(ConfigError, match=r"no chat template.*generate --raw.*chat_template\.jinja"):
        tokenizer.render_chat([user("x")])
    with pytest.raises(ConfigError, match="no 'default'"):
        with_template(folder, [NAMED[1]]).render_chat([user("x")])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "not jinja, line 1"),
        ("a\n{{ x | nosuchfilter }}", "not jinja, line 2: No filter named 'nosuchfilter'"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "cannot be compiled: RecursionError"),
        ("{{ 1" + "+1" * 9000 + " }}", "cannot be compiled: RecursionError"),
        ("{{ " + "9" * 5000 + " }}", "cannot be compiled: ValueError"),
        ("x" * 140_000, "140,000 characters"),
    ],
    ids=["syntax", "filter", "parentheses", "sum", "number", "long"],
)
def test_a_template_that_does_not_compile_is_the_models_fault(
    folder: Path, template: str, message: str
) -> None:
    tokenizer = with_template(folder, template)
    assert tokenizer.has_chat_template, "found when it is used: a raw prompt needs no template"
    with pytest.raises(ConfigError, match=message) as caught:
        tokenizer.render_chat([user("x")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('Roles must alternate!') }}",
            "refuses this conversation: Roles must alternate!",
        ),
        ("{{ raise_exception('two\n lines') }}", "refuses this conversation: two lines$"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages[0] + 1 }}", "fails on this conversation: TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "no loader"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "'__init__' of 'type' object is unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "namespace attribute '__class__'"),
        ("{{ '\\ud800' }}", "surrogate"),
    ],
)
def test_a_template_that_refuses_or_fails_is_a_request_error(
    folder: Path, template: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        with_template(folder, template).render_chat([user("x")])


def test_half_a_surrogate_pair_in_a_message_is_refused(folder: Path) -> None:
    tokenizer = with_template(folder, "{{ messages[0].content }}")
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.render_chat([user("a\ud83d")])
