"""What the shim's functions compute, against numpy, in the three dtypes of activations."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from .conftest import Run

DTYPES = {"float": mx.float32, "half": mx.float16, "bfloat": mx.bfloat16}
EPS = {"float": 1e-6, "half": 2e-3, "bfloat": 1.6e-2}
Numpy = Callable[..., np.ndarray]


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


MATH: dict[str, Numpy] = {
    "exp(x)": np.exp,
    "exp2(x)": np.exp2,
    "log(y)": lambda x, y: np.log(y),
    "log2(y)": lambda x, y: np.log2(y),
    "log10(y)": lambda x, y: np.log10(y),
    "sin(x)": np.sin,
    "cos(x)": np.cos,
    "tan(x)": np.tan,
    "atan(x)": np.arctan,
    "tanh(x)": np.tanh,
    "sqrt(y)": lambda x, y: np.sqrt(y),
    "rsqrt(y)": lambda x, y: 1 / np.sqrt(y),
    "precise::rsqrt(y)": lambda x, y: 1 / np.sqrt(y),
    "fast::exp(x)": np.exp,
    "floor(x)": np.floor,
    "ceil(x)": np.ceil,
    "rint(x)": np.rint,
    "trunc(x)": np.trunc,
    "abs(x)": np.abs,
    "fabs(x)": np.abs,
    "sign(x)": np.sign,
    "min(x, y)": np.minimum,
    "max(x, y)": np.maximum,
    "fmin(x, y)": np.minimum,
    "pow(y, x)": lambda x, y: np.power(y, x),
    "atan2(x, y)": np.arctan2,
    "fma(x, y, x)": lambda x, y: x * y + x,
    "clamp(x, T(-1), T(1))": lambda x, y: np.clip(x, -1, 1),
    "select(x, y, x < T(0))": lambda x, y: np.where(x < 0, y, x),
    "mix(x, y, T(0.25))": lambda x, y: x + (y - x) * 0.25,
    "as_type<T>(as_type<U>(x))": lambda x, y: x,
    "x * y + T(2)": lambda x, y: x * y + 2,
}


def call(reference: Numpy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return reference(x, y) if getattr(reference, "nin", 2) == 2 else reference(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mathematics(dtype: str, run: Run) -> None:
    rng = np.random.default_rng(1)
    x = mx.array(rng.uniform(-3, 3, 32)).astype(DTYPES[dtype])
    y = mx.array(rng.uniform(0.1, 4, 32)).astype(DTYPES[dtype])
    lines = [f"out[{i} * 32 + i] = static_cast<T>({text});" for i, text in enumerate(MATH)]
    source = "uint i = thread_position_in_grid.x; T x = a[i], y = b[i];\n" + "\n".join(lines)
    template = [("T", DTYPES[dtype]), ("U", mx.uint32 if dtype == "float" else mx.uint16)]
    (out,) = run(source, x, y, template=template, out=[((len(MATH), 32), DTYPES[dtype])])
    for row, (text, reference) in zip(wide(out), MATH.items(), strict=True):
        expected = call(reference, wide(x).astype(np.float64), wide(y).astype(np.float64))
        # An argument's own rounding is not an error of the function; twice that of the result is room enough.
        np.testing.assert_allclose(row, expected, rtol=2 * EPS[dtype], atol=EPS[dtype] / 4, err_msg=text)


LANES = np.arange(32)
SIMD: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "simd_sum(x)": lambda x: np.full(32, x.sum()),
    "simd_max(x)": lambda x: np.full(32, x.max()),
    "simd_min(x)": lambda x: np.full(32, x.min()),
    "simd_product(x)": lambda x: np.full(32, x.prod()),
    "simd_shuffle(x, ushort(31 - lane))": lambda x: x[::-1],
    "simd_shuffle_xor(x, 5)": lambda x: x[LANES ^ 5],
    "simd_shuffle_down(x, 3)": lambda x: np.concatenate([x[3:], x[29:]]),
    "simd_shuffle_up(x, 3)": lambda x: np.concatenate([x[:3], x[:29]]),
    "simd_shuffle_rotate_down(x, 3)": lambda x: np.roll(x, -3),
    "simd_shuffle_rotate_up(x, 3)": lambda x: np.roll(x, 3),
    "simd_shuffle_and_fill_down(x, T(-x), 3)": lambda x: np.concatenate([x[3:], -x[:3]]),
    "simd_shuffle_and_fill_up(x, T(-x), 3)": lambda x: np.concatenate([-x[29:], x[:29]]),
    "simd_broadcast(x, 7)": lambda x: np.full(32, x[7]),
    "simd_broadcast_first(x)": lambda x: np.full(32, x[0]),
    "simd_prefix_inclusive_sum(x)": lambda x: np.cumsum(x),
    "simd_prefix_exclusive_sum(x)": lambda x: np.cumsum(x) - x,
    "quad_sum(x)": lambda x: np.repeat(x.reshape(8, 4).sum(1), 4),
    "quad_max(x)": lambda x: np.repeat(x.reshape(8, 4).max(1), 4),
    "quad_broadcast(x, 2)": lambda x: np.repeat(x[2::4], 4),
    "quad_shuffle_xor(x, 1)": lambda x: x[LANES ^ 1],
    "T(simd_all(lane < 32))": lambda x: np.ones(32),
    "T(simd_all(lane < 31))": lambda x: np.zeros(32),
    "T(simd_any(lane == 31))": lambda x: np.ones(32),
    "T(popcount(uint(ulong(simd_ballot(lane < 9)))))": lambda x: np.full(32, 9),
    "T(simd_is_first())": lambda x: LANES == 0,
    "T(simd_sum(lane))": lambda x: np.full(32, 496),
    "T(simd_or(1u << lane) == 0xffffffffu)": lambda x: np.ones(32),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_across_lanes(dtype: str, run: Run) -> None:
    x = mx.array(np.random.default_rng(2).choice([0.5, -1, 1, 1.5], 32)).astype(DTYPES[dtype])
    lines = [f"out[{i} * 32 + lane] = static_cast<T>({text});" for i, text in enumerate(SIMD)]
    source = "uint lane = thread_index_in_simdgroup; T x = a[lane];\n" + "\n".join(lines)
    (out,) = run(source, x, template=[("T", DTYPES[dtype])], out=[((len(SIMD), 32), DTYPES[dtype])])
    for row, (text, reference) in zip(wide(out), SIMD.items(), strict=True):
        np.testing.assert_allclose(row, reference(wide(x)), rtol=2 * EPS[dtype], err_msg=text)


def test_a_sum_is_a_butterfly_of_neighbours(run: Run) -> None:
    x = mx.array(np.random.default_rng(3).normal(size=32).astype(np.float32) * 10.0 ** (LANES % 7))
    by_hand = "float v = a[i]; for (ushort m = 1; m < 32; m *= 2) v += simd_shuffle_xor(v, m);"
    source = f"uint i = thread_index_in_simdgroup; {by_hand} out[i] = v - simd_sum(a[i]);"
    assert np.array_equal(np.array(run(source, x)[0]), np.zeros(32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_of_8_by_8(dtype: str, run: Run) -> None:
    rng = np.random.default_rng(4)
    a, b = (mx.array(rng.normal(size=(8, 8))).astype(DTYPES[dtype]) for _ in range(2))
    source = """
        simdgroup_matrix<T, 8, 8> x, y, r;
        simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
        simdgroup_load(x, a, 8);
        simdgroup_load(y, b, 8, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(sum, x, y, sum);
        simdgroup_store(sum, out, 8);
        simdgroup_multiply(r, x, x);
        simdgroup_store(r, out2, 8);
    """
    out, square = run(
        source, a, b, template=[("T", DTYPES[dtype])], out=[((8, 8), mx.float32), ((8, 8), DTYPES[dtype])]
    )
    np.testing.assert_allclose(wide(out), wide(a) @ wide(b).T + 1, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(wide(square), wide(a) @ wide(a), rtol=EPS[dtype], atol=EPS[dtype] * 8)


def test_a_lanes_part_of_a_matrix_is_where_apple_has_it(run: Run) -> None:
    source = """
        simdgroup_matrix<float, 8, 8> m;
        simdgroup_load(m, a, 8);
        uint lane = thread_index_in_simdgroup, quad = lane / 4;
        uint row = (quad & 4) + (lane / 2) % 4, column = (quad & 2) * 2 + (lane % 2) * 2;
        auto held = m.thread_elements();
        out[lane] = (held[0] == a[row * 8 + column]) && (held[1] == a[row * 8 + column + 1]);
    """
    assert np.array(run(source, mx.arange(64, dtype=mx.float32))[0]).all()


def test_vectors(run: Run) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        float4 v = float4(a[i], float2(2.0f), 3.0f), w = float4(2), z = vec<float, 4>(v.wzyx);
        device float4* quads = (device float4*)out;
        half4 h = half4(v);
        v.xy += w.zw;
        quads[i] = fma(v, w, z) + float4(h) * dot(w, w) + select(v, w, v < w);
    """
    a = np.arange(8, dtype=np.float32)
    (out,) = run(source, mx.array(a), grid=8, out=[((8, 4), mx.float32)])
    h = np.stack([a, 0 * a + 2, 0 * a + 2, 0 * a + 3], axis=1)
    v = h + np.array([2, 2, 0, 0])
    expected = v * 2 + h[:, ::-1] + h * 16 + np.where(v < 2, 2, v)
    np.testing.assert_array_equal(np.array(out), expected)


def test_an_atomic_store_reads_nothing(run: Run) -> None:
    body = """
        threadgroup atomic_uint held[32];
        uint i = thread_position_in_grid.x;
        atomic_store_explicit(&held[i], i * 3, memory_order_relaxed);
        out[i] = float(atomic_load_explicit(&held[i], memory_order_relaxed));
    """
    assert run(body)[0].tolist() == [i * 3.0 for i in range(32)]


def test_atomics(run: Run) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        atomic_fetch_add_explicit(&out[i % 4], a[i], memory_order_relaxed);
        atomic_fetch_max_explicit(&out[4], a[i], memory_order_relaxed);
    """
    a = np.arange(100, dtype=np.float32)
    (out,) = run(source, mx.array(a), grid=100, out=[((5,), mx.float32)], init=0, atomic_outputs=True)
    assert np.array(out).tolist() == [*(a[i::4].sum() for i in range(4)), 99.0]


def test_places_of_threads(run: Run) -> None:
    source = """
        uint3 g = thread_position_in_grid, t = thread_position_in_threadgroup;
        uint3 at = threadgroup_position_in_grid;
        uint n = g.x + threads_per_grid.x * (g.y + threads_per_grid.y * g.z);
        bool right = g.x == at.x * 4 + t.x && g.y == at.y * 3 + t.y && g.z == at.z * 2 + t.z;
        uint3 size = threads_per_threadgroup;
        right = right && thread_index_in_threadgroup == t.x + size.x * (t.y + size.y * t.z);
        right = right && threadgroups_per_grid.x == 3 && threadgroups_per_grid.y == 2;
        right = right && simdgroups_per_threadgroup == 1 && size.x == (at.x == 2 ? 2 : 4);
        right = right && thread_index_in_simdgroup == thread_index_in_threadgroup;
        out[n] = right;
    """
    assert np.array(run(source, grid=(10, 6, 4), tg=(4, 3, 2), out=[((240,), mx.uint8)])[0]).all()


def test_strides_and_shapes_of_an_array_as_it_lies(run: Run) -> None:
    a = mx.arange(12, dtype=mx.float32).reshape(3, 4).T
    source = """
        uint i = thread_position_in_grid.x;
        out[i] = a[elem_to_loc(i, a_shape, a_strides, a_ndim)];
    """
    (out,) = run(source, a, grid=12, out=[((4, 3), mx.float32)], ensure_row_contiguous=False)
    assert mx.array_equal(out, a).item()
    (copied,) = run(
        "out[thread_position_in_grid.x] = a[thread_position_in_grid.x];",
        a,
        grid=12,
        out=[((4, 3), mx.float32)],
    )
    assert mx.array_equal(copied, a).item()
