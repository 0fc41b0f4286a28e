"""What do our Metal kernels move, over the least possible? Counted by metalsim; no GPU, so no speed.

A kernel's least is each byte of its inputs and outputs once (of a pool: of the tokens that are seen). What it
moves is each element once a threadgroup: the cores' own caches keep it so long, at best; of logits, each time
that they are read, since no core keeps a row of them. Shapes are those of Qwen2-1.5B with 4-bit
weights, with fewer outputs, of which all are alike. From these and the chips' published figures: tokens/s
that no run has measured, at most. Reuse is how many rows use what is moved, each time.
Prints two tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import mlx.core as mx
from measure.apple import CHIPS, decode
from measure.sides import numbers

from tiny_llm.config import ModelConfig
from tiny_llm.data import Pages, QuantizedTensor
from tiny_llm.metalsim.build import why_not
from tiny_llm.metalsim.run import Traffic, watch
from tiny_llm.ops.backend import use
from tiny_llm.ops.embedding import embedding
from tiny_llm.ops.kv_pool import KvFormat
from tiny_llm.ops.linear import gated, linears
from tiny_llm.ops.paged_attention import attention_tiles_keep_bits, paged_attention
from tiny_llm.ops.quantized_matmul import quantized_matmul
from tiny_llm.ops.quantized_matmul_metal import matmul_tiles_keep_bits
from tiny_llm.ops.rms_norm import add_rms_norm, rms_norm
from tiny_llm.ops.rope import rope_frequencies, rope_qk
from tiny_llm.ops.swiglu import swiglu
from tiny_llm.sampling.sampler import sample
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.weights.names import config_of

SHAPE = "qwen2-1.5b"
WIDTH, HEADS, KV_HEADS, DIM, BLOCK = 1536, 12, 2, 128, 16
Moved = dict[str, int]


@dataclass(frozen=True)
class Row:
    """One kernel at one size: bytes moved over the least, of what matters most there and of all."""

    kernel: str
    size: str
    what: str
    main_bytes: int
    ratio: float
    all_ratio: float
    reuse: float
    loads: float
    simd_operations: float
    barriers: float


@dataclass(frozen=True)
class Case:
    """A call of an op; ``least`` is the bytes that each buffer must move, ``main`` those that matter most.

    ``uses`` is how many rows need each element of those.
    """

    size: str
    main: Sequence[str]
    least: Moved
    outputs: int
    call: Callable[[], object]
    uses: int = 1


def normal(*shape: int, seed: int = 0) -> mx.array:
    """Seeded bfloat16 numbers."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16)


def matmul_case(rows: int, outputs: int) -> Case:
    """Rows of activations times a 4-bit matrix."""
    packed, scales, biases = mx.quantize(normal(outputs, WIDTH), 64, 4)
    x, weight = normal(rows, WIDTH), QuantizedTensor(packed, scales, biases, 64, 4)
    least = {"x": x.nbytes, "packed": packed.nbytes, "scales": scales.nbytes, "biases": biases.nbytes}
    least |= {"rows": 4, "outputs": 4, "out": rows * outputs * 2}
    main = ("packed", "scales", "biases")
    return Case(f"{rows} rows", main, least, rows * outputs, lambda: quantized_matmul(x, weight), rows)


def fused_case(rows: int, outputs: int, *, pair: bool) -> Case:
    """The same by three matrices with biases at once, or by a gated pair."""
    x = normal(rows, WIDTH)
    weights = [
        QuantizedTensor(*mx.quantize(normal(outputs, WIDTH, seed=i), 64, 4), 64, 4)
        for i in range(2 if pair else 3)
    ]
    biases = [normal(outputs, seed=i) for i in range(len(weights))]
    least = {"x": x.nbytes, "rows": 4} | ({"outputs": 4} if pair else {})
    for i, weight in enumerate(weights):
        least |= {f"packed_{i}": weight.packed.nbytes, f"bias_{i}": biases[i].nbytes}
        least |= {f"scales_{i}": weight.scales.nbytes, f"biases_{i}": weight.biases.nbytes}
        least |= {} if pair else {f"outputs_{i}": 4, f"out_{i}": rows * outputs * 2}
    least |= {"out": rows * outputs * 2} if pair else {}
    main = [name for name in least if name.startswith(("packed", "scales", "biases"))]

    def call() -> object:
        return gated(x, weights[0], weights[1], biases[0], biases[1]) if pair else linears(x, weights, biases)

    return Case(f"{rows} rows", main, least, rows * outputs * (1 if pair else 3), call, rows)


