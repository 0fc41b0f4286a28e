"""Our Metal kernels, by metalsim with every access checked, and by a GPU: as ``ref``, in three dtypes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from metal_lint import problems, stack_arrays

from tiny_llm.data import Pages, QuantizedTensor
from tiny_llm.errors import ConfigError
from tiny_llm.metalsim.build import why_not
from tiny_llm.metalsim.faults import KernelFault
from tiny_llm.metalsim.run import MetalKernel, watch
from tiny_llm.metalsim.source import Kernel, program
from tiny_llm.metrics import fallbacks
from tiny_llm.ops import backend, metal
from tiny_llm.ops.embedding import embedding, embedding_ref
from tiny_llm.ops.experts import Routing, experts
from tiny_llm.ops.kv_pool import KvFormat, Pool, settled
from tiny_llm.ops.linear import gated, linear, linears
from tiny_llm.ops.paged_attention import kv_write, kv_write_ref, paged_attention, paged_attention_ref
from tiny_llm.ops.quantized_matmul import quantized_matmul, quantized_matmul_ref
from tiny_llm.ops.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from tiny_llm.ops.rope import rope, rope_frequencies, rope_qk, rope_qk_ref, rope_ref
from tiny_llm.ops.swiglu import swiglu, swiglu_ref
from tiny_llm.sampling.sampler import sample
from tiny_llm.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# One rounding of the result, and in float32 what another order of a sum makes.
TOLERANCE = {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
Off = Callable[[mx.array, mx.array], float]
Arrays = tuple[mx.array, ...]
GPUS = ["metal"] if mx.metal.is_available() else []
on_a_gpu_too = pytest.mark.parametrize("as_metal", ["metalsim", *GPUS], indirect=True)


@pytest.fixture(autouse=True)
def as_metal(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every op of this file runs as Metal: simulated, and under ``on_a_gpu_too`` on a GPU if there is one."""
    where = getattr(request, "param", "metalsim")
    if where == "metalsim" and (reason := why_not()):
        pytest.skip(reason)
    with backend.use(where):
        yield


@pytest.fixture
def same(off: Off) -> Callable[..., None]:
    """Assert shape, dtype and values, and that no op fell back to ``ref``."""
    before = fallbacks().read()

    def check(got: mx.array, expected: mx.array, tolerance: float | None = None) -> None:
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert not got.size or off(got, expected) < (tolerance or TOLERANCE[got.dtype])
        assert fallbacks().read() == before

    return check


SEEDS = (0, 1, 2) if os.environ.get("TINY_LLM_METAL_GRID") == "full" else (0,)
SEED: ContextVar[int] = ContextVar("seed", default=0)


@pytest.fixture(autouse=True, params=SEEDS)
def numbers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Other numbers for each of `make metal-grid`'s three seeds; CI takes one."""
    token = SEED.set(request.param)
    yield
    SEED.reset(token)


def normal(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed + 100 * SEED.get())).astype(dtype)


@on_a_gpu_too
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 64), (0, 8), (21, 896), (2, 5000)])
def test_rms_norm(shape: tuple[int, ...], dtype: mx.Dtype, same: Callable[..., None]) -> None:
    x, residual = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    weight = normal(shape[-1], seed=2, dtype=dtype)
    same(rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6))
    total, normed = add_rms_norm(x, residual, weight, 1e-6)
    expected = add_rms_norm_ref(x, residual, weight, 1e-6)
    same(total, expected[0])
    same(normed, expected[1])


@on_a_gpu_too
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 0), (2, 513)])
def test_swiglu(shape: tuple[int, ...], dtype: mx.Dtype, same: Callable[..., None]) -> None:
    gate, up = normal(*shape, dtype=dtype) * 4, normal(*shape, seed=1, dtype=dtype)
    same(swiglu(gate, up), swiglu_ref(gate, up))


