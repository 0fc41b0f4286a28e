"""Owns answers that are held to a grammar, by llguidance.

A grammar is compiled once for a model's tokens, and each answer gets a constraint with a state of its own,
which leaves only those tokens that the grammar can go on with. Compiling takes as long as it takes: whoever
needs a deadline calls from a thread.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from tiny_llm.decoding.grammar import Grammar, behind_thought
from tiny_llm.errors import ConfigError, RequestError
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.tokenizer.tokenizer import Tokenizer

MAX_KEPT = 128  # compiled grammars that are kept, the latest ones used

_START = "\x02"
"""No text begins with it, and no token joins it: behind it, a text is encoded as in the middle of another."""

_TRIAL_TOKENS = 4

_LARK_TEXT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/')
"""What in a grammar of Lark's is no rule: strings, comments, regular expressions."""
_LARK_TOKEN = re.compile(r"<\[([0-9, ]+)\]>|<[^<>\[\]\s]+>")
"""A token that a grammar names, by its id (one, or a list) or its text."""


@dataclass(slots=True, eq=False)
class GrammarConstraint:
    """One answer's place in its grammar. The matcher may know more tokens than the model's ``vocab_size``.

    A token of ``end_ids`` is allowed only where the grammar is complete: it ends the answer, wherever it is.
    """

    _matcher: LLMatcher
    _vocab_size: int
    _end_ids: Sequence[int]
    _seen: int = 0

    def __call__(self, tokens: list[int]) -> bytes:
        """Take in what was drawn since last asked; a byte a token: 0 where the grammar cannot go on with it.

        Raises ValueError where llguidance gives up.
        """
        if not self._matcher.is_stopped():
            self._matcher.consume_tokens(tokens[self._seen :])
        self._seen = len(tokens)
        allowed = _mask(self._matcher, self._end_ids)
        if self._matcher.is_error():
            raise ValueError(_fault(self._matcher))
        return allowed[: self._vocab_size]

    def count_allowed(self, tokens: list[int], guesses: list[int]) -> int:
        """How many of ``guesses`` can come behind ``tokens``, one behind the other."""
        new = tokens[self._seen :]
        return max(0, self._matcher.validate_tokens(new + guesses) - len(new))

    def __copy__(self) -> GrammarConstraint:
        """The same place, for an answer that goes on by itself from here."""
        return replace(self, _matcher=self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles grammars for one model's tokens, and keeps the latest ones. Several threads may call it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int]) -> None:
        """``vocab_size``: the model's, which may be more than the tokenizer's tokens, or fewer."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = sorted(end_ids)
        self._tokens: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def constrain(self, params: SamplingParams, grammar: Grammar) -> SamplingParams:
        """``params`` whose answers are held to ``grammar``.

        Raises RequestError for a grammar that cannot be compiled, and for answers that are to go on beyond
        its end or are constrained already.
        """
        _require_open_end(params, grammar)
        return replace(params, constraint=self.compile(grammar))

    def is_kept(self, grammar: Grammar) -> bool:
        """Whether it has been compiled already, so that ``constrain`` takes no time."""
        return grammar in self._kept

    def compile(self, grammar: Grammar) -> Callable[[], GrammarConstraint]:
        """What makes an answer's constraint.

        Raises RequestError for a grammar that cannot be compiled, ConfigError if no token ends an answer.
        """
        with self._lock:
            matcher = self._kept.get(grammar)
        if matcher is None:
            matcher = self._compiled(grammar)
        with self._lock:
            self._kept[grammar] = matcher
            self._kept.move_to_end(grammar)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return partial(copy, GrammarConstraint(matcher, self._vocab_size, self._end_ids))

    def prepare(self) -> None:
        """Do now what the first form would have to wait for, and all other threads with it.

        For 151,936 tokens it takes 1.3 s, the last 0.8 of them without letting other threads run, and 30 MB.
        """
        if self._end_ids:
            self._own_tokens()

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        text = grammar.text
        self._require_no_end(grammar)
        if grammar.thought is not None:
            self.compile(replace(grammar, thought=None))  # what is wrong with the form is told now
            text = behind_thought(grammar, self._marks, self._end_ids)
        limits = LLParserLimits(verbose_errors=False)  # else errors show the parser's inner state
        matcher = LLMatcher(self._own_tokens(), text, log_level=0, limits=limits)
        _require_sound(matcher, grammar.param)
        for walk in (min, max):  # two ways into it, to meet here what would else end an answer in its middle
            trial = matcher.deep_copy()
            for _ in range(_TRIAL_TOKENS):
                allowed = [token_id for token_id, can in enumerate(_mask(trial, self._end_ids)) if can]
                _require_sound(trial, grammar.param)
                if trial.is_stopped():
                    break
                if not allowed:
                    what = f"{grammar.param}: no finite answer satisfies it"
                    raise RequestError(what, param=grammar.param, code="invalid_form")
                trial.consume_token(walk(allowed))
        return matcher

    def _require_no_end(self, grammar: Grammar) -> None:
        """Raise RequestError for a grammar that names a token which ends the answer, complete or not."""
        if grammar.text.lstrip().startswith("{"):
            return
        for token in _LARK_TOKEN.finditer(_LARK_TEXT.sub(" ", grammar.text)):
            named = [int(one) for one in (token[1] or "").split(",") if one.strip().isdecimal()]
            if self._marks.get(token[0]) in self._end_ids or not {*named}.isdisjoint(self._end_ids):
                what = (
                    f"{grammar.param}: {token[0]} ends an answer, and must not be named. "
                    "Leave it out: an answer ends where its grammar is complete."
                )
                raise RequestError(what, param=grammar.param, code="invalid_form")

    @cached_property
    def _marks(self) -> dict[str, int]:
        """Added tokens that are no text."""
        return {self._tokenizer.token_bytes(i).decode(): i for i in self._tokenizer.marks()}

    def _own_tokens(self) -> LLTokenizer:
        """The vocabulary in llguidance's form, made at the first need: that takes a moment."""
        with self._lock:
            if self._tokens is None:
                if not self._end_ids:
                    what = "The model names no end token, so that an answer in a form could not end."
                    raise ConfigError(what)
                known = max(self._vocab_size, self._tokenizer.vocab_size)
                spelled = TokenizerWrapper(_Spelling(self._tokenizer, known, self._end_ids[0]))
                self._tokens = LLTokenizer(spelled, n_vocab=known, eos_token=self._end_ids)
            return self._tokens


class _Spelling:
    """A vocabulary in the form that llguidance asks for, in which a form's text is always spelled as text.

    Its own reading of a tokenizer.json takes ``"<tool_call>"`` in a form for the token of that name, which is
    no text to it: the form could not be kept.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        self.eos_token_id = end_id
        self.bos_token_id = None
        known = tokenizer.vocabulary()
        self.tokens = known + [b""] * (vocab_size - len(known))
        self.special_token_ids = tokenizer.marks()
        self._encode = tokenizer.text_encoder()
        self._start = b"".join(self.tokens[i] for i in self._encode(_START))

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that may stand anywhere; none where they would not spell it."""
        if not isinstance(text, str):  # asked once whether it takes bytes
            raise TypeError(f"text is a {type(text).__name__}, but must be a string.")
        ids = self._encode(_START + text)
        told = b""
        for end, token_id in enumerate(ids):
            if told == self._start:
                rest = ids[end:]
                return rest if b"".join(self.tokens[i] for i in rest) == text.encode() else []
            told += self.tokens[token_id]
        return []


def _require_open_end(params: SamplingParams, grammar: Grammar) -> None:
    """Raise RequestError if answers are to go on beyond ``grammar``'s end, or have a constraint already."""
    param = grammar.param
    if params.constraint is not None:
        what = f"{param} and a constraint were both given; an answer can be held to one of them."
        raise RequestError(what, param=param, code="invalid_value")
    for late in ("min_tokens", "ignore_eos"):
        if getattr(params, late):
            what = f"{param} ends where the form does: min_tokens and ignore_eos cannot put that off."
            raise RequestError(what, param=late, code="invalid_value")


def _mask(matcher: LLMatcher, end_ids: Sequence[int]) -> bytes:
    """A byte a token: 0 for those that cannot come next, and for the end of what is not complete."""
    allowed = matcher.compute_logit_bias()
    early = [end for end in end_ids if allowed[end : end + 1] > b"\0"]
    if not early or matcher.is_error() or matcher.is_accepting():
        return allowed
    own = bytearray(allowed)
    for end in early:
        own[end] = 0
    return bytes(own)


def _fault(matcher: LLMatcher) -> str:
    """What is wrong, in our words where llguidance's are about its parser."""
    reason = str(matcher.stop_reason())
    told = matcher.get_error().partition("\n<")[0]
    if reason.startswith("NoExtension") or told.startswith("NoExtension"):
        return "no finite answer satisfies it"
    if "TooComplex" in reason or "Too many items" in told or "Current row has" in told:
        return "it is too complex, or has no end: let it choose among fewer things at a time"
    return told


def _require_sound(matcher: LLMatcher, param: str) -> None:
    if matcher.is_error():
        raise RequestError(f"{param}: {_fault(matcher)}", param=param, code="invalid_form")
