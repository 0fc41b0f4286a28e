"""Chat templates: jinja source + messages -> the text that the model was trained on.

The source comes with the checkpoint and is not trusted; it runs in the metered
sandbox. Owns compiling once and rendering often. Refuses to know files and tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import CodeType

import jinja2
import jinja2.meta

from tiny_llm.errors import ConfigError, RequestError
from tiny_llm.tokenizer.meter import SIZE, Meter
from tiny_llm.tokenizer.sandbox import Sandbox

_SOURCE_LIMIT = 2**17  # published templates have at most some 30,000 characters


class ChatTemplate:
    """One template. Rendering keeps no state, so threads may share it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, time_limit_s: float) -> None:
        """``special_tokens`` ("bos_token" ...) are variables of every render."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._time_limit_s = time_limit_s

    def render(self, variables: Mapping[str, object]) -> str:
        """Return the text for ``variables``: messages, tools, and what else the template reads.

        Raises ConfigError for a template that does not compile; RequestError when it
        refuses the variables, fails on them, or takes too long or too much.
        """
        code = self._code
        sandbox = Sandbox(Meter(self._time_limit_s))
        template = jinja2.Template.from_code(sandbox, code, sandbox.globals)
        try:
            text = template.render(_plain({"documents": None, **self._special_tokens, **variables}))
        except RequestError:
            raise
        except jinja2.TemplateError as error:
            raise RequestError(f"The chat template refuses this conversation: {_line(error)}") from error
        except Exception as error:  # whatever the template's own expressions raise
            name = type(error).__name__
            raise RequestError(
                f"The chat template fails on this conversation: {name}: {_line(error)}"
            ) from error
        if len(text) > SIZE:
            raise RequestError(f"The chat template makes {len(text):,} characters; {SIZE:,} are allowed.")
        return text

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and nothing in it sets. Raises ConfigError as ``render`` does."""
        _ = self._code  # says what is wrong with a source that cannot be parsed
        tree = Sandbox(Meter(self._time_limit_s)).parse(self.source)
        return frozenset(jinja2.meta.find_undeclared_variables(tree))

    @functools.cached_property
    def _code(self) -> CodeType:
        if len(self.source) > _SOURCE_LIMIT:
            raise ConfigError(
                f"The chat template has {len(self.source):,} characters; at most {_SOURCE_LIMIT:,} are read."
            )
        try:
            return Sandbox(Meter(self._time_limit_s)).compile_metered(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"The chat template is not jinja, line {error.lineno}: {_line(error)}"
            ) from error
        except Exception as error:  # nested too deep for the parser, a number of 5,000 digits ...
            name = type(error).__name__
            raise ConfigError(f"The chat template cannot be compiled: {name}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The error's text as one line; a template may raise a whole page."""
    return " ".join(str(error)[:400].split())


def _plain(value: object) -> object:
    """A copy made of JSON's types only: nothing else has methods that a template should reach."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item) for item in value]
    raise RequestError(
        f"A {type(value).__name__} cannot go into a chat template: use strings, numbers, lists and dicts."
    )
