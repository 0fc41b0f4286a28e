"""The ops of a model as calls to time: their arguments, and the bytes and operations that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from tiny_llm.config import ModelConfig, Quantization
from tiny_llm.data import Matrix, SamplingParams
from tiny_llm.decoding.generate import one_sequence
from tiny_llm.kv.dense import DenseCache
from tiny_llm.models.loading import kv_dtype
from tiny_llm.ops.embedding import embedding
from tiny_llm.ops.linear import gated, linear, pack
from tiny_llm.ops.rms_norm import add_rms_norm
from tiny_llm.ops.rope import rope_frequencies, rope_qk
from tiny_llm.ops.softmax import softmax
from tiny_llm.sampling.sampler import sample
from tiny_llm.weights.dummy import dummy_weights

COLD_BYTES = 256e6  # of matrices that take turns: more than a cache holds
MOST_OPERATIONS = 40e9  # in one measurement
BYTES_A_WEIGHT = 9 / 16  # 4 bits, and two numbers of 16 bits for each 64
FOUR_BITS = Quantization(4, 64)
SMALL_CALLS = 100
FLOAT = 4
Arrays = mx.array | Sequence[mx.array]
Call = Callable[[], Arrays]


@dataclass(frozen=True, slots=True)
class Case:
    """An op with its arguments, in copies that take turns; ``bytes`` and ``operations`` are one call's.

    ``peak`` is which arithmetic it could reach: "int8" or "fma".
    """

    name: str
    calls: Sequence[Call]
    bytes: float
    operations: float
    peak: str = "fma"


def cases(config: ModelConfig, rows: int, context: int, exact: bool) -> Iterator[Case]:
    """Every op of a step of ``rows`` tokens, the last of them after ``context`` tokens."""
    yield from _linear_cases(config, rows, exact)
    yield _attention(config, rows, max(context, rows))
    yield from _small_cases(config, rows, exact)


def _linear_cases(config: ModelConfig, rows: int, exact: bool) -> Iterator[Case]:
    """The four maps of a layer, and the head, which only a sequence's last token meets."""
    E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    wide, narrow = config.num_heads * D, config.num_kv_heads * D
    peak = "fma" if exact else "int8"
    for name, shape, of_rows in (
        ("query, key, value in one", (wide + 2 * narrow, E), rows),
        ("attention out", (E, wide), rows),
        ("down", (E, F), rows),
        ("head", (config.vocab_size, E), min(rows, 16)),
    ):
        x = mx.random.normal((of_rows, shape[1]))
        calls = [partial(linear, x, weight) for weight in _matrices(shape, of_rows, exact)]
        size = shape[0] * shape[1]
        yield Case(name, calls, size * BYTES_A_WEIGHT, 2.0 * size * of_rows, peak)
    weights = _matrices((F, E), rows, exact)
    half = len(weights) // 2
    x = mx.random.normal((rows, E))
    pairs = zip(weights[:half], weights[half:], strict=False)
    calls = [partial(gated, x, gate, up, None, None) for gate, up in pairs]
    yield Case("gate and up", calls, 2 * F * E * BYTES_A_WEIGHT, 4.0 * F * E * rows, peak)


def _matrices(shape: tuple[int, int], rows: int, exact: bool) -> list[Matrix]:
    """Random packed matrices, two at least and so many that they do not stay in a cache."""
    size = shape[0] * shape[1]
    copies = min(COLD_BYTES / (size * BYTES_A_WEIGHT), MOST_OPERATIONS / (2 * size * rows))
    names = [str(i) for i in range(max(2, int(copies)))]
    made = dummy_weights(
        dict.fromkeys(names, shape),
        dtype=mx.bfloat16,
        quantize=FOUR_BITS,
        quantizable=names,
        finish=partial(pack, exact=exact),
    )
    return list(made.values())


def _attention(config: ModelConfig, rows: int, context: int) -> Case:
    """Queries at the end of ``context`` keys, of which they see their window; its layers take turns."""
    H, K, D, layers = config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers
    dtype = kv_dtype(config, dtype=None, quantize=4)
    window = max(config.windows, default=0) or context
    pairs = sum(min(window, seen) for seen in range(context - rows + 1, context + 1))
    read = min(context, window + rows - 1)
    layers = max(1, min(layers, int(MOST_OPERATIONS / (4 * H * D * pairs))))
    kv, before = DenseCache(layers, dtype), context - rows

    def step(layer: int, start: int, end: int, window: int) -> mx.array:
        if layer == 0:
            kv.truncate(start)
        q, k, v = (mx.random.normal((end - start, heads, D), key=key) for heads in (H, K, K))
        mx.eval(q, k, v)
        return kv.attend(layer, q, k, v, one_sequence([0] * (end - start), start), window=window)

    key = mx.random.key(0)
    if before:
        mx.eval([step(layer, 0, before, 1) for layer in range(layers)])  # what they see is not asked
    calls = [partial(step, layer, before, context, window) for layer in range(layers)]
    return Case(f"attention over {context}", calls, 2.0 * read * K * D * dtype.size, 4.0 * H * D * pairs)


def _small_cases(config: ModelConfig, rows: int, exact: bool) -> Iterator[Case]:
    """What moves little; arguments are in the cache."""
    E, H, K, D = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    x, y, ones = mx.random.normal((rows, E)), mx.random.normal((rows, E)), mx.ones(E)
    q, k = mx.random.normal((rows, H, D)), mx.random.normal((rows, K, D))
    positions, turns = mx.arange(rows, dtype=mx.int32), rope_frequencies(D, config.rope_theta)
    tokens = mx.arange(rows, dtype=mx.int32)
    logits = mx.random.normal((min(rows, 16), config.vocab_size))
    greedy = [SamplingParams()] * logits.shape[0]
    filtered = [SamplingParams(temperature=1, top_k=50, top_p=0.95, seed=0)] * len(greedy)
    free = [SamplingParams(temperature=1, seed=0)] * len(greedy)
    table = _matrices((config.vocab_size, E), 1, exact)[0]
    mx.eval(x, y, ones, q, k, positions, turns, tokens, logits)
    heads = float(rows * (H + K) * D)
    for name, call, numbers in (
        ("add and norm", partial(add_rms_norm, x, y, ones, 1e-6), 4.0 * rows * E),
        ("rotate query and key", partial(rope_qk, q, k, positions, turns, None, None, 1e-6), 2 * heads),
        ("embedding", partial(embedding, tokens, table), float(rows * E)),
        ("softmax over the vocabulary", partial(softmax, logits), 2.0 * logits.size),
        ("greedy token", partial(sample, logits, greedy, [0] * len(greedy)), float(logits.size)),
        (
            "token of top 50 and 0.95",
            partial(sample, logits, filtered, [0] * len(greedy)),
            float(logits.size),
        ),
        ("token at temperature 1", partial(sample, logits, free, [0] * len(greedy)), float(logits.size)),
    ):
        yield Case(name, [call] * SMALL_CALLS, numbers * FLOAT, 0.0)
