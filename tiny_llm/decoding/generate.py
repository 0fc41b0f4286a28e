"""Owns the loop that turns a model and a prompt into tokens, one sequence at a time.

The loops are endless: whoever iterates decides when to stop. They ask a model nothing
but logits and a cache nothing but the ``KVCache`` protocol, and know no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import cast

import mlx.core as mx

from tiny_llm.data import Batch, KVCache
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.sampling.logprobs import top_logprobs
from tiny_llm.sampling.sampler import sample
from tiny_llm.sampling_params import SamplingParams

Forward = Callable[[Batch, KVCache], mx.array]  # a model: (batch, cache) -> logits [R, V]

PREFILL_CHUNK = 512  # prompt tokens a forward pass, so that a long prompt's attention scores stay bounded


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, and {token id: log-probability} if they were asked for."""

    id: int
    logprobs: dict[int, float] | None


def generate_without_cache(model: Forward, prompt: Sequence[int], params: SamplingParams) -> Iterator[Token]:
    """Yield tokens by running the whole sequence through the model again for each one.

    The definition of generation: with n tokens so far a step costs n rows, so an
    answer costs a quadratic number of them. ``generate`` yields the same tokens.
    """
    tokens = list(prompt)
    while True:
        logits = model(one_sequence(tokens, start=0), NoCache())
        token = choose(logits, params, position=len(tokens))
        tokens.append(token.id)
        yield token


def generate(
    model: Forward, kv: KVCache, prompt: Sequence[int], params: SamplingParams, *, chunk: int = PREFILL_CHUNK
) -> Iterator[Token]:
    """Yield tokens, running each token of prompt and answer through the model once.

    ``kv`` is empty and remembers: the prompt goes through first, then each token that was yielded.
    """
    logits = prefill(model, kv, prompt, chunk)
    for position in count(len(prompt)):
        token = choose(logits, params, position)
        yield token
        logits = model(one_sequence([token.id], start=position), kv)


def prefill(model: Forward, kv: KVCache, prompt: Sequence[int], chunk: int) -> mx.array:
    """Run the prompt through the model, at most ``chunk`` rows a pass; return its last logits [1, V]."""
    for start in range(0, len(prompt), chunk):
        logits = model(one_sequence(prompt[start : start + chunk], start), kv)
        mx.eval(logits)  # frees this chunk's scores before the next one's are made
    return logits


def one_sequence(tokens: Sequence[int], start: int) -> Batch:
    """A batch of one sequence: ``tokens`` at positions ``start`` on; logits of the last row."""
    rows = len(tokens)
    return Batch(
        tokens=mx.array(list(tokens), mx.int32),
        positions=mx.arange(start, start + rows, dtype=mx.int32),
        query_start_loc=(0, rows),
        logit_rows=mx.array([rows - 1], mx.int32),
    )


def choose(logits: mx.array, params: SamplingParams, position: int) -> Token:
    """Sample from logits [1, V] the token for ``position``; the step's one evaluation."""
    token = cast(int, sample(logits, [params], [position]).item())
    wanted = params.logprobs
    return Token(token, None if wanted is None else top_logprobs(logits[0], token, wanted))
