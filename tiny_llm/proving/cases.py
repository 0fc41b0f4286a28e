"""Owns what each op is tried on: questions with known answers, and calls that are timed.

An answer is known from ``ref`` on the CPU, or from the same rows alone: a row keeps its bits, whoever is
beside it. Shapes are the model's, but for how many rows there are. Knows no process and no clock.

Letters: ``T`` rows, ``E`` hidden size, ``H`` heads, ``K`` key/value heads, ``D`` head dim, ``S`` block size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from tiny_llm.data import Pages, QuantizedTensor
from tiny_llm.ops.attention import attention_ref
from tiny_llm.ops.embedding import embedding, embedding_ref
from tiny_llm.ops.experts import Routing, experts, experts_ref
from tiny_llm.ops.kv_pool import KvFormat, Pool, is_token_major, parted
from tiny_llm.ops.linear import gated, linear, linears
from tiny_llm.ops.paged_attention import kv_write, kv_write_ref, paged_attention, quantized
from tiny_llm.ops.quantized_matmul import quantized_matmul, quantized_matmul_ref
from tiny_llm.ops.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from tiny_llm.ops.rope import rope_frequencies, rope_qk, rope_qk_ref
from tiny_llm.ops.swiglu import swiglu, swiglu_ref
from tiny_llm.ops.work_lists import WorkLists
from tiny_llm.proving.choice import OPS
from tiny_llm.proving.record import Shapes
from tiny_llm.sampling.sampler import sample, sample_ref
from tiny_llm.sampling_params import SamplingParams

TOLERANCE: Mapping[str, float] = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Of the largest value of an answer: two roundings, and in float32 what another order of a sum makes."""
ROWS, ROW = 33, 20  # a row among others; tiles of 8, 16 and 32 do not divide them
EPS = 1e-6
MATRIX_BYTES = 96 * 2**20  # that matrices take together when they are timed: more than a cache holds
Arrays = Sequence[mx.array]
Op = Callable[..., mx.array | Arrays]
Step = Callable[[Arrays, int], Arrays]


@dataclass(frozen=True)
class Check:
    """``got`` is to be ``expected``, to ``tolerance`` of its largest value; 0: bit for bit."""

    name: str
    got: Callable[[], Arrays]
    expected: Callable[[], Arrays]
    tolerance: float = 0.0


@dataclass(frozen=True)
class TimedCall:
    """A call to be timed, in chains: ``step`` makes of a state the next one; ``make`` makes the first."""

    shape: str
    make: Callable[[], Arrays]
    step: Step


Case = Check | TimedCall


@dataclass(frozen=True)
class Sizes:
    """How large the cases are: rows that are timed together, and tokens that attention sees."""

    rows: tuple[int, ...] = (1, 16, 512)
    context: int = 1024
    checked: int = 300  # tokens: more than a span of attention
    outputs: int = 520  # of a matrix that is checked, at most

    @classmethod
    def small(cls) -> Sizes:
        """For what is simulated."""
        return cls(rows=(1,), context=16, checked=9, outputs=40)


def known(expected: Callable[[], Arrays]) -> Callable[[], Arrays]:
    """``expected``, computed on the CPU: by nothing of what is tried."""

    def on_the_cpu() -> Arrays:
        with mx.stream(mx.cpu):
            answer = expected()
            mx.eval(*answer)
        return answer

    return on_the_cpu


def right(s: Shapes, name: str, op: Op, ref: Op, *given: mx.array, **fixed: Any) -> Check:
    """What ``op`` makes of the given rows, with all that is ``fixed``, is ``ref``'s, but for rounding."""
    expected = known(lambda: _listed(ref(*given, **fixed)))
    return Check(name, lambda: _listed(op(*given, **fixed)), expected, TOLERANCE[s.dtype])


def alone(
    op: Op, *given: mx.array, row: int = ROW, name: str = "a row alone and among others", **fixed: Any
) -> Check:
    """A row gets the same bits, whoever is beside it."""
    own = _row_of(given, row)
    return Check(name, lambda: _row_of(_listed(op(*given, **fixed)), row), lambda: _listed(op(*own, **fixed)))