@on_a_gpu_too
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(("T", "H", "K", "D"), [(1, 1, 1, 2), (3, 14, 2, 64), (2, 4, 1, 80), (1, 2, 2, 256)])
def test_rope(
    T: int, H: int, K: int, D: int, normed: bool, dtype: mx.Dtype, same: Callable[..., None]
) -> None:
    q, k = normal(T, H, D, dtype=dtype), normal(T, K, D, seed=1, dtype=dtype)
    positions, inv_freq = mx.array([0, 7, 31000][:T]), rope_frequencies(D, 1e6)
    q_norm, k_norm = (normal(D, seed=s, dtype=dtype) if normed else None for s in (2, 3))
    arguments = (q, k, positions, inv_freq, q_norm, k_norm, 1e-6)
    for got, expected in zip(rope_qk(*arguments), rope_qk_ref(*arguments), strict=True):
        same(got, expected)
    same(rope(q, positions, inv_freq), rope_ref(q, positions, inv_freq))


def quantized(outputs: int, width: int, group: int, bits: int, dtype: mx.Dtype) -> QuantizedTensor:
    packed, scales, biases = mx.quantize(normal(outputs, width, seed=5, dtype=dtype), group, bits)
    return QuantizedTensor(packed, scales, biases, group, bits)


@on_a_gpu_too
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "outputs", "group", "bits"),
    [(1, 64, 7, 64, 4), (3, 96, 9, 32, 8), (7, 896, 10, 64, 4), (70, 128, 5, 128, 4), (2, 1408, 6, 128, 8)],
)
def test_quantized_matmul(
    rows: int, width: int, outputs: int, group: int, bits: int, dtype: mx.Dtype, same: Callable[..., None]
) -> None:
    x, weight = normal(rows, width, dtype=dtype), quantized(outputs, width, group, bits, dtype)
    same(quantized_matmul(x, weight), quantized_matmul_ref(x, weight))


@on_a_gpu_too
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_embedding(bits: int, dtype: mx.Dtype, same: Callable[..., None]) -> None:
    table = quantized(300, 192, 64, bits, dtype)
    for tokens in mx.array([299]), mx.array([7, 7, 0], mx.uint32), mx.arange(30):
        same(embedding(tokens, table), embedding_ref(tokens, table))


