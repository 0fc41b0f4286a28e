"""The few types that cross floors. Data only: no behaviour beyond checking itself.

Shapes: ``T`` tokens of a step over all its sequences, ``B`` sequences, ``R`` wanted
logit rows, ``H`` query heads, ``K`` key/value heads, ``D`` head dim, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from tiny_llm.errors import RequestError

if TYPE_CHECKING:  # the scheduler's side of the house reads this file without mlx
    import mlx.core as mx

    from tiny_llm._cpu import Matrix as PackedMatrix

FinishReason = Literal["stop", "length"]
EndReason: TypeAlias = Literal["stop", "length", "cancelled", "timeout", "error"]
"""Why a sequence ended: a FinishReason, or what happened to it on the way."""
LogitsProcessor: TypeAlias = "Callable[[list[int], mx.array], mx.array]"
"""(tokens so far, prompt included; logits float32 [V]) -> logits [V] to choose from."""

Constraint: TypeAlias = "Callable[[list[int]], bytes]"
"""(the answer's tokens so far) -> a byte for each of V tokens, 0 for those that may not come next."""


MOST = 2**31
"""Token ids and counts are below it, so that a kernel's integer holds them."""


def _require(ok: bool, name: str, given: object, expected: str) -> None:
    if not ok:
        raise RequestError(f"{name} is {given!r}, but must be {expected}.", param=name)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.
    ``seed`` makes a sampled answer repeat exactly; None draws a fresh one.
    ``logprobs`` n reports the chosen token's log-probability and the n likeliest, ``prompt_logprobs``
    those of the prompt's tokens, which are all computed then. ``n`` answers are drawn for one prompt.
    No end before ``min_tokens``.

    ``repetition_penalty`` divides the positive logits of tokens that prompt or answer have, and
    multiplies the negative ones (Keskar et al. 2019, section 4.1); ``presence_penalty`` is subtracted
    for each token that the answer has, ``frequency_penalty`` as often as it has it (OpenAI API).
    ``logit_bias`` {token id: what to add}. Then ``processors`` change the row, one after the other.
    ``constraint`` makes what bans tokens at the end, one for each answer, as it remembers where that is.

    Raises RequestError for a value out of range, NaN and infinity included. Whether an id is in the
    vocabulary is for whoever knows the model to check: see ``require_known``.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    constraint: Callable[[], Constraint] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "processors"):
            given = getattr(self, name)
            _require(isinstance(given, Collection), name, given, "a list, empty meaning none")
            object.__setattr__(self, name, tuple(given))
        _check_params(self)
        if self.logit_bias is not None:  # the caller's own may change after it was checked
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))


def _check_params(p: SamplingParams) -> None:
    def whole(value: object, least: int, end: int = MOST) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < end

    def between(value: float, low: float, high: float) -> bool:
        return isinstance(value, (int, float)) and low <= value <= high  # NaN is in no range

    _require(whole(p.max_tokens, 1), "max_tokens", p.max_tokens, "a whole number of at least 1")
    _require(between(p.temperature, 0, 100), "temperature", p.temperature, "a number from 0 (greedy) to 100")
    _require(whole(p.top_k, 0), "top_k", p.top_k, "a whole number, 0 meaning off")
    _require(between(p.top_p, 0, 1) and p.top_p > 0, "top_p", p.top_p, "above 0 and at most 1")
    _require(between(p.min_p, 0, 1), "min_p", p.min_p, "from 0 to 1")
    _require(p.seed is None or whole(p.seed, 0, 2**64), "seed", p.seed, "from 0 to 2**64 - 1")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(p, name)
        _require(count is None or whole(count, 0), name, count, "a whole number, or None")
    _require(all(isinstance(s, str) and s for s in p.stop), "stop", p.stop, "strings that are not empty")
    _require(all(whole(i, 0) for i in p.stop_token_ids), "stop_token_ids", p.stop_token_ids, "token ids")
    _require(whole(p.n, 1), "n", p.n, "a whole number of at least 1")
    _require(whole(p.min_tokens, 0), "min_tokens", p.min_tokens, "a whole number, 0 meaning none")
    factor = p.repetition_penalty
    _require(between(factor, 0, 100) and factor > 0, "repetition_penalty", factor, "above 0, 1 meaning off")
    for name in ("presence_penalty", "frequency_penalty"):
        _require(between(getattr(p, name), -2, 2), name, getattr(p, name), "a number from -2 to 2")
    biases = p.logit_bias or {}
    _require(
        isinstance(biases, Mapping) and all(whole(i, 0) and between(b, -1e4, 1e4) for i, b in biases.items()),
        "logit_bias",
        p.logit_bias,
        "a mapping of token ids to numbers",
    )
    _require(all(callable(f) for f in p.processors), "processors", p.processors, "callables")
    _require(p.constraint is None or callable(p.constraint), "constraint", p.constraint, "a callable")


