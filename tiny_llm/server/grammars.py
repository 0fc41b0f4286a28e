"""Owns answers that must have a form: a JSON schema, a regular expression, a grammar. By llguidance.

A form is compiled once, in threads of its own and within a deadline, and kept by its bytes. An answer
gets a constraint with a state of its own, which leaves only those tokens that the form can go on with.
Knows no HTTP but what a client is told of a form that cannot be used.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLMatcher, LLTokenizer

from tiny_llm.data import Constraint
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import ConfigError
from tiny_llm.server.problems import Problem

MAX_FORM_BYTES = 2**17
MAX_KEPT = 128
_THREADS = 2
_JSON: Mapping[str, object] = {
    # Of all the ways to write a value, the one that models have read most; no room for endless spaces.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,  # what it does not know it refuses, and names
    "coerce_one_of": False,
}


def schema_form(schema: Mapping[str, object]) -> str:
    """The form of JSON values that are valid against ``schema``. Its own wishes on options are dropped."""
    own = {name: value for name, value in schema.items() if name != "x-guidance"}
    text = json.dumps(own, ensure_ascii=False)
    _require_small(text)
    options = json.loads(json.dumps(_JSON))
    try:
        return str(LLMatcher.grammar_from_json_schema(text, overrides=options))
    except ValueError as error:
        raise Problem(
            400, f"response_format: {error}", code="invalid_schema", param="response_format"
        ) from error


def regex_form(pattern: str) -> str:
    """The form of texts that ``pattern`` matches whole."""
    _require_small(pattern)
    return str(LLMatcher.grammar_from_regex(pattern))


def lark_form(grammar: str) -> str:
    """The form of texts that a grammar in Lark's notation makes, from its rule ``start``."""
    _require_small(grammar)
    return str(LLMatcher.grammar_from_lark(grammar))


class Grammars:
    """Compiled forms for one model's tokens."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None

    async def constraint(self, llm: LLM, form: str, param: str) -> Callable[[], Constraint]:
        """What makes an answer's constraint. Raises Problem about ``param`` for what cannot be compiled."""
        made = self._kept.get(form)
        if made is None:
            loop = asyncio.get_running_loop()
            compiling = loop.run_in_executor(self._threads, self._compile, llm, form)
            try:
                made = await asyncio.wait_for(compiling, self._timeout_s)
            except TimeoutError:
                what = f"{param} took more than {self._timeout_s:g} s to compile; make it simpler."
                raise Problem(400, what, code="too_complex", param=param) from None
        if made.is_error():
            raise Problem(400, f"{param}: {made.get_error()}", code="invalid_form", param=param)
        self._kept[form] = made
        self._kept.move_to_end(form)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        vocab = llm.config.vocab_size
        return lambda: _Constraint(made.deep_copy(), vocab)

    def _compile(self, llm: LLM, form: str) -> LLMatcher:
        if self._tokenizer is None:
            if not llm.end_ids:
                raise ConfigError("The model names no end token, so that an answer in a form could not end.")
            known = max(llm.config.vocab_size, llm.tokenizer.vocab_size)
            self._tokenizer = LLTokenizer(
                llm.tokenizer.to_json(), n_vocab=known, eos_token=sorted(llm.end_ids)
            )
        matcher = LLMatcher(self._tokenizer, form, log_level=0)
        if not matcher.is_error():
            matcher.deep_copy().compute_logit_bias()  # the first mask is a part of what may take too long
        return matcher


class _Constraint:
    """One answer's place in its form. A tokenizer may know more tokens than the model's ``vocab``."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._seen = 0

    def __call__(self, tokens: list[int]) -> bytes:
        """Take in what was drawn since last asked; a byte a token: 0 where the form cannot go on with it."""
        if not self._matcher.is_stopped():
            self._matcher.consume_tokens(tokens[self._seen :])
        self._seen = len(tokens)
        allowed = self._matcher.compute_logit_bias()
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())
        return allowed[: self._vocab]


def _require_small(text: str) -> None:
    size = len(text.encode())
    if size > MAX_FORM_BYTES:
        what = f"A schema, regex or grammar has {size} bytes, but may have at most {MAX_FORM_BYTES}."
        raise Problem(400, what, code="too_complex", param="response_format")
