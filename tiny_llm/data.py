"""The few types that cross floors. Data only: no behaviour beyond checking itself.

Shapes: ``T`` tokens of a step over all its sequences, ``B`` sequences, ``R`` wanted
logit rows, ``H`` query heads, ``K`` key/value heads, ``D`` head dim, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from tiny_llm.sampling_params import SamplingParams as SamplingParams

if TYPE_CHECKING:  # the scheduler's side of the house reads this file without mlx
    import mlx.core as mx

    from tiny_llm._cpu import Matrix as PackedMatrix

FinishReason = Literal["stop", "length"]
EndReason: TypeAlias = Literal["stop", "length", "cancelled", "timeout", "error"]
"""Why a sequence ended: a FinishReason, or what happened to it on the way."""


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


class MessageDelta(NamedTuple):
    """What is new of an AssistantMessage: one of the three. A tuple, as nearly every token makes one."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. ``logprobs`` has, for each token, {token id: log-probability} or is None.

    ``token_ids`` and ``logprobs`` have every token that was made, ``text`` what the first ``shown_tokens``
    of them say: neither a token that ended the answer nor a stop string is shown.
    ``index`` counts the answers to one prompt. ``cached_tokens`` of the prompt were found in the prefix
    cache. ``drafted_tokens`` were guessed and checked, ``accepted_tokens`` of them right. ``error`` says what
    went wrong where ``finish_reason`` is "error". ``message`` is a chat's, ``score`` a beam search's.
    ``embedding``, of floats, is the whole of what ``PoolingParams`` ask for. ``stop_string`` is the one that
    ended it, if one did.
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
    shown_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    score: float | None = None
    embedding: array[float] | None = None
    stop_string: str | None = None


@dataclass(slots=True)  # not frozen: every token makes one, and that would take three times as long
class Chunk:
    """A piece of answer ``index`` to a prompt; its last one carries the whole in ``completion``.

    ``logprobs`` are those of its tokens, where the request asked for them; the first chunk has the
    ``prompt_logprobs``, from the prompt's second token on. ``deltas`` are what a chat's message gets of it.
    ``shown_tokens``: as many of the answer's tokens are in the text so far; what may become a stop string
    is held back.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    completion: Completion | None = None
    index: int = 0
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float]] | None = None
    deltas: Collection[MessageDelta] = ()
    shown_tokens: int = 0

    def followed_by(self, other: Chunk) -> Chunk:
        """Two pieces of one answer as one."""
        return replace(
            other,
            text=self.text + other.text,
            token_ids=self.token_ids + other.token_ids,
            logprobs=None if self.logprobs is None else [*self.logprobs, *(other.logprobs or ())],
            prompt_logprobs=self.prompt_logprobs,
        )


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix [out, in] in MLX's affine format: ``w = scale * q + bias`` a group. Or a stack of them.

    ``packed`` uint32 [out, in * bits / 32]; ``scales`` and ``biases`` [out, in / group_size].
    """

    packed: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int


Matrix: TypeAlias = "mx.array | QuantizedTensor | PackedMatrix"
"""A matrix [out, in] or a stack [N, out, in]: plain, in MLX's affine format, or as our kernels have it."""


class Pages(NamedTuple):
    """Where a paged cache keeps a batch's keys and values; all int32.

    ``slot_mapping`` [T]: for each new row, block * block_size + place in the block. ``block_tables`` [B, W]:
    each sequence's blocks in order, filled up with 0. ``query_start_loc`` [B + 1]: as the batch's.
    ``context_lens`` [B]: tokens of each sequence, the new ones included.
    """

    slot_mapping: mx.array
    block_tables: mx.array
    query_start_loc: mx.array
    context_lens: mx.array


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

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, batch: Batch, *, window: int = 0
    ) -> mx.array:
        """Return attention's output [T, H, D] for q [T, H, D] and new k, v [T, K, D].

        A row sees the last ``window`` tokens up to itself; 0: all of them.
        """


Status = Literal["waiting", "running", "finished"]


class MovedPart(NamedTuple):
    """Tokens ``start:end`` of a prompt whose keys and values are those of tokens ``first`` and on of what is
    pinned as ``source``: computed without what stands before them here, and turned to their place."""

    start: int
    end: int
    source: int
    first: int


