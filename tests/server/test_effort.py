"""How much a model is to think acts where its chat template can show it; else it is refused by its name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tiny_llm.server.chat_bodies import TemplateArguments
from tiny_llm.server.params import template_variables
from tiny_llm.server.problems import Problem
from tiny_llm.tokenizer.chat_template import ChatTemplate

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
SWITCHED = PLAIN + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
ALWAYS = PLAIN + "<think>\n"
USUAL = "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
HEAD = "{% macro head() %}" + USUAL + "Reasoning: {{ reasoning_effort }}{% endmacro %}{{ head() }}"
GRADED = HEAD + PLAIN


def variables(template: str, effort: Any, **arguments: bool) -> dict[str, object]:
    known = ChatTemplate(template, {}, time_limit_s=2).variables
    tokenizer: Any = SimpleNamespace(template_variables=known, chat_template=template)
    return template_variables(tokenizer, TemplateArguments(**arguments), effort)


@pytest.mark.parametrize(
    ("template", "effort", "arguments", "expected"),
    [
        (PLAIN, None, {}, {}),
        (PLAIN, "medium", {}, {}),
        (PLAIN, "none", {}, {}),
        (PLAIN, None, {"enable_thinking": False}, {"enable_thinking": False}),
        (ALWAYS, None, {"enable_thinking": True}, {"enable_thinking": True}),
        (SWITCHED, "none", {}, {"enable_thinking": False}),
        (SWITCHED, "medium", {"enable_thinking": True}, {"enable_thinking": True}),
        (GRADED, "high", {}, {"reasoning_effort": "high"}),
        (GRADED, "none", {}, {"reasoning_effort": "none"}),
    ],
)
def test_effort_becomes_a_variable_that_the_template_reads(
    template: str, effort: Any, arguments: dict[str, bool], expected: dict[str, object]
) -> None:
    assert variables(template, effort, **arguments) == expected


@pytest.mark.parametrize(
    ("template", "effort", "arguments", "param"),
    [
        (PLAIN, "high", {}, "reasoning_effort"),
        (SWITCHED, "low", {}, "reasoning_effort"),
        (ALWAYS, "none", {}, "reasoning_effort"),
        (PLAIN, None, {"enable_thinking": True}, "chat_template_kwargs.enable_thinking"),
        (ALWAYS, None, {"enable_thinking": False}, "chat_template_kwargs.enable_thinking"),
    ],
)
def test_what_no_template_shows_is_refused_by_its_name(
    template: str, effort: Any, arguments: dict[str, bool], param: str
) -> None:
    with pytest.raises(Problem) as caught:
        variables(template, effort, **arguments)
    assert caught.value.param == param and caught.value.status_code == 400


def test_a_graded_template_shows_the_effort() -> None:
    template = ChatTemplate(GRADED, {}, time_limit_s=2)
    assert template.render({"messages": [], "reasoning_effort": "high"}) == "Reasoning: high"
    assert template.variables == {"messages", "reasoning_effort"}
