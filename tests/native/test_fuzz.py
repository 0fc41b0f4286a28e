"""Random shapes, types and layouts of memory: the CPU kernels against ``ref``, on each instruction set.

Each case is one number, so that a failure's message is enough to see it again. Beside the result, a part
of the rows is computed again on another number of threads: a row's bits depend on nothing but itself.
``make fuzz`` runs 10,000 cases on each instruction set; $TINY_LLM_FUZZ says how many.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import pytest

from tests.instruction_sets import SETS
from tiny_llm.data import Pages, QuantizedTensor
from tiny_llm.ops import backend
from tiny_llm.ops.argmax import argmax, argmax_ref
from tiny_llm.ops.attention import attention_ref
from tiny_llm.ops.embedding import embedding
from tiny_llm.ops.experts import Routing, experts
from tiny_llm.ops.linear import gated, linears, pack
from tiny_llm.ops.paged_attention import paged_attention
from tiny_llm.ops.quantized_matmul import quantized_matmul
from tiny_llm.ops.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from tiny_llm.ops.rope import rope, rope_frequencies, rope_qk, rope_qk_ref, rope_ref
from tiny_llm.ops.softmax import softmax, softmax_ref
from tiny_llm.ops.swiglu import swiglu, swiglu_ref
from tiny_llm.sampling.logprobs import reported, reported_ref
from tiny_llm.sampling.sampler import sample, sample_ref
from tiny_llm.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(not backend.works(), reason="the CPU kernels are not built")
CASES = int(os.environ.get("TINY_LLM_FUZZ") or 1000)
THERE = SETS[: SETS.index(backend.cpu.best_isa()) + 1] if backend.works() else SETS[:1]


@dataclass(frozen=True)
class Case:
    """One call of an op: on some of its rows by the kernels, and all of it by ``ref``."""

    what: str
    rows: int
    run: Callable[[slice], Sequence[mx.array]]
    expected: Sequence[mx.array]
    bounds: Sequence[mx.array | float]  # how far off each may be


class Draw:
    """What a case is made of, drawn from its number."""

    def __init__(self, seed: int) -> None:
        self.choice = random.Random(seed)

    def size(self, most: int) -> int:
        """A size, often small, and often beside a multiple of 16."""
        near = 16 * self.choice.randint(1, max(1, most // 16)) + self.choice.randint(-1, 1)
        return min(most, self.choice.choice([1, self.choice.randint(1, most), near]))

    def rows(self) -> int:
        """How many rows: none, one, few or some dozens."""
        return self.choice.choice([0, 1, 1, 2, self.choice.randint(3, 17), self.choice.randint(18, 70)])

    def normal(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Numbers in row order."""
        key = mx.random.key(self.choice.getrandbits(32))
        return mx.random.normal(shape, key=key) * scale

    def array(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Numbers in some layout: in row order, in column order, a part of a larger array, one row again."""
        layout = self.choice.choice(["rows", "rows", "columns", "part", "again"])
        if layout == "columns":
            found = self.normal(*reversed(shape), scale=scale).transpose()
        elif layout == "part":
            step = self.choice.randint(1, 2)
            larger = self.normal(*(n * step + 3 for n in shape), scale=scale)
            found = larger[tuple(slice(1, 1 + n * step, step) for n in shape)]
        elif layout == "again" and shape[0]:
            found = mx.broadcast_to(self.normal(1, *shape[1:], scale=scale), shape)
        else:
            found = self.normal(*shape, scale=scale)
        mx.eval(found)
        return found

    def magnitude(self) -> float:
        """A scale: mostly 1, now and then far from it."""
        return self.choice.choice([1.0, 1.0, 1e-3, 30.0])

    def maybe(self, array: mx.array) -> mx.array | None:
        """The array, or none."""
        return array if self.choice.random() < 0.5 else None

    def matrix(self, rows: int, columns: int, group: int) -> mx.array | QuantizedTensor:
        """A weight in one of the formats that are packed; dense if ``group`` is 0."""
        weight = self.array(rows, columns, scale=columns**-0.5)
        dtype = self.choice.choice([mx.float32, mx.bfloat16, mx.float16])
        if not group:
            return weight.astype(dtype)
        bits = self.choice.choice([2, 3, 4, 4, 6, 8])
        packed, scales, biases = mx.quantize(weight.astype(dtype), group_size=group, bits=bits)
        return QuantizedTensor(packed, scales, biases, group, bits)


def format_of(weight: mx.array | QuantizedTensor) -> str:
    """A weight's format, for a message."""
    if isinstance(weight, mx.array):
        return f"{weight.dtype} {weight.shape}"
    return f"{weight.bits} bit by {weight.group_size} {weight.scales.dtype} {weight.scales.shape}"


def dense(weight: mx.array | QuantizedTensor) -> mx.array:
    """A weight as float32."""
    if isinstance(weight, mx.array):
        return weight.astype(mx.float32)
    parts = weight.scales.astype(mx.float32), weight.biases.astype(mx.float32)
    return mx.dequantize(weight.packed, *parts, group_size=weight.group_size, bits=weight.bits)


def largest(a: mx.array) -> float:
    """The largest size in an array, 0 in an empty one."""
    return mx.max(mx.abs(a)).item() if a.size else 0.0


def draw_rms_norm(d: Draw) -> Case:
    """With a residual or without."""
    rows, width = d.rows(), d.size(700)
    x, residual, weight = d.array(rows, width, scale=d.magnitude()), d.array(rows, width), d.array(width)
    what = f"rms_norm {x.shape}"
    if d.choice.random() < 0.5:
        expected = (rms_norm_ref(x, weight, 1e-6),)
        return Case(
            what,
            rows,
            lambda at: (rms_norm(x[at], weight, 1e-6),),
            expected,
            [1e-5 * largest(expected[0])],
        )
    both = add_rms_norm_ref(x, residual, weight, 1e-6)
    return Case(
        f"add_{what}",
        rows,
        lambda at: add_rms_norm(x[at], residual[at], weight, 1e-6),
        both,
        [0.0, 1e-5 * largest(both[1])],
    )


def draw_swiglu(d: Draw) -> Case:
    """Small and large gates."""
    rows, width = d.rows(), d.size(500)
    gate, up = d.array(rows, width, scale=d.magnitude()), d.array(rows, width)
    expected = swiglu_ref(gate, up)
    bound = 2e-6 * mx.abs(gate * up) + 1e-30
    return Case(f"swiglu {gate.shape}", rows, lambda at: [swiglu(gate[at], up[at])], [expected], [bound])


def draw_softmax(d: Draw) -> Case:
    """Some columns of -inf, never a row of nothing else."""
    rows, width = d.rows(), d.size(1500)
    x = d.array(rows, width, scale=d.magnitude())
    if width > 1 and d.choice.random() < 0.5:
        hidden = mx.arange(width) % d.choice.randint(2, 9) == 1
        x = mx.where(hidden, -mx.inf, x)
    return Case(f"softmax {x.shape}", rows, lambda at: [softmax(x[at])], [softmax_ref(x)], [2e-6])


def draw_embedding(d: Draw) -> Case:
    """Ids of any integer type."""
    group = d.choice.choice([0, 32, 64, 128])
    vocabulary, width = d.size(200), d.size(300) if not group else group * d.choice.randint(1, 5)
    weight, rows = d.matrix(vocabulary, width, group), d.rows()
    ids = [d.choice.randrange(vocabulary) for _ in range(rows)]
    tokens = mx.array(ids, dtype=d.choice.choice([mx.int32, mx.uint32, mx.int64]))
    table = pack(weight, exact=d.choice.random() < 0.5)
    wide = dense(weight)
    return Case(
        f"embedding {tokens.dtype} {tokens.shape} of {format_of(weight)}",
        rows,
        lambda at: [embedding(tokens[at], table)],
        [wide[tokens]],
        [1e-6 * largest(wide)],
    )


def draw_rope(d: Draw) -> Case:
    """One array of heads, or queries and keys with their norms."""
    rows, heads, kv_heads, half = d.rows(), d.size(9), d.size(4), d.size(64)
    q, k = d.array(rows, heads, 2 * half), d.array(rows, kv_heads, 2 * half)
    positions = mx.array([d.choice.randrange(5000) for _ in range(rows)], dtype=mx.int32)
    inv_freq = rope_frequencies(2 * half, 10000.0)
    what = f"rope {q.shape} and {k.shape}"
    if d.choice.random() < 0.4:
        expected = rope_ref(q, positions, inv_freq)
        bounds = [1e-5 * largest(q)]
        return Case(what, rows, lambda at: [rope(q[at], positions[at], inv_freq)], [expected], bounds)
    q_norm, k_norm = d.maybe(d.array(2 * half)), d.maybe(d.array(2 * half))
    norms = (inv_freq, q_norm, k_norm, 1e-6)
    both = rope_qk_ref(q, k, positions, *norms)
    return Case(
        f"{what}, norms {q_norm is not None} {k_norm is not None}",
        rows,
        lambda at: rope_qk(q[at], k[at], positions[at], *norms),
        both,
        [2e-5 * largest(both[0]), 2e-5 * largest(both[1])],
    )


def product(x: mx.array, weight: mx.array, group: int, exact: bool) -> tuple[mx.array, mx.array]:
    """``x weight^T``, and how far from it a kernel may be.

    Float32 sums are off by some units in the last place of the sum of sizes. Eight-bit activations
    are off by up to half a step each, where a step is a 127th of the largest in the group.
    """
    sizes = mx.abs(weight).T
    bound = (1e-6 + 2e-8 * x.shape[1]) * (mx.abs(x) @ sizes) + 1e-30
    if group and not exact:
        groups = mx.abs(x).reshape(x.shape[0], x.shape[1] // group, group)
        steps = mx.max(groups, axis=-1, keepdims=True) / 127
        halves = mx.broadcast_to(steps * 0.501, groups.shape).reshape(x.shape)
        bound = bound + halves @ sizes
    return x @ weight.T, bound


def narrowed(x: mx.array, weight: mx.array | QuantizedTensor, exact: bool) -> mx.array:
    """``x`` as bfloat16 where a kernel rounds it to that."""
    if exact or isinstance(weight, QuantizedTensor) or weight.dtype != mx.bfloat16:
        return x
    return x.astype(mx.bfloat16).astype(mx.float32) if backend.cpu.isa() == "avx512bf16" else x


def draw_linear(d: Draw) -> Case:
    """One to three matrices of one group size, with biases or without."""
    group, exact = d.choice.choice([0, 32, 64, 128]), d.choice.random() < 0.5
    rows, width = d.rows(), d.size(300) if not group else group * d.choice.randint(1, 6)
    x = d.array(rows, width, scale=d.magnitude())
    weights = [d.matrix(d.size(100), width, group) for _ in range(d.choice.randint(1, 3))]
    biases = [d.maybe(d.array(dense(weight).shape[0])) for weight in weights]
    packed = [pack(weight, exact=exact) for weight in weights]
    answers = [product(narrowed(x, weight, exact), dense(weight), group, exact) for weight in weights]
    return Case(
        f"linear {x.shape} exact={exact} by {', '.join(map(format_of, weights))}",
        rows,
        lambda at: linears(x[at], packed, biases),
        [y if bias is None else y + bias for (y, _), bias in zip(answers, biases, strict=True)],
        [
            bound if bias is None else bound + 1e-6 * mx.abs(bias)
            for (_, bound), bias in zip(answers, biases, strict=True)
        ],
    )


def draw_quantized_matmul(d: Draw) -> Case:
    """A matrix that nobody packed."""
    group = d.choice.choice([32, 64, 128])
    rows, width = d.rows(), group * d.choice.randint(1, 6)
    x, weight = d.array(rows, width, scale=d.magnitude()), d.matrix(d.size(100), width, group)
    assert isinstance(weight, QuantizedTensor)
    y, bound = product(x, dense(weight), group, True)
    what = f"quantized_matmul {x.shape} by {format_of(weight)}"
    return Case(what, rows, lambda at: [quantized_matmul(x[at], weight)], [y], [bound])


def draw_gated(d: Draw) -> Case:
    """A pair of matrices of one format."""
    group, exact = d.choice.choice([0, 32, 64, 128]), d.choice.random() < 0.5
    rows, out, width = d.rows(), d.size(100), d.size(300) if not group else group * d.choice.randint(1, 6)
    x, kept = d.array(rows, width), d.choice.getstate()
    gate = d.matrix(out, width, group)
    d.choice.setstate(kept)
    up = d.matrix(out, width, group)
    gate_bias = d.maybe(d.array(out))
    packed = pack(gate, exact=exact), pack(up, exact=exact)
    met = narrowed(x, gate, exact)
    y, y_bound = product(met, dense(gate), group, exact)
    z, z_bound = product(met, dense(up), group, exact)
    y = y if gate_bias is None else y + gate_bias
    silu = y / (1 + mx.exp(-y))
    bound = 1.11 * y_bound * (mx.abs(z) + z_bound) + mx.abs(silu) * z_bound + 1e-6 * mx.abs(silu * z) + 1e-6
    return Case(
        f"gated {x.shape} exact={exact} by two of {format_of(gate)}",
        rows,
        lambda at: [gated(x[at], *packed, gate_bias, None)],
        [silu * z],
        [bound],
    )


def parted(weight: mx.array | QuantizedTensor, count: int) -> mx.array | QuantizedTensor:
    """A matrix as a stack of ``count``."""
    if isinstance(weight, mx.array):
        return weight.reshape(count, -1, weight.shape[-1])
    parts = (a.reshape(count, -1, a.shape[-1]) for a in (weight.packed, weight.scales, weight.biases))
    return QuantizedTensor(*parts, weight.group_size, weight.bits)


def draw_experts(d: Draw) -> Case:
    """Of any format, by exact activations; no two experts of a row are equally good."""
    group = d.choice.choice([0, 32, 64])
    count, rows, width = d.choice.randint(1, 9), d.rows(), (group or 8) * d.choice.randint(1, 3)
    middle = (group or 7) * d.choice.randint(1, 3)
    shapes = [(middle, width), (middle, width), (width, middle)]
    kept = d.choice.getstate()
    stacks: list[mx.array | QuantizedTensor] = []
    for shape in shapes:
        d.choice.setstate(kept)  # of one format
        stacks.append(parted(d.matrix(count * shape[0], shape[1], group), count))
    x = d.array(rows, width)
    logits = mx.stack([mx.array(d.choice.sample(range(count), count)) for _ in range(max(rows, 1))])[:rows]
    routing = Routing(d.choice.randint(1, count), d.choice.random() < 0.5, d.maybe(d.normal(count) * 1e-3))
    packed = [pack(stack, exact=True) for stack in stacks]
    with backend.use("ref"):
        expected = experts(x, logits * 1.0, routing, *map(dense, stacks))
    return Case(
        f"experts {x.shape} to {routing.per_token} of {count} by {format_of(stacks[0])}",
        rows,
        lambda at: [experts(x[at], logits[at] * 1.0, routing, *packed)],
        [expected],
        [1e-4 * largest(expected) + 1e-5],
    )


def pooled(tokens: Sequence[mx.array], tables: Sequence[Sequence[int]], blocks: int, size: int) -> mx.array:
    """Sequences of tokens [S, K, D] as blocks [N, K, S, D]; what no sequence has is NaN."""
    _, heads, dim = tokens[0].shape
    pool = mx.full((blocks, heads, size, dim), mx.nan)
    for sequence, table in zip(tokens, tables, strict=True):
        for number, block in enumerate(table):
            part = sequence[number * size : (number + 1) * size]
            pool[block, :, : part.shape[0]] = part.swapaxes(0, 1)
    return pool


def draw_attention(d: Draw) -> Case:
    """Some sequences, whose last tokens are new, in blocks that lie anywhere."""
    kv_heads, share, dim = d.size(3), d.size(4), d.choice.choice([8, 20, 32, 64, 80, 128])
    size, dtype = d.choice.choice([16, 32, 64]), d.choice.choice([mx.float32, mx.bfloat16, mx.float16])
    lengths = [d.size(d.choice.choice([40, 700])) for _ in range(d.choice.randint(1, 4))]
    news = [d.choice.randint(1, min(length, d.choice.choice([1, 40]))) for length in lengths]
    spare = d.choice.randint(0, 3)
    free = list(range(spare + sum(-(-length // size) for length in lengths)))
    d.choice.shuffle(free)
    tables = [[free.pop() for _ in range(-(-length // size))] for length in lengths]
    blocks = spare + sum(map(len, tables))
    keys = [d.normal(length, kv_heads, dim).astype(dtype).astype(mx.float32) for length in lengths]
    values = [d.normal(length, kv_heads, dim).astype(dtype).astype(mx.float32) for length in lengths]
    q = d.array(sum(news), kv_heads * share, dim)
    pool = (
        pooled(keys, tables, blocks, size).astype(dtype).swapaxes(2, 3),
        pooled(values, tables, blocks, size).astype(dtype),
    )
    places = [(b, p) for b in range(len(news)) for p in range(lengths[b] - news[b], lengths[b])]

    def run(at: slice) -> Sequence[mx.array]:
        """The sequences that have rows there, as far as those rows."""
        rows = places[at]
        if not rows:
            return [mx.zeros((0, *q.shape[1:]))]
        batch = sorted({b for b, _ in rows})
        counts = [sum(b == own for b, _ in rows) for own in batch]
        width = max(len(tables[b]) for b in batch)
        pages = Pages(
            slot_mapping=mx.array([tables[b][p // size] * size + p % size for b, p in rows], mx.int32),
            block_tables=mx.array([tables[b] + [0] * (width - len(tables[b])) for b in batch], mx.int32),
            query_start_loc=mx.array([sum(counts[:n]) for n in range(len(counts) + 1)], mx.int32),
            context_lens=mx.array([max(p for own, p in rows if own == b) + 1 for b in batch], mx.int32),
        )
        k, v = (mx.stack([source[b][p] for b, p in rows]) for source in (keys, values))
        copies = mx.contiguous(pool[0]), mx.contiguous(pool[1])
        return [paged_attention(q[at], k, v, copies, pages)[0]]

    begins = [sum(news[:b]) for b in range(len(news))]
    expected = [
        attention_ref(q[begin : begin + new], k, v, scale=dim**-0.5, offset=k.shape[0] - new)
        for begin, new, k, v in zip(begins, news, keys, values, strict=True)
    ]
    what = f"attention {q.shape} by {kv_heads} heads of {dtype}, {news} new of {lengths} in blocks of {size}"
    rounded = dtype == mx.bfloat16 and backend.cpu.isa() == "avx512bf16"  # queries and weights too
    bound = (1e-2 if rounded else 1e-5) * max(map(largest, values))
    return Case(what, len(places), run, [mx.concatenate(expected)], [bound])


def draw_argmax(d: Draw) -> Case:
    """With equals among the values, now and then."""
    x = d.array(max(1, d.rows()), d.size(3000))
    x = mx.round(x) if d.choice.random() < 0.5 else x
    return Case(f"argmax {x.shape}", x.shape[0], lambda at: [argmax(x[at])], [argmax_ref(x)], [0.0])


def draw_sampling(d: Draw) -> Case:
    """Rows with filters of their own, some of them greedy: the very tokens of ``ref``."""
    logits = d.array(max(1, d.rows()), d.size(3000), scale=d.choice.choice([0.5, 3.0, 10.0]))
    params = [
        SamplingParams(
            temperature=d.choice.choice([0.0, 0.3, 1.0, 2.0]),
            top_k=d.choice.choice([0, 0, 1, 5, 50, 5000]),
            top_p=d.choice.choice([1.0, 1.0, 0.9, 0.5, 0.01]),
            min_p=d.choice.choice([0.0, 0.0, 0.05]),
            seed=d.choice.getrandbits(32),
        )
        for _ in range(logits.shape[0])
    ]
    positions = [d.choice.randrange(100000) for _ in params]
    return Case(
        f"sample {logits.shape} {params}",
        len(params),
        lambda at: [sample(logits[at], params[at], positions[at])],
        [sample_ref(logits, params, positions)],
        [0.0],
    )


def draw_logprobs(d: Draw) -> Case:
    """The likeliest tokens' values; their ids may differ where two are equal."""
    rows, vocab = max(1, d.rows()), d.size(1500)
    logits, count = d.array(rows, vocab, scale=d.magnitude()), d.choice.randint(0, min(vocab, 40))
    tokens = mx.array([d.choice.randrange(vocab) for _ in range(rows)], dtype=mx.uint32)
    chosen, _, values = reported_ref(logits, tokens, count)
    bound = 2e-6 * (1 + largest(logits))
    return Case(
        f"logprobs {logits.shape} of {count}",
        rows,
        lambda at: reported(logits[at], tokens[at], count)[::2],
        [chosen, values],
        [bound, bound],
    )


DRAWS: Mapping[str, Callable[[Draw], Case]] = {
    "rms_norm": draw_rms_norm,
    "swiglu": draw_swiglu,
    "softmax": draw_softmax,
    "embedding": draw_embedding,
    "rope": draw_rope,
    "linear": draw_linear,
    "quantized_matmul": draw_quantized_matmul,
    "gated": draw_gated,
    "experts": draw_experts,
    "attention": draw_attention,
    "argmax": draw_argmax,
    "sampling": draw_sampling,
    "logprobs": draw_logprobs,
}


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that the machine has; afterwards the settings are as before."""
    if request.param not in THERE:
        pytest.skip(f"this machine has no {request.param}")
    before, threads = backend.cpu.isa(), backend.cpu.num_threads()
    backend.cpu.set_isa(request.param)
    with backend.use("cpu"):
        yield request.param
    backend.cpu.set_isa(before)
    backend.cpu.set_num_threads(threads)


def problem(case: Case, got: Sequence[mx.array]) -> str | None:
    """What is wrong with a result, if anything is."""
    for number, (result, expected, bound) in enumerate(zip(got, case.expected, case.bounds, strict=True)):
        if result.shape != expected.shape or result.dtype != expected.dtype:
            return f"output {number} is {result.dtype} {result.shape}, not {expected.dtype} {expected.shape}"
        apart = mx.abs(result.astype(mx.float32) - expected.astype(mx.float32))
        beyond = mx.max(apart - bound).item() if result.size else 0.0
        if not beyond <= 0:  # or NaN
            return f"output {number} is {beyond:.3g} further off than it may be"
    return None


@pytest.mark.parametrize("op", DRAWS)
def test_kernels_agree_with_ref(op: str, isa: str) -> None:
    for number in range(math.ceil(CASES / len(DRAWS))):
        draw = Draw(number)
        case = DRAWS[op](draw)
        threads, others = draw.choice.choice([(1, 2), (2, 3), (3, 1)])
        backend.cpu.set_num_threads(threads)
        whole = case.run(slice(None))
        wrong = problem(case, whole)
        assert wrong is None, f"{op} case {number} on {isa}: {case.what}: {wrong}"

        backend.cpu.set_num_threads(others)
        begin = draw.choice.randint(0, case.rows)
        part = slice(begin, draw.choice.randint(begin, case.rows))
        for all_rows, some in zip(whole, case.run(part), strict=True):
            same = mx.array_equal(all_rows[part].view(mx.uint32), some.view(mx.uint32)).item()
            assert same, f"{op} case {number} on {isa}: {case.what}: other bits for rows {part} on their own"
