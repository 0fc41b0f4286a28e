"""Owns the choice of the next token from a row of logits.

Many rows are drawn in one call, each with its own parameters, and a row's token
depends on that row alone: its logits, its parameters, its seed and its position.
Knows nothing of sequences, text, or when to stop.

The filters act in the order of transformers: temperature, top-k, top-p, min-p.
(vLLM tests min-p before top-p; the two differ only when both are on.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from tiny_llm.ops.argmax import argmax, largest
from tiny_llm.ops.backend import cpu, on_cpu
from tiny_llm.ops.metal import kernel, on_metal
from tiny_llm.ops.sums import row_sums, sums_before
from tiny_llm.sampling_params import SamplingParams

_LEAST = 1e-30  # still a normal float32; a temperature or top-p of it is already as good as greedy
_LEAST_NOISE = -4.0
_THREADS = 512
_MOST_TOKENS = 2**19  # that the Metal kernel can rank
_FEWEST_LOGITS = 8  # MLX gives a kernel fewer in another address space


def sample(logits: mx.array, params: Sequence[SamplingParams], positions: Sequence[int]) -> mx.array:
    """Choose one token a row: logits [R, V] -> token ids uint32 [R].

    ``params`` has R entries and ``positions`` the place each new token will take in
    its sequence. Each sampled row needs its seed. See ``sample_ref`` for what is drawn;
    the kernel draws the same token, but for rounding at the edge of top-p.
    """
    assert logits.ndim == 2 and logits.shape[0] == len(params) == len(positions)
    if not params:  # a step in the middle of a prompt
        return mx.zeros((0,), mx.uint32)
    scores = logits.astype(mx.float32)
    if all(p.temperature == 0 for p in params):
        return argmax(scores)
    if scores.size >= _FEWEST_LOGITS and scores.shape[1] <= _MOST_TOKENS and on_metal("sample", scores):
        return _sample_metal(scores, params, positions)
    if not on_cpu("sample", scores):
        return sample_ref(scores, params, positions)
    return cpu.sample(
        scores,
        [p.temperature for p in params],
        [p.top_k for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        [_seed_of(p) for p in params],
        list(positions),
    )


def _sample_metal(logits: mx.array, params: Sequence[SamplingParams], positions: Sequence[int]) -> mx.array:
    """A threadgroup a row."""
    rows, vocab = logits.shape
    floors = [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]
    return kernel("sample")(
        inputs=[
            logits,
            mx.array([p.temperature for p in params], mx.float32),
            mx.array([min(p.top_k, vocab) for p in params], mx.int32),
            mx.array([_share(p.top_p) for p in params], mx.uint32),
            mx.array(floors, mx.float32),
            noise_keys([_seed_of(p) for p in params], positions),
            vocab,
        ],
        template=[("TG", _THREADS), ("ALIGNED", vocab % 4 == 0)],
        grid=(_THREADS, rows, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(rows,)],
        output_dtypes=[mx.uint32],
    )[0]


def _share(top_p: float) -> int:
    """Top-p as the Metal kernel takes it: a share of 2^32, 0 where it keeps all.

    The kernel adds shares up as integers, whose sum is the same in whatever order its threads come.
    """
    if top_p == 1:
        return 0
    return max(1, min(2**32 - 1, round(top_p * 2**32)))


def sample_ref(logits: mx.array, params: Sequence[SamplingParams], positions: Sequence[int]) -> mx.array:
    """Draw with plain mlx.core: logits float32 [R, V] -> token ids uint32 [R].

    Temperature 0 takes the largest logit, the lowest id among equals. Otherwise the
    draw is ``argmax(filtered / temperature + gumbel noise)``, which is a draw from the
    softmax (Maddison et al. 2014, "A* Sampling", section 2), with noise that follows
    from (seed, position) alone. A row whose largest logit is not finite is drawn as at
    temperature 0.
    """
    tokens = mx.argmax(logits, axis=-1)
    rows = [r for r, p in enumerate(params) if p.temperature > 0]
    if not rows:
        return tokens
    at = mx.array(rows)
    drawn = [params[r] for r in rows]
    scores = filter_logits(logits[at], drawn)
    seeds = [_seed_of(p) for p in drawn]
    noise = gumbel_noise(seeds, [positions[r] for r in rows], logits.shape[1])
    finite = mx.isfinite(mx.max(logits[at], axis=-1))
    tokens[at] = mx.where(finite, mx.argmax(scores + noise, axis=-1), tokens[at])
    return tokens


def filter_logits(logits: mx.array, params: Sequence[SamplingParams]) -> mx.array:
    """Scale by temperature and put -inf where a token may not be drawn: [R, V] -> float32 [R, V].

    The largest score of each row is 0 in the result, so ``exp`` of it gives the
    probabilities up to one factor. No row may have temperature 0.
    """
    scores = logits.astype(mx.float32)
    # The maximum goes first, so that a tiny temperature cannot overflow.
    scores = scores - mx.max(scores, axis=-1, keepdims=True)
    scores = scores / _column([max(p.temperature, _LEAST) for p in params])
    ranked = [r for r, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if ranked:  # ranking is the dear part, so only rows that ask for it pay
        at = mx.array(ranked)
        allowed = _among_best(scores[at], [params[r] for r in ranked])
        scores[at] = mx.where(allowed, scores[at], -mx.inf)
    floor = _column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params])
    return mx.where(scores >= floor, scores, -mx.inf)


def _among_best(scores: mx.array, params: Sequence[SamplingParams]) -> mx.array:
    """``top_k_top_p_mask``; where each row has a top-k, only the largest of them are ranked."""
    most = max(p.top_k for p in params)
    if not all(p.top_k for p in params) or most >= scores.shape[1]:
        return top_k_top_p_mask(scores, params)
    best = largest(scores, most)
    keep = top_k_top_p_mask(mx.take_along_axis(scores, best, axis=-1), params)
    return mx.put_along_axis(mx.zeros(scores.shape, mx.bool_), best, keep, axis=-1)


def top_k_top_p_mask(scores: mx.array, params: Sequence[SamplingParams]) -> mx.array:
    """Which tokens top-k, then top-p (nucleus) sampling keep: scores [R, V] -> bool [R, V].

    Top-k keeps the k best; among equals the lower id goes first. Top-p then keeps the
    fewest of them, best first, whose share of their sum reaches p: the token that
    crosses p stays (Holtzman et al. 2019, section 3.1). ``scores`` have maximum 0.
    """
    vocab = scores.shape[1]
    order = mx.argsort(-scores, axis=-1)
    weights = mx.exp(mx.take_along_axis(scores, order, axis=-1))
    among_k = mx.arange(vocab) < _column([p.top_k or vocab for p in params])
    weights = mx.where(among_k, weights, 0)
    # p = 1 keeps all; rounding in the sum must not cut the tail.
    share = _column([max(p.top_p, _LEAST) if p.top_p < 1 else math.inf for p in params])
    keep = among_k & (sums_before(weights) < share * row_sums(weights))
    return mx.put_along_axis(mx.zeros(scores.shape, mx.bool_), order, keep, axis=-1)


def gumbel_noise(seeds: Sequence[int], positions: Sequence[int], vocab: int) -> mx.array:
    """Standard Gumbel noise [R, V], row r from (seeds[r], positions[r]) and nothing else.

    The row's key is a hash of the seed, exclusive-or the position: two rows share a
    key only if both agree. (Without the hash, seed 1 at 0 would repeat seed 0 at 1.)
    A value is above -3.2, but for one in 2^32 that would be -inf, with which a token
    that is alone could not win.
    """

    def row(key: mx.array) -> mx.array:
        return mx.maximum(mx.random.gumbel((vocab,), key=key), _LEAST_NOISE)

    return mx.vmap(row)(noise_keys(seeds, positions))


def noise_keys(seeds: Sequence[int], positions: Sequence[int]) -> mx.array:
    """The key of each row's noise, uint32 [R, 2]; see ``gumbel_noise``."""

    def row(seed_key: mx.array, position_key: mx.array) -> mx.array:
        return mx.random.split(seed_key)[0] ^ position_key

    seed_keys = mx.stack([mx.random.key(seed) for seed in seeds])
    position_keys = mx.stack([mx.random.key(position) for position in positions])
    return mx.vmap(row)(seed_keys, position_keys)


def _seed_of(params: SamplingParams) -> int:
    assert params.seed is not None or params.temperature == 0, "whoever adds a request gives it a seed"
    return params.seed or 0


def _column(values: list[float] | list[int]) -> mx.array:
    return mx.array(values)[:, None]
