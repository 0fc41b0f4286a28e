"""Our GPU kernels against MLX's own operations, one call at a time; random numbers in bfloat16, medians.

Shapes are those of ``--shape`` with 4-bit weights. Both sides take turns on the same inputs, and matrices
take turns too, so that no cache holds them. MLX's attention reads dense keys and values: to gather
pages for it is not counted. Needs a GPU that MLX uses (``--backend metalsim`` only shows that all this runs).
Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import mlx.core as mx
from measure.sides import numbers

from tiny_llm.config import ModelConfig
from tiny_llm.data import Pages, QuantizedTensor
from tiny_llm.engine.rounds import Trial, interleave
from tiny_llm.errors import ConfigError
from tiny_llm.ops.backend import use
from tiny_llm.ops.paged_attention import paged_attention
from tiny_llm.ops.quantized_matmul import quantized_matmul
from tiny_llm.ops.rms_norm import add_rms_norm
from tiny_llm.ops.rope import rope_frequencies, rope_qk
from tiny_llm.ops.swiglu import swiglu
from tiny_llm.ops.work_lists import WorkLists
from tiny_llm.weights.names import config_of

GROUP, BITS, BLOCK, EPS = 64, 4, 16, 1e-6
COPIES = 8  # of a matrix
Out = mx.array | Sequence[mx.array]
Pair = tuple[str, list[Callable[[], Out]], list[Callable[[], Out]]]  # a name, our calls, MLX's


def normal(*shape: int, seed: int = 0) -> mx.array:
    """Seeded bfloat16 numbers."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16)


def matmuls(config: ModelConfig, rows: int) -> Iterator[Pair]:
    """The widest map of a layer, and its way back."""
    E, F = config.hidden_size, config.intermediate_size
    for name, outputs, width in (("up", F, E), ("down", E, F)):
        x = normal(rows, width)
        weights = [mx.quantize(normal(outputs, width, seed=s), GROUP, BITS) for s in range(COPIES)]
        mx.eval(x, weights)
        ours = [partial(quantized_matmul, x, QuantizedTensor(*w, GROUP, BITS)) for w in weights]
        theirs = [partial(mx.quantized_matmul, x, *w, group_size=GROUP, bits=BITS) for w in weights]
        yield f"{name}, {rows} rows", list(ours), list(theirs)


