"""Chat templates: jinja source + messages -> the text that the model was trained on.

The source comes with the checkpoint and is not trusted: it runs in jinja2's immutable
sandbox. Owns compiling and rendering. Refuses to know files and tokens.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tiny_llm.errors import ConfigError, RequestError


class ChatTemplate:
    """One template, compiled at its first use."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, time_limit_s: float) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._time_limit_s = time_limit_s

    def render(self, variables: Mapping[str, object]) -> str:
        """Return the text for ``variables`` (messages, tools, ...)."""
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise_exception
        env.globals["strftime_now"] = _strftime_now
        try:
            template = env.from_string(self._source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"The chat template is not jinja: line {error.lineno}: {error}.") from error
        try:
            return template.render({"documents": None, **self._special_tokens, **variables})
        except Exception as error:
            raise RequestError(f"The chat template refused the conversation: {error}") from error


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``: marks the answer for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
