"""Owns how an answer is asked for: each option is declared here, once, with its range and its help.

From a declaration come the check in the library, the command line's option, the key in a line of a file,
and the field of a request to the server. Knows none of these, and no array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tiny_llm.errors import RequestError

if TYPE_CHECKING:  # the scheduler's side of the house reads this file without mlx
    import mlx.core as mx

LogitsProcessor: TypeAlias = "Callable[[list[int], mx.array], mx.array]"
"""(tokens so far, prompt included; logits float32 [V]) -> logits [V] to choose from."""

Constraint: TypeAlias = "Callable[[list[int]], bytes]"
"""(the answer's tokens so far) -> a byte for each of V tokens, 0 for those that may not come next."""

Pooling = Literal["last", "mean"]
"""Which of a text's hidden states become its vector: the last token's, or the mean of all."""

MOST = 2**31  # token ids and counts are below it, so that a kernel's integer holds them


@dataclass(frozen=True, slots=True)
class Option:
    """An option's ``default``, what it is for (``help``), and what it may be (``expected``, in words).

    ``kind`` is the type of its value, of each of ``several``, or of what stands ``by token`` in a mapping.
    A number is above ``gt``, at least ``ge``, at most ``le``. ``letter`` is the command line's short name.
    """

    default: object
    help: str
    expected: str
    kind: type[bool] | type[int] | type[float] | type[str]
    gt: float = -math.inf
    ge: float = -math.inf
    le: float = math.inf
    shape: Literal["one", "several", "by token"] = "one"
    letter: str | None = None

    @property
    def optional(self) -> bool:
        """Whether it may be None."""
        return self.default is None

    def allows(self, value: object) -> bool:
        """Whether ``value`` is one that the option may have; NaN lies in no range."""
        if value is None:
            return self.optional
        if self.shape == "several":
            return isinstance(value, Collection) and all(self._allows_one(one) for one in value)
        if self.shape == "by token":
            return (
                isinstance(value, Mapping)
                and all(type(token) is int and 0 <= token < MOST for token in value)
                and all(self._allows_one(one) for one in value.values())
            )
        return self._allows_one(value)

    def _allows_one(self, value: object) -> bool:
        if self.kind is bool or isinstance(value, bool):  # True would pass for a number
            return self.kind is bool and isinstance(value, bool)
        if self.kind is str:
            return isinstance(value, str) and value != ""
        if not isinstance(value, (int, float) if self.kind is float else int):
            return False
        return value > self.gt and self.ge <= value <= self.le


def _option(default: object, help: str, kind: type[Any], expected: str, **more: Any) -> Any:
    """A field of SamplingParams that every front offers; ``more`` are further fields of ``Option``."""
    if kind is int:
        more = {"le": MOST - 1, **more}
    return field(default=default, metadata={"option": Option(default, help, expected, kind, **more)})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    ``temperature`` 0 is greedy, and so is ``top_p`` 0: it makes the temperature 0. ``top_k`` 0, ``top_p`` 1
    and ``min_p`` 0 are off.
    ``seed`` makes a sampled answer repeat exactly; None draws a fresh one.
    ``logprobs`` n reports the chosen token's log-probability and the n likeliest, ``prompt_logprobs``
    those of the prompt's tokens, which are all computed then. ``n`` answers are drawn for one prompt.
    No end before ``min_tokens``: no token that ends it is drawn, and a stop string must come after them.

    ``repetition_penalty`` divides the positive logits of tokens that prompt or answer have, and
    multiplies the negative ones (Keskar et al. 2019, section 4.1); ``presence_penalty`` is subtracted
    for each token that the answer has, ``frequency_penalty`` as often as it has it (OpenAI API).
    ``logit_bias`` {token id: what to add}; ids may be text, as in JSON. Then ``processors`` change the
    row, one after the other. ``constraint`` makes what bans tokens at the end, one for each answer, as it
    remembers where that is. ``stopping`` makes what is told an answer's text, and says whether it ends there.

    With ``speculate`` tokens are guessed, and a step checks several of them: by what the sequence has had
    before, and by ``prediction``, the tokens that the caller expects. No answer depends on it.

    Raises RequestError for a value out of range, NaN and infinity included. Whether an id is in the
    vocabulary is for whoever knows the model to check: see ``require_known``.
    """

    max_tokens: int = _option(
        256, "Longest answer, in tokens.", int, "a whole number of at least 1", ge=1, letter="n"
    )
    temperature: float = _option(
        0.0,
        "0 always takes the likeliest token; 1 draws as the model thinks.",
        float,
        "a number from 0 (greedy) to 100",
        ge=0,
        le=100,
        letter="t",
    )
    top_k: int = _option(
        0, "Draw from the K likeliest tokens only; 0 is off.", int, "a whole number, 0 meaning off", ge=0
    )
    top_p: float = _option(
        1.0,
        "Draw from the fewest tokens that make up P of the mass; 0 always takes the likeliest.",
        float,
        "a number from 0 (greedy) to 1",
        ge=0,
        le=1,
    )
    min_p: float = _option(
        0.0, "Drop tokens less likely than P times the likeliest.", float, "from 0 to 1", ge=0, le=1
    )
    seed: int | None = _option(
        None, "Makes a drawn answer repeat exactly.", int, "from 0 to 2**64 - 1", ge=0, le=2**64 - 1
    )
    stop: tuple[str, ...] = _option(
        (), "End before this text.", str, "strings that are not empty", shape="several"
    )
    stop_token_ids: tuple[int, ...] = _option(
        (), "End at this token.", int, "token ids", ge=0, shape="several"
    )
    ignore_eos: bool = _option(False, "Go on where the model would end.", bool, "True or False")
    logprobs: int | None = _option(
        None,
        "Report each token's log-probability, and the N likeliest.",
        int,
        "a whole number, or None",
        ge=0,
    )
    prompt_logprobs: int | None = _option(
        None, "Report those of the prompt's tokens too.", int, "a whole number, or None", ge=0
    )
    n: int = _option(1, "Answers to one prompt.", int, "a whole number from 1 to 4096", ge=1, le=4096)
    min_tokens: int = _option(0, "No end before so many tokens.", int, "a whole number, 0 meaning none", ge=0)
    repetition_penalty: float = _option(
        1.0,
        "Above 1: less of what prompt and answer have already.",
        float,
        "above 0, 1 meaning off",
        gt=0,
        le=100,
    )
    presence_penalty: float = _option(
        0.0, "Subtracted from tokens that the answer has.", float, "a number from -2 to 2", ge=-2, le=2
    )
    frequency_penalty: float = _option(
        0.0, "Subtracted as often as the answer has them.", float, "a number from -2 to 2", ge=-2, le=2
    )
    logit_bias: Mapping[int, float] | None = _option(
        None,
        'Added to tokens, by id: {"50": -100}.',
        float,
        "a mapping of token ids to numbers",
        ge=-1e4,
        le=1e4,
        shape="by token",
    )
    speculate: bool = True
    prediction: tuple[int, ...] = ()
    processors: tuple[LogitsProcessor, ...] = ()
    constraint: Callable[[], Constraint] | None = None
    stopping: Callable[[], Callable[[str], bool]] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "prediction", "processors"):
            given = getattr(self, name)
            listed = isinstance(given, Collection) and not isinstance(given, (str, bytes, Mapping))
            _require(listed, name, given, "a list, empty meaning none")
            object.__setattr__(self, name, tuple(given))
        if isinstance(self.logit_bias, Mapping):
            by_token = {_token_id(token): bias for token, bias in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", by_token)
        for name, option in OPTIONS.items():
            given = getattr(self, name)
            too_large = isinstance(given, int) and option.ge <= option.le < given
            expected = f"{option.expected}, at most {option.le:.0f}" if too_large else option.expected
            _require(option.allows(given), name, given, expected)
        if self.top_p == 0:
            object.__setattr__(self, "temperature", 0.0)
        _require(isinstance(self.speculate, bool), "speculate", self.speculate, "True or False")
        ids = all(type(token) is int and 0 <= token < MOST for token in self.prediction)
        _require(ids, "prediction", self.prediction, "token ids")
        _require(all(callable(f) for f in self.processors), "processors", self.processors, "callables")
        for name in ("constraint", "stopping"):
            given = getattr(self, name)
            _require(given is None or callable(given), name, given, "a callable")

    @property
    def reads_prompt(self) -> bool:
        """Whether the model's rows of all of the prompt are wanted: a prefix that is found has none."""
        return self.prompt_logprobs is not None


@dataclass(frozen=True, slots=True)
class BeamParams(SamplingParams):
    """How to look for likely answers by beam search: the best ``n`` of ``width`` that are followed at a time.

    An answer's score is the sum of its tokens' log-probabilities, an end token's included, over their number
    to the power of ``length_penalty``. Once there are ``width`` answers, the search ends at once
    (``early_stopping`` True), where no beam has a better score as long as it is now (False), or where none
    could come to one ("never"). Options that change or forbid tokens, and those that end an answer, hold for
    each beam; log-probabilities are those after such changes. Nothing is drawn and nothing guessed.

    Raises RequestError as SamplingParams does, and for an option that a search has no use for.
    """

    width: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        SamplingParams.__post_init__(self)
        object.__setattr__(self, "speculate", False)
        for name, neutral in (("temperature", 0), ("top_k", 0), ("top_p", 1), ("min_p", 0)):
            given = getattr(self, name)
            _require(given == neutral, name, given, f"{neutral} in a beam search, which draws nothing")
        _require(OPTIONS["n"].allows(self.width), "width", self.width, OPTIONS["n"].expected)
        _require(self.n <= self.width, "n", self.n, f"at most the beams' width, which is {self.width}")
        penalty = Option(1.0, "", "a number from -10 to 10", float, ge=-10, le=10)
        _require(penalty.allows(self.length_penalty), "length_penalty", self.length_penalty, penalty.expected)
        rule = self.early_stopping
        _require(isinstance(rule, bool) or rule == "never", "early_stopping", rule, 'True, False or "never"')


@dataclass(frozen=True, slots=True)
class PoolingParams(SamplingParams):
    """How a text becomes a vector: by the hidden state of its ``last`` token, or the ``mean`` of all.

    Of that the first ``dimensions`` stay, None meaning all, brought to length 1 with ``normalize``.
    """

    pooling: Pooling = "last"
    normalize: bool = True
    dimensions: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_tokens", 1)  # of which none is drawn
        SamplingParams.__post_init__(self)
        given = self.dimensions
        is_size = given is None or (type(given) is int and given > 0)
        _require(is_size, "dimensions", given, "a whole number of at least 1")

    @property
    def reads_prompt(self) -> bool:
        """Whether all hidden states are wanted, and not the last alone."""
        return self.pooling == "mean"


OPTIONS: Mapping[str, Option] = {
    one.name: one.metadata["option"] for one in fields(SamplingParams) if "option" in one.metadata
}
"""Every option that is plain data, by its name."""


def _require(ok: bool, name: str, given: object, expected: str) -> None:
    if not ok:
        raise RequestError(f"{name} is {given!r}, but must be {expected}.", param=name)


def require_known(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError for a token id that the model does not have: an index that nobody checks again."""
    for name in ("logit_bias", "stop_token_ids", "prediction"):
        for token_id in getattr(params, name) or ():
            expected = f"token ids in the vocabulary, which is 0 to {vocab_size - 1}"
            _require(token_id < vocab_size, name, token_id, expected)


def _token_id(key: object) -> object:
    """A key of JSON, which is always text, as the number that it means."""
    is_number = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
    return int(key) if is_number else key  # type: ignore[call-overload]