def look_up_case(rows: int) -> Case:
    """Rows of a 4-bit table."""
    packed, scales, biases = mx.quantize(normal(256, WIDTH), 64, 4)
    table, tokens = QuantizedTensor(packed, scales, biases, 64, 4), mx.arange(rows) * 7
    least = {"tokens": 4 * rows, "words": 4, "packed": rows * WIDTH // 2, "out": rows * WIDTH * 2}
    least |= {"scales": rows * WIDTH // 64 * 2, "biases": rows * WIDTH // 64 * 2}
    main = ("packed", "scales", "biases", "out")
    return Case(f"{rows} rows", main, least, rows * WIDTH, lambda: embedding(tokens, table))


def draw_case(what: str, vocab: int, **options: float) -> Case:
    """A draw from a row of logits, peaked as a model's are."""
    logits = mx.random.normal((1, vocab), key=mx.random.key(0)) * 4
    params = [SamplingParams(temperature=1.0, seed=1, **options)]  # type: ignore[arg-type]
    least = {"logits": logits.nbytes, "vocab": 4, "keys": 8, "out": 4}
    least |= dict.fromkeys(("temperatures", "top_k", "top_p", "floors"), 4)
    return Case(f"{vocab}, {what}", ("logits",), least, 1, lambda: sample(logits, params, [0]))


def attention_case(sequences: int, context: int, new: int = 1, *, int8: bool = False, alike: int = 0) -> Case:
    """``new`` tokens a sequence, the last of a paged context, which is bfloat16 or int8.

    The first ``alike`` tokens, whole blocks, are the same ones in all sequences.
    """
    blocks, rows = -(-context // BLOCK), sequences * new
    tables = mx.arange(sequences * blocks, dtype=mx.int32).reshape(sequences, blocks)
    tables[:, : alike // BLOCK] = tables[0, : alike // BLOCK]
    at = mx.arange(context - new, context, dtype=mx.int32)
    slots = (tables[:, at // BLOCK] * BLOCK + at % BLOCK).reshape(-1)
    lens, starts = mx.full((sequences,), context, mx.int32), mx.arange(sequences + 1, dtype=mx.int32) * new
    pages = Pages(slots.astype(mx.int32), tables, starts, lens)
    q, k = normal(rows, HEADS, DIM), normal(rows, KV_HEADS, DIM, seed=1)
    count = sequences * blocks
    dtype = mx.int8 if int8 else mx.bfloat16
    pool = KvFormat(1, KV_HEADS, DIM, BLOCK, dtype, token_major=False).empty_pool(count, count)
    vectors = (alike + sequences * (context - alike)) * KV_HEADS
    pages_least = dict.fromkeys(("keys", "values"), vectors * DIM * dtype.size)
    if int8:
        pages_least |= dict.fromkeys(("key_scales", "value_scales"), vectors * 2)
    least = {"q": q.nbytes, **pages_least, "tables": tables.nbytes, "out": q.nbytes}
    least |= {"work": 24 * rows, "width": 4, "scale": 4}
    size = f"{sequences} x {new} of {context} tokens" if new > 1 else f"{sequences} x {context} tokens"
    size += f", {alike} of them shared" if alike else ""
    size += ", int8" if int8 else ""
    uses = rows * context * HEADS // vectors
    return Case(size, tuple(pages_least), least, q.size, lambda: paged_attention(q, k, k, pool, pages), uses)


def small_cases(rows: int) -> Iterator[Case]:
    """Norms, the gated unit, and rotary embedding."""
    x, weight, eps = normal(rows, WIDTH), normal(WIDTH), {"eps": 4, "rows": 4}
    one = {"x": x.nbytes, "weight": weight.nbytes, "out": x.nbytes} | eps
    size = f"{rows} rows"
    yield Case(size, ("x", "out"), one, x.size, lambda: rms_norm(x, weight, 1e-6))
    two = one | {"residual": x.nbytes, "total": x.nbytes}
    yield Case(size, ("x", "residual", "total", "out"), two, x.size, lambda: add_rms_norm(x, x, weight, 1e-6))
    gate = {"gate": x.nbytes, "up": x.nbytes, "out": x.nbytes}
    yield Case(size, tuple(gate), gate, x.size, lambda: swiglu(x, x))
    q, k, norm = normal(rows, HEADS, DIM), normal(rows, KV_HEADS, DIM), normal(DIM)
    positions, inv_freq = mx.arange(rows, dtype=mx.int32), rope_frequencies(DIM, 1e6)
    turned = {"q": q.nbytes, "k": k.nbytes, "q_out": q.nbytes, "k_out": k.nbytes}
    least = (
        turned
        | eps
        | {"positions": 4 * rows, "inv_freq": inv_freq.nbytes, "q_norm": 2 * DIM, "k_norm": 2 * DIM}
    )
    yield Case(
        size,
        tuple(turned),
        least,
        q.size + k.size,
        lambda: rope_qk(q, k, positions, inv_freq, norm, norm, 1e-6),
    )


def measure(case: Case) -> Row:
    """Run a case with every access counted."""
    with watch() as seen:
        case.call()
    # Without attention's other half.
    seen = [(name, traffic) for name, traffic in seen if not name.startswith("kv_write")]
    main_bytes = moved(seen, case.main)
    main = main_bytes / sum(case.least[b] for b in case.main)
    every = moved(seen) / sum(case.least.values())
    per, lanes = case.outputs, 32
    return Row(
        seen[0][0],
        case.size,
        "+".join(dict.fromkeys(name.rstrip("_0123456789") for name in case.main)),
        main_bytes,
        main,
        every,
        case.uses / main,
        sum(sum(traffic.loads.values()) for _, traffic in seen) / per,
        sum(traffic.simd_operations for _, traffic in seen) / lanes / per,
        sum(traffic.barriers for _, traffic in seen) / per,
    )


def moved(seen: Sequence[tuple[str, Traffic]], buffers: Sequence[str] | None = None) -> int:
    """Bytes of these buffers, or of all, that come from, or go, beyond the caches."""
    return sum(
        (traffic.read if b == "logits" else traffic.fetched)[b] + traffic.written[b]
        for _, traffic in seen
        for b in buffers or traffic.read
        if b in traffic.read
    )


def at_most(rows: Sequence[Row], context: int = 512) -> dict[str, dict[str, float]]:
    """Show tokens/s that each chip cannot pass: computed, not measured."""
    config = ModelConfig.from_hf(config_of(SHAPE))
    moved = {r.kernel: max(other.ratio for other in rows if other.kernel == r.kernel) for r in rows}
    works = {
        f"{n} x {context}": decode(config, n, context, moved["quantized_matmul"], moved["paged_attention"])
        for n in (1, 16)
    }
    print(f"\nComputed, not measured: tokens/s at most, {SHAPE} with 4-bit weights, all sequences together")
    print("| chip | GB/s | TFLOP/s |" + "".join(f" {size} tokens | bound by |" for size in works))
    print("|---|---|---|" + "---|---|" * len(works))
    for c in CHIPS:
        cells = "".join(f" {work.tok_s(c):.0f} | {work.bound(c)} |" for work in works.values())
        print(f"| {c.name} | {c.gb_s:g} | {c.tflop_s:g} |{cells}")
    return {c.name: {size: round(work.tok_s(c), 1) for size, work in works.items()} for c in CHIPS}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--outputs", type=int, default=64, help="outputs of the matrix")
    parser.add_argument("--context", type=numbers, default=(256, 1000), help="tokens that attention sees")
    parser.add_argument("--vocab", type=int, default=16384, help="tokens that one is drawn of")
    options = parser.parse_args()
    if reason := why_not():
        print(reason)
        return
    with use("metalsim"):
        cases = [
            *(matmul_case(rows, options.outputs) for rows in (1, 2, 8, 16, 64, 128)),
            *(fused_case(rows, options.outputs, pair=pair) for rows in (1, 4, 16) for pair in (False, True)),
            look_up_case(1),
            look_up_case(16),
            draw_case("all", options.vocab),
            draw_case("top-k 50", options.vocab, top_k=50),
            draw_case("top-p 0.9", options.vocab, top_p=0.9),
            *(attention_case(n, context) for context in options.context for n in (1, 4)),
            attention_case(4, options.context[-1], int8=True),
            attention_case(16, 2304, alike=2048),
            attention_case(1, 128, 64),
            attention_case(1, 128, 64, int8=True),
            *small_cases(16),
            *small_cases(64),
        ]
        matmul_tiles_keep_bits("metalsim")  # once, and that is none of a case's traffic
        for int8 in (False, True):
            attention_tiles_keep_bits("metalsim", scaled=int8)
        rows = [measure(case) for case in cases]
    columns = ["kernel", "size", "moved over least", "least's share", "of", "KB", "loads an output", "reuse"]
    columns += ["all buffers", "simdgroup operations an output", "threads at barriers"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for r in rows:
        print(
            f"| {r.kernel} | {r.size} | {r.ratio:.3f} | {1 / r.ratio:.0%} | {r.what} "
            f"| {r.main_bytes / 1e3:.1f} | {r.loads:.1f} | {r.reuse:.1f} | {r.all_ratio:.2f} "
            f"| {r.simd_operations:.2f} | {r.barriers:.2f} |"
        )
    print(
        json.dumps(
            {"benchmark": "metal_traffic", "kernels": [asdict(r) for r in rows], "at_most": at_most(rows)}
        )
    )


if __name__ == "__main__":
    main()