def test_a_quantized_look_up_is_one_dispatch_that_reads_its_rows() -> None:
    table = quantized(300, 192, 64, 4, mx.bfloat16)
    with watch() as seen:
        embedding(mx.array([299, 3]), table)
    ((name, traffic),) = seen
    assert (name, traffic.fetched["packed"]) == ("embedding", 2 * 192 // 2)


def paged(
    lens: list[int],
    new: list[int],
    H: int,
    K: int,
    D: int,
    S: int,
    dtype: mx.Dtype,
    *,
    int8: bool = False,
    alike: int = 0,
) -> tuple[mx.array, mx.array, mx.array, Pool, Pages]:
    """Sequences of ``lens`` tokens, of which the last ``new`` are queries; their blocks lie in no order.

    The first ``alike`` of each are those of the first sequence.
    """
    blocks = [-(-length // S) for length in lens]
    order = iter([(i * 7 + 3) % (sum(blocks) + 2) for i in range(sum(blocks) + 2)])
    tables = [[next(order) for _ in range(count)] for count in blocks]
    tables = [tables[0][:alike] + table[alike:] for table in tables]
    slots = [
        tables[b][p // S] * S + p % S for b, length in enumerate(lens) for p in range(length - new[b], length)
    ]
    N, T = sum(blocks) + 2, sum(new)
    starts = [sum(new[:b]) for b in range(len(new) + 1)]
    wide = [table + [0] * (max(blocks) - len(table)) for table in tables]
    pages = Pages(*(mx.array(x, mx.int32) for x in (slots, wide, starts, lens)))
    q, k, v = (
        normal(T, H, D, dtype=dtype),
        normal(T, K, D, seed=1, dtype=dtype),
        normal(T, K, D, seed=2, dtype=dtype),
    )
    pool: Pool = normal(N, K, D, S, seed=3, dtype=dtype), normal(N, K, S, D, seed=4, dtype=dtype)
    if int8:
        scales = tuple(mx.abs(normal(N, K, S, seed=seed, dtype=mx.float16)) / 30 for seed in (5, 6))
        pool = (*((25 * array).astype(mx.int8) for array in pool), *scales)
    return q, k, v, pool, pages


@on_a_gpu_too
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lens", "new", "H", "K", "D", "S"),
    [
        ([1], [1], 1, 1, 64, 16),
        ([40, 3, 130], [1, 3, 1], 4, 2, 64, 16),
        ([33, 7], [5, 1], 7, 1, 80, 32),
        ([70], [2], 2, 2, 128, 64),
        ([530, 256, 3], [2, 1, 1], 4, 2, 64, 16),
        ([257], [1], 2, 1, 96, 24),
    ],
)
@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
def test_paged_attention(
    lens: list[int],
    new: list[int],
    H: int,
    K: int,
    D: int,
    S: int,
    dtype: mx.Dtype,
    int8: bool,
    same: Callable[..., None],
) -> None:
    q, k, v, pool, pages = paged(lens, new, H, K, D, S, dtype, int8=int8)
    before = tuple(mx.array(p) for p in pool)
    out, written = paged_attention(q, k, v, pool, pages)
    expected, expected_pool = paged_attention_ref(q, k, v, before, pages, D**-0.5)
    same(out, expected)
    for array, wanted in zip(settled(written), expected_pool, strict=True):
        assert mx.array_equal(array, wanted).item()


@on_a_gpu_too
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [7, 64, 80])
def test_vectors_are_rounded_to_int8_as_by_ref(D: int, dtype: mx.Dtype) -> None:
    """Also one of zeros, one too small for a scale, a large one, and one of a NaN, which its scale shows."""
    x, slots = normal(9, 2, 2 * D, dtype=dtype), mx.array([3, 17, 0, 9, 8, 30, 31, 1, 12])
    x = x * mx.array([1, 0, 1e-9, 900, 1, 1, 1, 1, 1]).astype(dtype)[:, None, None]
    x[4, 1, 5 :: D + 1] = mx.nan
    pools = [KvFormat(1, 2, D, 16, mx.int8, token_major=False).empty_pool(2, 2) for _ in range(2)]
    got = settled(kv_write(pools[0], x[..., :D], x[..., D:], slots))
    expected = kv_write_ref(pools[1], x[..., :D], x[..., D:], slots)
    for array, wanted in zip(got, expected, strict=True):
        broken = mx.isnan(wanted).sum().item()
        assert mx.array_equal(array, wanted, equal_nan=True).item()
        assert broken == (array.dtype == mx.float16), "of each, one vector"


def one_of(arrays: Arrays, row: int) -> Arrays:
    return tuple(a[row : row + 1] for a in arrays)


@on_a_gpu_too
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_rows_bits_are_its_own_alone_or_among_33(dtype: mx.Dtype) -> None:
    x, y = normal(33, 192, dtype=dtype), normal(33, 192, seed=1, dtype=dtype)
    scale, weight = normal(192, seed=2, dtype=dtype), quantized(6, 192, 64, 4, dtype)
    positions, inv_freq = mx.arange(33), rope_frequencies(64, 1e4)
    q, k = x.reshape(33, 3, 64), y.reshape(33, 3, 64)
    calls: dict[str, Callable[..., Arrays]] = {
        "add_rms_norm": lambda a, b, *_: add_rms_norm(a, b, scale, 1e-6),
        "swiglu": lambda a, b, *_: (swiglu(a, b),),
        "quantized_matmul": lambda a, *_: (quantized_matmul(a, weight),),
        "rope_qk": lambda a, b, q, k, p: rope_qk(q, k, p, inv_freq, scale[:64], scale[:64], 1e-6),
    }
    inputs = (x, y, q, k, positions)
    for name, call in calls.items():
        for all_rows, alone in zip(call(*inputs), call(*one_of(inputs, 20)), strict=True):
            assert mx.array_equal(all_rows[20:21], alone).item(), name


@on_a_gpu_too
def test_a_sequences_bits_are_its_own_alone_or_among_others() -> None:
    """The others are so long that all rows go through partial sums."""
    q, k, v, pool, pages = paged([90, 17, 600], [1, 17, 1], 4, 2, 64, 16, mx.float32)
    together = paged_attention(q, k, v, tuple(mx.array(p) for p in pool), pages)[0]
    alone = Pages(pages.slot_mapping[:1], pages.block_tables[:1], mx.array([0, 1]), pages.context_lens[:1])
    out = paged_attention(q[:1], k[:1], v[:1], pool, alone)[0]
    assert mx.array_equal(out, together[:1]).item()


@on_a_gpu_too
def test_a_decode_beside_a_chunk_has_the_bits_that_it_has_alone() -> None:
    """Its context is split over threadgroups, as it is when nobody has a chunk."""
    q, k, v, pool, pages = paged([300, 70], [1, 9], 4, 2, 64, 32, mx.bfloat16)
    before = tuple(mx.array(p) for p in pool)
    alone = Pages(pages.slot_mapping[:1], pages.block_tables[:1], mx.array([0, 1]), pages.context_lens[:1])
    one = paged_attention(q[:1], k[:1], v[:1], tuple(mx.array(p) for p in pool), alone)[0]
    with watch() as seen:
        out, _ = paged_attention(q, k, v, pool, pages)
    expected = paged_attention_ref(q, k, v, before, pages, 64**-0.5)[0]
    assert mx.array_equal(out[:1], one).item()
    assert mx.abs(out - expected).max().item() < 0.02
    if seen:
        names = ["paged_attention", "paged_attention_merge", "paged_attention_tile"]
        assert [name for name, _ in seen][-3:] == names, "first it may be asked if tiles keep bits"


def test_heads_that_a_threadgroup_cannot_hold_fall_back_and_are_counted(off: Off) -> None:
    """16 heads of 256 that share a key would take 32,896 of 32,768 bytes: Metal fails when it is run."""
    before = fallbacks().read().get("paged_attention", 0)
    q, k, v, pool, pages = paged([20, 3], [1, 1], 16, 1, 256, 16, mx.float32)
    expected = paged_attention_ref(q, k, v, tuple(mx.array(p) for p in pool), pages, 256**-0.5)[0]
    assert off(paged_attention(q, k, v, pool, pages)[0], expected) == 0
    assert fallbacks().read()["paged_attention"] == before + 1


@on_a_gpu_too
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_of_large_weights_is_rounded_before_it_is_multiplied(
    dtype: mx.Dtype, same: Callable[..., None]
) -> None:
    """Qwen2.5's and Qwen3's k_norm has weights up to 96.5: one rounding more or less shows there."""
    q, k = normal(3, 4, 64, dtype=dtype), normal(3, 2, 64, seed=1, dtype=dtype)
    weight = mx.where(mx.arange(64) % 5 == 0, 96.5, 0.02).astype(dtype)
    none, positions = mx.zeros(32), mx.arange(3)
    wide = k.astype(mx.float32)
    normed = wide * mx.rsqrt(mx.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    expected = normed.astype(dtype) * weight  # float32, rounded, multiplied
    same(rms_norm(k, weight, 1e-6), expected)
    same(rope_qk(q, k, positions, none, weight, weight, 1e-6)[1], expected)
    with backend.use("mlx"):
        same(rope_qk(q, k, positions, none, weight, weight, 1e-6)[1], expected)
    if dtype == mx.float32 and backend.works():
        with backend.use("cpu"):
            same(rope_qk(q, k, positions, none, weight, weight, 1e-6)[1], expected)


def drawn(top_k: int) -> SamplingParams:
    return SamplingParams(temperature=0.9, top_k=top_k, top_p=0.8, seed=top_k)


def attended(*case: Any, **kind: Any) -> Arrays:
    """What attention gives for ``paged(*case, **kind)``: its rows, and the pool's arrays."""
    out, pool = paged_attention(*paged(*case, **kind))
    return (out, *pool)


def every_product(x: mx.array) -> Arrays:
    """Of one matrix, of three at once, of a gated pair, with biases; and of experts, each row's own."""
    weights = [quantized(8, x.shape[1], 64, 4, x.dtype) for _ in range(3)]
    stacks = [QuantizedTensor(*mx.quantize(normal(2, 256, 256, dtype=x.dtype), 64, 4), 64, 4)] * 3
    biases = [normal(8, seed=seed, dtype=x.dtype) for seed in range(3)]
    single = linear(x, weights[0], biases[0])
    mixture = experts(x, x[:, :2], Routing(1, normalised=False), *stacks)
    return (single, *linears(x, weights, biases), gated(x, *weights[:2], *biases[:2]), mixture)


def every_kernel(dtype: mx.Dtype) -> list[mx.array]:
    """What one call of each kernel gives, its inputs larger than what MLX passes as constants."""
    x, weight = normal(3, 256, dtype=dtype), normal(256, seed=1, dtype=dtype)
    q = x.reshape(3, 4, 64)
    return [
        rms_norm(x, weight, 1e-6),
        *add_rms_norm(x, x, weight, 1e-6),
        swiglu(x, x),
        *rope_qk(q, q, mx.arange(3), rope_frequencies(64, 1e4), weight[:64], weight[:64], 1e-6),
        *every_product(x),
        *every_product(normal(5, 256, dtype=dtype)),
        *attended([150, 3], [1, 3], 4, 2, 64, 16, dtype),
        *attended([40], [5], 4, 2, 80, 16, dtype),
        *attended([300, 3], [1, 1], 4, 2, 64, 16, dtype),
        *attended([150, 3], [1, 3], 4, 2, 64, 16, dtype, int8=True),
        *attended([130] * 5, [1] * 5, 12, 1, 64, 64, dtype, alike=2),  # in turns
        embedding(mx.array([7, 0, 7]), quantized(8, 256, 64, 4, dtype)),
        sample(normal(3, 300), [drawn(k) for k in (0, 9, 1)], [1, 2, 3]),
    ]


@pytest.mark.parametrize("options", [{"seed": 2}, {"seed": 3}, {"mode": "fast"}], ids=str)
def test_the_order_of_threads_changes_no_bit(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = every_kernel(mx.bfloat16)
    made = metal._made
    monkeypatch.setattr(metal, "_made", lambda text, mode: replace(made(text, mode), **options))
    for number, (got, wanted) in enumerate(zip(every_kernel(mx.bfloat16), expected, strict=True)):
        assert mx.array_equal(got, wanted).item(), f"output {number}"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """The variants that run, in their order."""
    seen: list[Kernel] = []
    variant = MetalKernel.variant

    def note(self: MetalKernel, *arguments: object) -> Kernel:
        seen.append(variant(self, *arguments))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(MetalKernel, "variant", note)
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_are_metal_not_just_cpp(dtype: mx.Dtype, seen: list[Kernel]) -> None:
    every_kernel(dtype)
    assert len({kernel.name for kernel in seen}) == len(all_texts())
    assert all(kernel.text.startswith("#pragma METAL fp contract(off)") for kernel in seen)
    assert [problem for kernel in seen for problem in problems(kernel)] == []


def test_arrays_of_a_thread_stay_in_registers(seen: list[Kernel]) -> None:
    """Apple's compiler unrolls no loop that is not marked, and what a variable indexes then lies in memory.

    LLVM, given the same text, leaves such an array on the stack.
    """
    every_kernel(mx.bfloat16)
    for case in [([70], [2], 14, 2, 128, 64), ([300], [1], 8, 1, 256, 32), ([40], [1], 7, 1, 80, 32)]:
        attended(*case, mx.bfloat16)
        attended(*case, mx.bfloat16, int8=True)
    attended([257] * 3, [1] * 3, 12, 2, 128, 16, mx.bfloat16, alike=16)
    found = {k.full_name: stack_arrays(program(k)) for k in seen}
    assert {name: arrays for name, arrays in found.items() if arrays} == {}


def test_this_sees_an_array_that_a_loop_left_in_memory(
    seen: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metal, "_PRELUDE", "#define UNROLL\n")
    metal._made.cache_clear()
    attended([300], [1], 8, 2, 128, 64, mx.bfloat16)
    metal._made.cache_clear()
    arrays = stack_arrays(program(seen[1]))
    assert {name.split(" ")[0].split(".")[0] for name in arrays} & {"sums", "scores"}


def all_texts() -> list[metal.Text]:
    return [
        text for file in sorted(metal.folder().glob("*.metal")) for text in metal.texts(file.stem).values()
    ]


def barriers() -> list[tuple[str, str, int]]:
    """Kernel, "header" or "body", and the place of each of its barriers."""
    call = "threadgroup_barrier("
    return [
        (text.name, part, place)
        for text in all_texts()
        for part in ("header", "body")
        for place in range(getattr(text, part).count(call))
    ]


@pytest.mark.parametrize(("name", "part", "place"), barriers())
def test_each_barrier_is_needed(name: str, part: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = metal._made

    def without(text: metal.Text, mode: str) -> metal.Kernel:
        if text.name == name:
            pieces = getattr(text, part).split("threadgroup_barrier(")
            cut = "threadgroup_barrier(".join(pieces[: place + 1]) + "(void)("
            changed = cut + "threadgroup_barrier(".join(pieces[place + 1 :])
            text = replace(text, **{part: changed})
        return made(text, mode)

    monkeypatch.setattr(metal, "_made", without)
    with pytest.raises(KernelFault, match=r"race|uninitialised"):
        every_kernel(mx.float32)


def test_weights_and_pages_are_fetched_once() -> None:
    weight = quantized(8, 512, 64, 4, mx.bfloat16)
    q, k, v, pool, pages = paged([64], [1], 8, 2, 64, 16, mx.bfloat16)
    with watch() as seen:
        quantized_matmul(normal(1, 512, dtype=mx.bfloat16), weight)
        quantized_matmul(normal(4, 512, dtype=mx.bfloat16), weight)
        paged_attention(q, k, v, pool, pages)
    assert [name for name, _ in seen] == [*["quantized_matmul"] * 2, "kv_write", "paged_attention"]
    for _, traffic in seen[:2]:
        assert traffic.read["packed"] == weight.packed.nbytes, (
            "a simdgroup reads its columns, and no other does"
        )
        assert traffic.fetched["scales"] == weight.scales.nbytes
    tokens = 64 * 2 * 64 * 2  # tokens, heads, dim, bytes
    assert seen[3][1].read["keys"] == seen[3][1].read["values"] == tokens, "4 query heads share what is read"


@pytest.mark.parametrize("new", [1, 4])
def test_int8_pages_move_half_the_bytes_and_a_scale_a_vector(new: int) -> None:
    """By rows and by tiles."""
    with watch() as seen:
        attended([64], [new], 8, 2, 64, 16, mx.bfloat16, int8=True)
    fetched = seen[-1][1].fetched
    assert fetched["keys"] == fetched["values"] == 64 * 2 * 64  # tokens, heads, dim
    assert fetched["key_scales"] == fetched["value_scales"] == 64 * 2 * 2


def test_what_metal_cannot_take_falls_back_and_is_counted(off: Off) -> None:
    before = fallbacks().read().get("rms_norm", 0)
    x, weight = normal(2, 8, dtype=mx.bfloat16), normal(8)
    assert off(rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6)) < 0.01, "MLX's, in its own dtype"
    assert fallbacks().read()["rms_norm"] == before + 1


def test_the_mode_is_strict_unless_the_environment_says_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(made := metal.kernel("swiglu"), MetalKernel) and made.mode == "strict"
    monkeypatch.setenv(metal.VARIABLE, "fast")
    assert isinstance(made := metal.kernel("swiglu"), MetalKernel) and made.mode == "fast"
    monkeypatch.setenv(metal.VARIABLE, "quick")
    with pytest.raises(ConfigError, match="TINY_LLM_METALSIM is 'quick', expected one of strict, fast"):
        metal.kernel("swiglu")