class Join(NamedTuple):
    """Keys and values that move: blocks ``to`` [m] get the rows at ``slots`` [m * S] of the pool.

    Keys of each are turned by ``turns`` [m * S] positions more.
    """

    to: array[int]
    slots: array[int]
    turns: array[int]


@dataclass(slots=True, eq=False)
class Sequence:
    """One stream of tokens: a prompt and what was made of it. The Scheduler is its only writer.

    ``tokens`` is an array("i"): half a list's memory, and Python's garbage collector, which would
    look at each token of each list again and again (0.1 s for 1,000 long prompts), passes it by.

    ``tokens[:num_computed_tokens]`` have their keys and values in the cache, or in its host copy.
    ``priority`` is higher for the more urgent. ``arrival`` and ``deadline`` are seconds of one
    clock. Blocks are shared only between sequences of the same ``salt``, and none goes to disk unless
    ``is_kept``. ``cached_tokens`` counts the tokens that the prefix cache spared it when it first ran.
    ``parts`` of it are not computed but taken from elsewhere. ``pin``: when it ends, the blocks of so many of
    its first tokens are pinned, under such a number: (number, tokens).
    """

    id: int
    tokens: array[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    arrival: float = 0.0
    deadline: float = math.inf
    salt: str = ""
    is_kept: bool = True
    parts: tuple[MovedPart, ...] = ()
    pin: tuple[int, int] | None = None
    prompt_len: int = -1  # -1: all of ``tokens``
    num_computed_tokens: int = 0
    cached_tokens: int = 0
    status: Status = "waiting"
    finish_reason: EndReason | None = None

    def __post_init__(self) -> None:
        if self.prompt_len < 0:
            self.prompt_len = len(self.tokens)


Drafter: TypeAlias = "Callable[[Sequence, int], array[int]]"
"""(a sequence, how many at most) -> tokens that may come next in it; fewer, or none, where it has no idea."""


GUESS = -(2**31)  # in a plan, in the place of a token that the draft model is to guess when the step begins


class PlanItem(NamedTuple):
    """What one sequence does in a step. A tuple, as a step makes one for each sequence.

    ``tokens`` [n] go to positions ``start:start + n``. One that is still being drawn is ``-1 - r``: it
    will be what the step before draws as its r-th. Those beyond the sequence's own are a draft: guesses, to
    be checked by what is drawn in their places. ``block_table`` is the sequence's, as far as these tokens.
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
    (host slot, block), in this order; first of all ``save`` (block, what it holds), last of all ``load``
    (keys and values, block) are exchanged with the disk, and then ``joins`` made. ``items`` has ``decodes``
    sequences of one new token first, with ``decode_context`` tokens before them, and ``drafted`` guesses
    behind their own; then ``chunk_tokens`` tokens of sequences that catch up, with ``chunk_context`` tokens
    before them, summed over tokens.
    ``preempted`` had to make room: (sequence, whether it was swapped out).
    """

    items: list[PlanItem]
    num_blocks: int
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    decodes: int = 0
    decode_context: int = 0
    chunk_tokens: int = 0
    chunk_context: int = 0
    preempted: list[tuple[int, bool]] = field(default_factory=list)
    drafted: int = 0
    save: list[tuple[int, bytes]] = field(default_factory=list)
    load: list[tuple[bytes, int]] = field(default_factory=list)
    joins: list[Join] = field(default_factory=list)


class StepCosts(NamedTuple):
    """What a step takes, in one unit of time: for itself, for each decode and each token of the decodes'
    context, for each token of a chunk and each of the tokens before it.

    ``windows``: in which share of the layers a token sees so many of the last tokens only.
    """

    step: float
    decode: float
    decode_context: float
    chunk: float
    chunk_context: float
    windows: tuple[tuple[int, float], ...] = ()


def hidden_pairs(window: int, start: int, tokens: int) -> int:
    """Of ``tokens`` tokens from position ``start`` on, each with all before it, the pairs that it hides."""
    first = max(start, window)
    count = start + tokens - first
    return count * (first + 1 - window) + count * (count - 1) // 2 if window and count > 0 else 0


class Advance(NamedTuple):
    """How a sequence goes on after a step: new ``tokens``, perhaps its end, perhaps ``forks``.

    A draft that was accepted gives several tokens. Without any, and without an end, it is held: what comes
    next depends on others, which are not as far yet. Each fork starts a new sequence,
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