def _listed(answer: mx.array | Arrays) -> Arrays:
    return [answer] if isinstance(answer, mx.array) else answer


def _row_of(arrays: Arrays, row: int) -> list[mx.array]:
    return [array[row : row + 1] for array in arrays]


def timed(counts: Sequence[int], make: Callable[[int], Arrays], step: Step) -> Iterator[TimedCall]:
    """``step`` with so many rows; ``make`` makes the first state of that many."""
    for rows in counts:
        yield TimedCall(_rows(rows), partial(make, rows), step)


def normal(s: Shapes, *shape: int, seed: int = 0) -> mx.array:
    """Seeded numbers in the model's dtype."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(getattr(mx, s.dtype))


def _norms(s: Shapes, sizes: Sizes) -> Iterator[Case]:
    two = partial(_two, s, s.hidden)
    x, y = two(ROWS)
    fixed: Mapping[str, Any] = {"weight": normal(s, s.hidden, seed=2), "eps": EPS}
    yield right(s, "a norm", rms_norm, rms_norm_ref, x, **fixed)
    yield right(s, "a sum and its norm", add_rms_norm, add_rms_norm_ref, x, y, **fixed)
    yield alone(add_rms_norm, x, y, **fixed)
    yield from timed(sizes.rows, two, lambda state, _: add_rms_norm(state[0], state[1], **fixed))


def _two(s: Shapes, width: int, rows: int) -> list[mx.array]:
    return [normal(s, rows, width), normal(s, rows, width, seed=1)]


def _rotations(s: Shapes, sizes: Sizes) -> Iterator[Case]:
    x = _heads(s, ROWS)
    plain: dict[str, Any] = {"inv_freq": rope_frequencies(s.head_dim, 1e6), "eps": EPS}
    plain |= {"q_norm": None, "k_norm": None}
    normed = plain | {"q_norm": normal(s, s.head_dim, seed=2), "k_norm": normal(s, s.head_dim, seed=3)}
    yield right(s, "a rotation", rope_qk, rope_qk_ref, *x, **plain)
    yield right(s, "a normed rotation", rope_qk, rope_qk_ref, *x, **normed)
    yield alone(rope_qk, *x, **normed)

    def step(state: Arrays, _: int) -> Arrays:
        return [*rope_qk(state[0], state[1], state[2], **plain), state[2]]

    yield from timed(sizes.rows, partial(_heads, s), step)


def _heads(s: Shapes, rows: int) -> list[mx.array]:
    """Queries [T, H, D], keys [T, K, D] and the positions of both."""
    q, k = normal(s, rows, s.heads, s.head_dim), normal(s, rows, s.kv_heads, s.head_dim, seed=1)
    return [q, k, mx.arange(rows, dtype=mx.int32) * 97]


def _gates(s: Shapes, sizes: Sizes) -> Iterator[Case]:
    two = partial(_two, s, s.intermediate)
    gate, up = two(ROWS)
    yield right(s, "a gated unit", swiglu, swiglu_ref, 4 * gate, up)
    yield alone(swiglu, 4 * gate, up)
    yield from timed(sizes.rows, two, lambda state, _: [swiglu(*state), state[1]])


def _matrix(s: Shapes, outputs: int, width: int, seed: int = 5) -> QuantizedTensor:
    weight = normal(s, outputs, width, seed=seed) * width**-0.5
    group = _group(s, width)
    return QuantizedTensor(*mx.quantize(weight, group, s.bits), group, s.bits)


def _group(s: Shapes, width: int) -> int:
    return s.group_size if width % s.group_size == 0 else 32


def _products(s: Shapes, sizes: Sizes) -> Iterator[Case]:
    for bits, group in s.formats:
        own = replace(s, bits=bits, group_size=group)
        for width in dict.fromkeys((s.hidden, s.intermediate)):
            x = normal(s, ROWS, width)
            weight = _matrix(own, min(sizes.outputs, s.hidden), width)
            for rows in (1, 5, 16, ROWS):
                yield from _product(s, x[:rows], weight)
        yield from _fused(own, sizes)
    yield from _layers(s, sizes)


def _product(s: Shapes, x: mx.array, weight: QuantizedTensor) -> Iterator[Check]:
    rows, width = x.shape
    name = f"{_rows(rows)} by a matrix of {weight.bits} bits, {width} wide"
    yield right(s, name, quantized_matmul, quantized_matmul_ref, x, weight=weight)
    name = f"a row {width} wide alone and among {rows}"
    yield alone(quantized_matmul, x, row=rows - 1, name=name, weight=weight)


def _fused(s: Shapes, sizes: Sizes) -> Iterator[Check]:
    """What a layer asks for at once: q, k and v with a bias, and the gated pair."""
    x = normal(s, ROWS, s.hidden)
    outputs = s.head_dim * -(-min(sizes.outputs, s.hidden) // s.head_dim)
    weights = [_matrix(s, outputs, s.hidden, seed) for seed in (4, 5, 6)]
    biases = [normal(s, outputs, seed=seed) for seed in (7, 8, 9)]

    def fused(x: mx.array) -> list[mx.array]:
        return [*linears(x, weights, biases), gated(x, weights[0], weights[1], None, None)]

    def plainly(x: mx.array) -> list[mx.array]:
        products = [quantized_matmul_ref(x, weight) for weight in weights]
        sums = [product + bias for product, bias in zip(products, biases, strict=True)]
        return [*sums, swiglu_ref(products[0], products[1])]

    yield right(s, "three matrices with biases, a gated pair", fused, plainly, x)
    yield alone(fused, x, name="these for a row alone and among others")


def _layers(s: Shapes, sizes: Sizes) -> Iterator[TimedCall]:
    """All products of a layer, one after another; layers take turns, so that no cache holds them."""
    wide, narrow = s.heads * s.head_dim, s.kv_heads * s.head_dim
    shapes = [(wide, s.hidden), (narrow, s.hidden), (narrow, s.hidden), (s.hidden, wide)]
    shapes += [(s.intermediate, s.hidden), (s.intermediate, s.hidden), (s.hidden, s.intermediate)]
    layer_bytes = sum(outputs * width for outputs, width in shapes) * s.bits // 8
    count = max(1, min(8, -(-MATRIX_BYTES // layer_bytes)))
    layers = [[_random_matrix(s, *shape, seed=i) for shape in shapes] for i in range(count)]
    mx.eval([[(w.packed, w.scales, w.biases) for w in layer] for layer in layers])

    def step(state: Arrays, number: int) -> Arrays:
        q, k, v, o, gate, up, down = layers[number % count]
        x = mx.fast.rms_norm(state[0], None, EPS)  # as in a model: else numbers grow beyond all bounds
        heads, _, _ = linears(x, [q, k, v], [None, None, None])
        return [linear(gated(linear(heads, o), gate, up, None, None), down)]  # the next one's input

    for rows in sizes.rows:
        yield TimedCall(f"{_rows(rows)}, a layer", partial(_two, s, s.hidden, rows), step)


def _random_matrix(s: Shapes, outputs: int, width: int, seed: int) -> QuantizedTensor:
    """Random words, which take less time than what ``mx.quantize`` makes of random numbers."""
    key = mx.random.key(seed)
    words = mx.random.randint(0, 2**31 - 1, (outputs, width * s.bits // 32), mx.int32, key=key)
    group, scale = _group(s, width), 0.5 * 2.0**-s.bits * width**-0.5
    scales = mx.full((outputs, width // group), scale, getattr(mx, s.dtype))
    biases = -scales * ((2**s.bits - 1) / 2)  # in the middle
    return QuantizedTensor(words.view(mx.uint32), scales, biases, group, s.bits)


def _mixtures(s: Shapes, sizes: Sizes) -> Iterator[Case]:
    """Few experts where they are checked, all where they are timed."""
    if not s.experts:
        return
    few = _stacks(s, 3, min(sizes.outputs, s.expert_width) // 32 * 32)
    given = normal(s, ROWS, s.hidden), normal(s, ROWS, 3, seed=1)
    fixed: Mapping[str, Any] = {"routing": Routing(2, normalised=True), **few}
    yield right(s, "a mixture of experts", experts, experts_ref, *given, **fixed)
    yield alone(experts, *given, **fixed)
    stacks, of_a_row = _stacks(s, s.experts, s.expert_width), Routing(s.experts_of_a_row, normalised=True)

    def step(state: Arrays, _: int) -> Arrays:
        x, logits = state
        return [experts(mx.fast.rms_norm(x, None, EPS), logits, of_a_row, **stacks), logits]

    yield from timed(sizes.rows, lambda rows: [normal(s, rows, s.hidden), normal(s, rows, s.experts)], step)


def _stacks(s: Shapes, count: int, width: int) -> dict[str, QuantizedTensor]:
    stacks, shapes = {}, {"gate": (width, s.hidden), "up": (width, s.hidden), "down": (s.hidden, width)}
    for seed, (name, (outputs, inputs)) in enumerate(shapes.items()):
        w = _random_matrix(s, count * outputs, inputs, seed)
        packed, scales, biases = (a.reshape(count, outputs, -1) for a in (w.packed, w.scales, w.biases))
        stacks[name] = QuantizedTensor(packed, scales, biases, w.group_size, w.bits)
    return stacks


def _writes(s: Shapes, sizes: Sizes) -> Iterator[Case]:
    """What is written where it lies is there for who reads it next, and for nobody who came before."""
    expected = known(lambda: _in_turn(s, kv_write_ref))
    yield Check("rows that are written and read in turn", lambda: _in_turn(s, kv_write), expected)
    for rows in sizes.rows:
        slots = mx.arange(rows, dtype=mx.int32)
        _, k, v = _qkv(s, rows, seed=1)

        def step(state: Arrays, _: int, k: mx.array = k, v: mx.array = v, slots: mx.array = slots) -> Arrays:
            return kv_write(tuple(state), k, v, slots)

        yield TimedCall(_rows(rows), partial(_blocks, s, -(-rows // s.block_size)), step)


def _blocks(s: Shapes, count: int) -> list[mx.array]:
    """A pool as our kernels want it."""
    format = KvFormat(1, s.kv_heads, s.head_dim, s.block_size, s.kept, token_major=False)
    return list(format.empty_pool(count, count))


def _in_turn(s: Shapes, write: Callable[[Pool, mx.array, mx.array, mx.array], Pool]) -> list[mx.array]:
    """What lies in two blocks after each of six writes, each of which overwrites some of the one before.

    All is in order by data: a read waits for the write, and the next write for that read.
    """
    pool: Pool = tuple(_blocks(s, 2))
    seen: list[mx.array] = []
    for turn in range(6):
        _, k, v = _qkv(s, 5, seed=turn)
        arrays, written = parted(write(pool, k, v, mx.arange(5, dtype=mx.int32) * 2 + turn))
        read = [array[mx.arange(2) + sum(written)] for array in arrays]
        none = mx.stack([(0 * one.astype(mx.int32)).sum() for one in read]).sum()
        pool = (*arrays, *([none] if written else []))
        seen += read
    return seen


def _attentions(s: Shapes, sizes: Sizes) -> Iterator[Case]:
    lens = (sizes.checked, 2, sizes.checked // 2)
    yield Check(
        "sequences of several lengths",
        lambda: _attended(s, lens),
        known(lambda: [_attended_plainly(s, length, b) for b, length in enumerate(lens)]),
        TOLERANCE[s.dtype],
    )
    yield Check(
        "a sequence alone and among others", lambda: _attended(s, lens)[:1], lambda: _attended(s, lens[:1])
    )
    yield Check(
        "a row in a chunk and by itself",
        lambda: _attended(s, lens[:1]),
        lambda: _attended(s, lens[:1], decoded=3),
    )
    yield Check(
        "sequences that begin alike and one of them alone",
        lambda: _attended(s, 2 * lens[:1], alike=True),
        lambda: 2 * _attended(s, lens[:1]),
    )
    for rows in sizes.rows:
        yield _attention_speed(s, rows, sizes.context)


def _qkv(s: Shapes, tokens: int, seed: int) -> list[mx.array]:
    """Queries [T, H, D], keys and values [T, K, D]."""
    heads = (s.heads, s.kv_heads, s.kv_heads)
    return [normal(s, tokens, count, s.head_dim, seed=10 * seed + i) for i, count in enumerate(heads)]


def _attended_plainly(s: Shapes, tokens: int, seed: int) -> mx.array:
    q, k, v = _qkv(s, tokens, seed)
    return attention_ref(q, _kept(s, k), _kept(s, v), scale=s.head_dim**-0.5, offset=0)


def _kept(s: Shapes, x: mx.array) -> mx.array:
    """Keys or values [T, K, D] as they are read back."""
    if not s.int8_pages:
        return x
    steps, scales = quantized(x)
    return (steps * scales.astype(mx.float32)[..., None]).astype(x.dtype)


def _attended(s: Shapes, lens: Sequence[int], decoded: int = 1, *, alike: bool = False) -> list[mx.array]:
    """What each sequence gets [T, H, D]: the last tokens, ``decoded`` of them, each in a call of its own.

    ``alike``: all are the first one, and then read its whole blocks.
    """
    tables = _tables(lens, s.block_size)
    tokens = [_qkv(s, length, 0 if alike else b) for b, length in enumerate(lens)]
    pool = _pool(s, lens)
    outs: list[list[mx.array]] = [[] for _ in lens]
    for left in range(decoded, -1, -1):
        ends = [length - left for length in lens]
        starts = [0 if left == decoded else end - 1 for end in ends]
        parts = [
            [array[start:end] for array in qkv] for qkv, start, end in zip(tokens, starts, ends, strict=True)
        ]
        q, k, v = (mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True))
        out, pool = paged_attention(q, k, v, pool, _pages(tables, starts, ends, s.block_size))
        mx.eval(out, *pool)
        whole = (lens[0] - decoded) // s.block_size if alike else 0
        tables = [tables[0][:whole] + table[whole:] for table in tables]
        at = 0
        for own, start, end in zip(outs, starts, ends, strict=True):
            own.append(out[at : at + end - start])
            at += end - start
    return [mx.concatenate(own) for own in outs]


def _attention_speed(s: Shapes, rows: int, context: int) -> TimedCall:
    """Up to 16 ``rows`` are a sequence's next token each; more are one sequence's chunk."""
    sequences, new = (rows, 1) if rows <= 16 else (1, min(rows, context))
    lens = [context] * sequences
    pages = _pages(_tables(lens, s.block_size), [context - new] * sequences, lens, s.block_size)
    work = WorkLists(pages)  # as in a model, where all layers of a step share it
    k, v = _qkv(s, sequences * new, seed=1)[1:]

    def step(state: Arrays, _: int) -> Arrays:
        out, pool = paged_attention(state[0], k, v, tuple(state[1:]), pages, work)
        return [out, *pool]

    return TimedCall(
        f"{sequences} x {new} of {context} tokens",
        lambda: [_qkv(s, sequences * new, seed=0)[0], *_pool(s, lens)],
        step,
    )


def _tables(lens: Sequence[int], size: int) -> list[list[int]]:
    """Blocks of each sequence, which do not lie in order."""
    counts = [-(-length // size) for length in lens]
    ids = list(range(sum(counts)))
    return [[ids.pop() for _ in range(count)] for count in counts]


def _pool(s: Shapes, lens: Sequence[int]) -> Pool:
    """As the ops in use want it."""
    blocks = sum(-(-length // s.block_size) for length in lens)
    major = is_token_major() and not s.int8_pages
    format = KvFormat(1, s.kv_heads, s.head_dim, s.block_size, s.kept, major)
    return format.empty_pool(blocks, blocks)


def _pages(tables: list[list[int]], starts: Sequence[int], ends: Sequence[int], size: int) -> Pages:
    """Of each sequence, the tokens from its start to its end are new, and it has none after them."""
    news = [range(start, end) for start, end in zip(starts, ends, strict=True)]
    slots = [
        table[at // size] * size + at % size for table, new in zip(tables, news, strict=True) for at in new
    ]
    width = max(map(len, tables))
    wide = [table + [0] * (width - len(table)) for table in tables]
    firsts = [sum(map(len, news[:b])) for b in range(len(news) + 1)]
    return Pages(*(mx.array(numbers, mx.int32) for numbers in (slots, wide, firsts, list(ends))))


def _look_ups(s: Shapes, sizes: Sizes) -> Iterator[Case]:
    table = _matrix(s, min(sizes.outputs, s.vocab), s.hidden)
    last = table.packed.shape[0] - 1
    tokens = mx.array([last, 0, last, last // 2])
    yield right(s, "rows of a table", embedding, embedding_ref, tokens, weight=table)

    def step(state: Arrays, _: int) -> Arrays:
        return [state[0] + (0 * embedding(state[0], table)[:, 0]).astype(mx.int32)]

    yield from timed(sizes.rows, lambda rows: [mx.arange(rows, dtype=mx.int32) % 2], step)


def _draws(s: Shapes, sizes: Sizes) -> Iterator[Case]:
    options = [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, top_k=5, seed=2),
        SamplingParams(temperature=1.5, top_p=0.9, seed=3),
        SamplingParams(temperature=1.0, min_p=0.1, seed=4),
        SamplingParams(temperature=0.8, top_k=20, top_p=0.95, seed=5),
        SamplingParams(temperature=0.0),
    ]
    positions = list(range(7, 7 + len(options)))
    logits = 3 * mx.random.normal((len(options), s.vocab), key=mx.random.key(9))
    expected = known(lambda: [sample_ref(logits, options, positions)])
    yield Check("a token by each option", lambda: [sample(logits, options, positions)], expected)
    yield Check(
        "a row alone and among others",
        lambda: [sample(logits, options, positions)[2:3]],
        lambda: [sample(logits[2:3], options[2:3], positions[2:3])],
    )
    nucleus = SamplingParams(temperature=0.8, top_p=0.95, seed=6)

    def step(state: Arrays, number: int) -> Arrays:
        rows = state[0].shape[0]
        tokens = sample(state[0], [nucleus] * rows, [number] * rows)
        return [state[0] + 0 * tokens[:, None]]

    def make(rows: int) -> Arrays:
        return [mx.random.normal((rows, s.vocab), key=mx.random.key(9))]

    yield from timed([count for count in sizes.rows if count <= 16], make, step)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def cases(op: str, shapes: Shapes, sizes: Sizes) -> Iterator[Case]:
    """What ``op`` is tried on: first the checks, then what is timed."""
    makers: Mapping[str, Callable[[Shapes, Sizes], Iterator[Case]]] = {
        "rms_norm": _norms,
        "rope": _rotations,
        "swiglu": _gates,
        "quantized_matmul": _products,
        "experts": _mixtures,
        "kv_write": _writes,
        "paged_attention": _attentions,
        "embedding": _look_ups,
        "sample": _draws,
    }
    return makers[op](shapes, sizes)


def ops_of(shapes: Shapes) -> tuple[str, ...]:
    """The ops that a model of these shapes uses, of those that have kernels for GPUs."""
    quantized = ("quantized_matmul", "embedding", "experts")
    return tuple(
        op for op in OPS if (shapes.bits or op not in quantized) and (shapes.experts or op != "experts")
    )