def require_known(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError for a token id that the model does not have: an index that nobody checks again."""
    for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
        for token_id in ids:
            expected = f"token ids in the vocabulary, which is 0 to {vocab_size - 1}"
            _require(token_id < vocab_size, name, token_id, expected)


@dataclass(frozen=True, slots=True)
class Timing:
    """One request's figures; times in seconds, rates in tokens a second."""

    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    prefill_tok_s: float
    decode_tok_s: float


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model calls; ``arguments`` is JSON, cut short where the answer was."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """A chat's answer as what it consists of; ``content`` is None where there are calls and no text."""

    content: str | None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What is new of the call with that ``index``; its first delta has ``id`` and ``name``."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class MessageDelta:
    """What is new of an AssistantMessage: one of the three."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. ``logprobs`` has, for each token, {token id: log-probability} or is None.

    ``index`` counts the answers to one prompt. ``cached_tokens`` of the prompt were found in the prefix
    cache. ``error`` says what went wrong where ``finish_reason`` is "error". ``message`` is a chat's.
    """

    text: str
    token_ids: list[int]
    finish_reason: EndReason
    prompt_token_ids: list[int]
    logprobs: list[dict[int, float]] | None
    timing: Timing
    index: int = 0
    cached_tokens: int = 0
    error: str | None = None
    message: AssistantMessage | None = None


@dataclass(slots=True)  # not frozen: every token makes one, and that would take three times as long
class Chunk:
    """A piece of answer ``index`` to a prompt; its last one carries the whole in ``completion``.

    ``logprobs`` are those of its tokens, where the request asked for them; the first chunk has the
    ``prompt_logprobs``, from the prompt's second token on. ``deltas`` are what a chat's message gets of it.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    completion: Completion | None = None
    index: int = 0
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float]] | None = None
    deltas: Collection[MessageDelta] = ()


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix [out, in] in MLX's affine format: ``w = scale * q + bias`` a group.

    ``packed`` uint32 [out, in * bits / 32]; ``scales`` and ``biases`` [out, in / group_size].
    """

    packed: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int


Matrix: TypeAlias = "mx.array | QuantizedTensor | PackedMatrix"
"""A matrix [out, in]: plain, in MLX's affine format, or in the layout of our own kernels (opaque here)."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Where a paged cache keeps a batch's keys and values; all int32.

    ``slot_mapping`` [T]: for each new row, block * block_size + place in the block. ``block_tables`` [B, W]:
    each sequence's blocks in order, filled up with 0. ``query_start_loc`` [B + 1]: as the batch's.
    ``context_lens`` [B]: tokens of each sequence, the new ones included. ``derived`` is what an op works out
    of these, for all layers of the step.
    """

    slot_mapping: mx.array
    block_tables: mx.array
    query_start_loc: mx.array
    context_lens: mx.array
    derived: dict[str, tuple[mx.array, ...]] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input: flat and ragged, never padded.

    ``tokens`` and ``positions`` int32 [T]; sequence ``b`` owns rows
    ``query_start_loc[b]:query_start_loc[b + 1]`` (B + 1 offsets); ``logit_rows`` int32 [R]. ``pages`` is
    for a cache that has blocks.
    """

    tokens: mx.array
    positions: mx.array
    query_start_loc: tuple[int, ...]
    logit_rows: mx.array
    pages: Pages | None = None


class KVCache(Protocol):
    """What attention needs of a cache: keep this step's K and V, attend over all so far."""

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array, batch: Batch) -> mx.array:
        """Return attention's output [T, H, D] for q [T, H, D] and new k, v [T, K, D]."""
        ...