def attention(config: ModelConfig, sequences: int, new: int, context: int) -> Pair:
    """``new`` queries a sequence, the last of ``context`` tokens."""
    H, K, D = config.num_heads, config.num_kv_heads, config.head_dim
    blocks = -(-context // BLOCK)
    tables = mx.arange(sequences * blocks, dtype=mx.int32).reshape(sequences, blocks)
    at = mx.arange(context - new, context, dtype=mx.int32)
    slots = (tables[:, at // BLOCK] * BLOCK + at % BLOCK).reshape(-1)
    starts = mx.arange(sequences + 1, dtype=mx.int32) * new
    pages = Pages(slots, tables, starts, mx.full((sequences,), context, mx.int32))
    q, k = normal(sequences * new, H, D), normal(sequences * new, K, D, seed=1)
    pool = normal(sequences * blocks, K, D, BLOCK), normal(sequences * blocks, K, BLOCK, D)
    dense = normal(sequences, K, context, D), normal(sequences, K, context, D, seed=1)
    queries = normal(sequences, H, new, D)
    mx.eval(
        q,
        k,
        pool,
        dense,
        queries,
        pages.slot_mapping,
        pages.block_tables,
        pages.query_start_loc,
        pages.context_lens,
    )

    work = WorkLists(pages)  # as in a model, where all layers of a step share it

    def ours() -> mx.array:
        return paged_attention(q, k, k, pool, pages, work)[0]

    def theirs() -> mx.array:
        mask = "causal" if new > 1 else None
        return mx.fast.scaled_dot_product_attention(queries, *dense, scale=D**-0.5, mask=mask)

    return f"attention, {sequences} x {new} after {context}", [ours], [theirs]


def small(config: ModelConfig, rows: int) -> Iterator[Pair]:
    """What moves little."""
    E, F, H, K, D = (
        *(config.hidden_size, config.intermediate_size),
        *(config.num_heads, config.num_kv_heads, config.head_dim),
    )
    x, y, weight, gate = normal(rows, E), normal(rows, E, seed=1), normal(E), normal(rows, F)
    q, k, positions = normal(rows, H, D), normal(rows, K, D), mx.arange(rows, dtype=mx.int32)
    inv_freq = rope_frequencies(D, config.rope_theta)
    mx.eval(x, y, weight, gate, q, k, positions, inv_freq)

    def norm() -> Out:
        total = x + y
        return total, mx.fast.rms_norm(total, weight, EPS)

    def turn() -> Out:
        turned = partial(mx.fast.rope, dims=D, traditional=False, base=None, scale=1.0, offset=0)
        return tuple(turned(a.swapaxes(0, 1), freqs=1 / inv_freq) for a in (q, k))

    yield f"add and norm, {rows} rows", [partial(add_rms_norm, x, y, weight, EPS)], [norm]
    yield (
        f"rotate, {rows} rows",
        [partial(rope_qk, q, k, positions, inv_freq, None, None, EPS)],
        [turn],
    )
    yield f"swiglu, {rows} rows", [partial(swiglu, gate, gate)], [lambda: gate * mx.sigmoid(gate) * gate]


def seconds(calls: Sequence[Callable[[], Out]], count: int) -> float:
    """Of ``count`` calls in one evaluation."""
    outs = [calls[i % len(calls)]() for i in range(count)]
    began = time.perf_counter()
    mx.eval(outs)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen2-1.5b")
    parser.add_argument("--backend", default="metal", choices=("metal", "cuda", "metalsim"))
    parser.add_argument("--rows", type=numbers, default=(1, 2, 4, 8, 16, 64, 512), help="rows of x")
    parser.add_argument("--context", type=numbers, default=(512, 4096), help="tokens that attention sees")
    parser.add_argument("--calls", type=int, default=32, help="in one evaluation")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    try:
        with use(options.backend):
            measure(options)
    except ConfigError as error:  # no GPU
        print(error)


def measure(options: argparse.Namespace) -> None:
    """All of it, on the backend in use."""
    config = ModelConfig.from_hf(config_of(options.shape))
    found = {}
    print(f"{'microseconds a call':<32}{'ours':>12}{'MLX':>12}{'MLX / ours':>12}")
    for name, ours, theirs in pairs(config, options.rows, options.context):
        for calls in (ours, theirs):
            seconds(calls, options.calls)
        rates = interleave(
            [
                Trial(("ours",), options.calls, partial(seconds, ours, options.calls)),
                Trial(("mlx",), options.calls, partial(seconds, theirs, options.calls)),
            ],
            options.rounds,
        )
        taken = {side: 1e6 / rates[(side,)].median for side in ("ours", "mlx")}
        ratio = taken["mlx"] / taken["ours"]
        print(f"{name:<32}{taken['ours']:>12.1f}{taken['mlx']:>12.1f}{ratio:>11.2f}x")
        found[name] = {**taken, "ratio": ratio}
    facts = {"benchmark": "gpu_ops", "shape": options.shape, "backend": options.backend}
    print(json.dumps(facts | {"device": mx.device_info(), "us": found}, default=str))


def pairs(config: ModelConfig, rows: Sequence[int], contexts: Sequence[int]) -> Iterator[Pair]:
    """Every op at every size."""
    for count in rows:
        yield from matmuls(config, count)
    for context in contexts:
        yield attention(config, 1, 1, context)
        yield attention(config, 16, 1, context)
        yield attention(config, 1, min(512, context), context)
    for count in (1, 512):
        yield from small(config, count)


if __name__ == "__main__":
    main()
