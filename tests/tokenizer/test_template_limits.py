"""A hostile chat template ends in a RequestError soon; a long but honest one renders.

No test here looks at a clock: a template that is not stopped runs for hours or takes all memory.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tiny_llm.errors import RequestError
from tiny_llm.tokenizer.chat_template import ChatTemplate
from tiny_llm.tokenizer.meter import SIZE

MESSAGES = [{"role": "user", "content": "hello"}]
GROW = (
    "{% set ns = namespace(x=START) %}{% for i in range(100) %}{% set ns.x = STEP %}{% endfor %}"
    "{{ ns.x SHOW }}"
)


def grow(start: str, step: str, show: str = "") -> str:
    return GROW.replace("START", start).replace("STEP", step).replace("SHOW", show)


ENDLESS = (
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{{ a }}{% for b in range(100000) %}{{ '' }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [[[1] * 30] * 30] * 30 recursive %}{{ loop(a) if a is iterable }}"
    "{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% set l = range(100000) | list %}{% for a in l %}{{ l | reject('number') | list }}{% endfor %}",
    "{% set l = range(100000) | list %}{% for a in l %}{% set b = l | sort %}{% endfor %}",
    "{% set s = 'ab' * 1000000 %}{% for a in range(100000) %}{% set b = 'x' in s %}{% endfor %}",
)
HUGE = (
    "{{ 'a' * 10**10 }}",
    "{% set x = 10**10 * 'a' %}",
    "{{ [0] * 10**10 }}",
    "{{ 10 ** 10000000000 }}",
    "{% set x = 7 ** 1000000000 %}",
    grow("3", "ns.x * ns.x"),
    grow("'ab'", "ns.x ~ ns.x"),
    grow("'ab'", "ns.x + ns.x"),
    grow("'ab'", "ns.x * 9"),
    grow("'ab'", "'%s%s' % (ns.x, ns.x)"),
    grow("'ab'", "'{0}{0}'.format(ns.x)"),
    grow("'ab'", "ns.x.replace('', ns.x)"),
    grow("'ab'", "ns.x | replace('a', ns.x)"),
    grow("'ab'", "ns.x.join([ns.x, ns.x])"),
    grow("[1]", "ns.x + ns.x"),
    grow("[1]", "[ns.x, ns.x]", "| string"),
    grow("[1]", "[ns.x, ns.x]", "| tojson"),
    grow("[1]", "{1: ns.x, 2: ns.x}"),
    grow("[1]", "(ns.x, ns.x)", "| list"),
    grow("namespace(a=1)", "namespace(a=ns.x, b=[ns.x, ns.x])", ".b ~ 'a' * 10**10"),
    "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + grow("'ab'", "f(ns.x)"),
    "{% macro f(x) %}{{ x }}{{ caller() }}{{ caller() }}{% endmacro %}"
    "{% set x = 'a' * 4000000 %}{% for i in range(9999) %}{% call f(x) %}{{ x }}{% endcall %}{% endfor %}",
    "{% set x %}" + "{% for i in range(100000) %}" + "text " * 1000 + "{% endfor %}{% endset %}",
    "{% for i in range(100000) %}{{ 'a' * 1000000 }}{% endfor %}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a'.ljust(width) }}",
    "{{ ('a' | safe).rjust(10**10) }}",
    "{{ '7'.zfill(10**10) }}",
    "{{ 'a'.center(*[10**10]) }}",
    "{{ ['a'] | map('center', 10**10) | list }}",
    "{% filter center(10**10) %}a{% endfilter %}",
    "{{ '%010000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=10**10) }}",
    "{{ '{:.10000000000f}'.format(1.5) }}",
    "{{ ('{:10000000000}' | safe).format(1) }}",
    "{{ '{a:10000000000}'.format_map({'a': 1}) }}",
    "{{ '{:{w}}'.format_map({'w': 10**10}) }}",
    "{{ '{0:{1[0]}}'.format('a', [10**10]) }}",
    "{{ '{:{}}'.format('a', '9999999999') }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000) | replace(new='b' * 1000000, old='a') }}",
    "{{ range(1000) | join('a' * 1000000) }}",
    "{{ (10**4000) | replace('0', 'x' * 1000000) }}",
    "{{ ['a' * 1000000] | replace('a', 'b' * 1000000) }}",
    "{{ ('\n' * 1000000) | indent(1000000) }}",
    "{{ ('\n' * 1000000) | indent(width='x' * 1000000) }}",
    "{{ [1] | batch(10**10, 0) | list }}",
    "{{ [1] | slice(10**10) | list }}",
    "{{ range(10) | list | tojson(indent=10**10) }}",
    "{{ range(100000) | list | tojson(separators=('a' * 1000000, 'b')) }}",
    "{{ ''.join(['a' * 1000000] * 100000) }}",
    "{{ dict.fromkeys(range(100000), 'a' * 1000000) | string }}",
    "{{ [[1] * 2000] * 2000 }}",
    "{{ ([[1] * 400] * 400) | sum(start=[]) }}",
    "{{ 1.5 | round(10**9, 'ceil') }}",
    "{{ ('ab ' * 1000000) | groupby('x') }}",
    "{{ ('a' * 4000000) | select('none') | list }}",
    "{% set l = range(100000) | list %}{{ l | reject('in', l[::-1]) | list }}",
    "{{ range(100000) | map('string') | select('in', range(100000) | map('string') | list) | list }}",
    "{{ range(100000) | selectattr('a' * 4000000) | list }}",
    "{{ range(1000) | groupby('x', default='F' * 1000000) }}",
    "{% set a = range(100000) | list * 2 %}{% for i in range(100000) %}{% set b = a[:] %}{% endfor %}",
)
FORBIDDEN = (
    "{{ 'a'.encode() * 10**10 }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ 'a'.expandtabs(10**10) }}",
    "{{ 'a'.translate({97: 'b' * 1000000}) }}",
    "{{ (('<!---->' * 500000) | safe).striptags() }}",
    "{{ strftime_now('%9999999999Y' * 100000) }}",
    "{{ lipsum(n=10**9) }}",
    "{{ dict.update(messages[0], x=1) }}",
    "{{ self.x() }}{% block x %}{{ self.x() }}{{ self.x() }}{% endblock %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(10**9) %}{% endfor %}",
)


def render(source: str, *, seconds: float = 60, **variables: object) -> str:
    template = ChatTemplate(source, {}, time_limit_s=seconds)
    return template.render({"messages": MESSAGES, "width": 10**10, **variables})


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_without_end_is_stopped(source: str) -> None:
    with pytest.raises(RequestError, match=r"stopped after 0\.1 s"):
        render(source, seconds=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("source", HUGE)
def test_a_template_that_makes_too_much_is_stopped_before_it_does(source: str) -> None:
    with pytest.raises(RequestError, match="stopped: it makes a text or a list of more than 4,194,304"):
        render(source)


@pytest.mark.parametrize("source", FORBIDDEN)
def test_what_cannot_be_metered_is_not_there(source: str) -> None:
    with pytest.raises(
        RequestError, match=r"unsafe|undefined|no attribute|RecursionError|Range too big|strftime_now"
    ):
        render(source)


def test_stopping_needs_no_main_thread_and_spoils_no_other_render() -> None:
    endless = ChatTemplate(ENDLESS[0], {}, time_limit_s=0.2)
    honest = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {}, time_limit_s=20)
    with ThreadPoolExecutor(4) as pool:
        stopped = [pool.submit(endless.render, {"messages": MESSAGES}) for _ in range(2)]
        served = [pool.submit(honest.render, {"messages": MESSAGES * n}) for n in range(20)]
        assert [future.result() for future in served] == ["hello" * n for n in range(20)]
        assert all(isinstance(future.exception(), RequestError) for future in stopped)


def test_a_stopped_template_starts_afresh() -> None:
    template = ChatTemplate(
        "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}ok", {}, time_limit_s=0.5
    )
    with pytest.raises(RequestError, match="stopped after"):
        template.render({"n": 100_000})
    assert template.render({"n": 3}) == "ok"


def test_a_text_longer_than_the_limit_is_refused_whatever_made_it() -> None:
    half = "x" * (SIZE // 2 + 1)
    with pytest.raises(RequestError, match="4,194,306 characters"):
        render("{{ a }}{{ b }}", a=half, b=half)


def test_a_long_honest_conversation_renders() -> None:
    source = (
        "{% set ns = namespace(turns=0, seen=[]) %}{% for m in messages %}"
        "{% set body = m.content.strip().split('</think>')[-1].lstrip('\n') | replace('<|im_end|>', '') %}"
        "{% set ns.turns = ns.turns + 1 %}{% set ns.seen = ns.seen + [m.role] %}"
        "{{ '<|im_start|>' + m.role + '\n' + body ~ '<|im_end|>\n' }}"
        "{% if loop.last and messages[:-1] | selectattr('role', 'equalto', 'tool') | list %}!{% endif %}"
        "{% endfor %}{{ ns.turns }}{{ tools | tojson(indent=4) | length }}"
    )
    messages = [{"role": "user", "content": f"{at} " + "word " * 500} for at in range(400)]
    tools = [
        {"type": "function", "function": {"name": f"f{at}", "description": "d" * 500}} for at in range(200)
    ]
    text = render(source, messages=messages, tools=tools)
    assert text.startswith("<|im_start|>user\n0 word") and len(text) > 1_000_000