Status = Literal["waiting", "running", "finished"]


@dataclass(slots=True, eq=False)
class Sequence:
    """One stream of tokens: a prompt and what was made of it. The Scheduler is its only writer.

    ``tokens`` is an array("i"): half a list's memory, and Python's garbage collector, which would
    look at each token of each list again and again (0.1 s for 1,000 long prompts), passes it by.

    ``tokens[:num_computed_tokens]`` have their keys and values in the cache, or in its host copy.
    ``priority`` is higher for the more urgent. ``arrival`` and ``deadline`` are seconds of one
    clock. Blocks are shared only between sequences of the same ``salt``. ``cached_tokens``
    counts the tokens that the prefix cache spared it when it first ran.
    """

    id: int
    tokens: array[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    arrival: float = 0.0
    deadline: float = math.inf
    salt: str = ""
    prompt_len: int = -1  # -1: all of ``tokens``
    num_computed_tokens: int = 0
    cached_tokens: int = 0
    status: Status = "waiting"
    finish_reason: EndReason | None = None

    def __post_init__(self) -> None:
        if self.prompt_len < 0:
            self.prompt_len = len(self.tokens)


class PlanItem(NamedTuple):
    """What one sequence does in a step. A tuple, as a step makes one for each sequence.

    ``tokens`` [n] go to positions ``start:start + n``; ``block_table`` is the sequence's
    and reaches beyond them: read it, never write it, and not after the step's commit.
    Logits are wanted of the item's last ``logit_rows`` tokens.
    """

    seq_id: int
    tokens: array[int]
    start: int
    block_table: array[int]
    logit_rows: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: plain integers, made by the scheduler, the same on every rank.

    Before the items' keys and values are written: the pool has ``num_blocks``; then all of
    ``swap_out`` (block, host slot), all of ``copies`` (from block, to block), all of ``swap_in``
    (host slot, block), in this order. ``items`` has ``decodes`` sequences of one new token first, with
    ``decode_context`` tokens before them; then ``chunk_tokens`` tokens of sequences that catch
    up, with ``chunk_context`` tokens before them, summed over tokens. ``preempted`` had to make room:
    (sequence, whether it was swapped out).
    """

    items: list[PlanItem]
    num_blocks: int
    swap_out: list[tuple[int, int]]
    copies: list[tuple[int, int]]
    swap_in: list[tuple[int, int]]
    decodes: int = 0
    decode_context: int = 0
    chunk_tokens: int = 0
    chunk_context: int = 0
    preempted: list[tuple[int, bool]] = field(default_factory=list)


class Advance(NamedTuple):
    """How a sequence goes on after a step: new ``tokens``, perhaps its end, perhaps ``forks``.

    A draft that was accepted gives several tokens. Each fork starts a new sequence,
    under the fork's ``seq_id``, from what this one held before its own ``tokens``.
    """

    seq_id: int
    tokens: Collection[int]
    finish_reason: EndReason | None = None
    forks: tuple[Advance, ...] = ()


class Output(NamedTuple):
    """A sequence that ended otherwise than by an Advance: cancelled, too late, or in a step that failed."""

    seq_id: int
    finish_reason: EndReason
