"""The check pass: Metal's address spaces are real there, and what Metal has not is named."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal_lint import problems

from tiny_llm.metalsim.run import metal_kernel

I = "uint i = thread_position_in_grid.x;\n"  # noqa: E741


def lint(
    body: str,
    header: str = "",
    *,
    size: int = 32,
    dtype: mx.Dtype = mx.float32,
    names: tuple[str, ...] = ("a",),
) -> list[str]:
    """The problems of a kernel of inputs a [size] of a dtype, and an output of that dtype."""
    kernel = metal_kernel("test", names, ["out"], body, header)
    arrays = [mx.zeros((size,), dtype) for _ in names]
    return problems(kernel.variant(arrays, [dtype], [("T", dtype)]))


GOOD = {
    "plain": (I + "out[i] = a[i];", ""),
    "threadgroup memory": (
        I + "threadgroup float s[32];\ns[i] = a[i];\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "threadgroup float* p = s;\nout[i] = static_cast<T>(p[31 - i] + simd_sum(s[i]));",
        "",
    ),
    "a helper for any pointer": (
        I + "out[i] = get(a, i);",
        "template <typename P> inline auto get(P p, uint i) { return p[i]; }\n",
    ),
    "a helper for device memory": (
        I + "out[i] = get(a, i);",
        "float get(const device float* p, uint i) { return p[i]; }",
    ),
    "constants": (
        I + "out[i] = static_cast<T>(table[i % 2] * width);",
        "constant float table[2] = {1, 2};\nconstexpr constant int width = 3;\n",
    ),
    "vectors": (I + "out[i] = dot(((const device float4*)a)[i % 8], float4(1.0f));", ""),
    "matrices": (
        I
        + "threadgroup float s[64];\nsimdgroup_float8x8 m;\n"
        + "simdgroup_load(m, s, 8);\nsimdgroup_store(m, out, 8);",
        "",
    ),
    "atomics": (I + "atomic_fetch_add_explicit((device atomic_uint*)out, 1u, memory_order_relaxed);", ""),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_kernels_have_no_problems(name: str) -> None:
    assert lint(*GOOD[name]) == []


BAD = {
    "device memory through a thread's pointer": (
        I + "thread T* p = a + i;\nout[i] = *p;",
        "",
        "source:2: error: .*'device float",
    ),
    "threadgroup memory as device memory": (
        I + "threadgroup float s[32];\ndevice float* p = s;\nout[i] = p[i];",
        "",
        "source:3: error: .*address",
    ),
    "a helper without an address space": (
        I + "out[i] = get(a, i);",
        "float get(const float* p, uint i) { return *p; }",
        "source:2: error",
    ),
    "an include": (
        I + "out[i] = a[i];",
        "#include <metal_math>\n#include <vector>\n",
        "error: .*|header:2: includes",
    ),
    "double": (I + "double x = a[i];\nout[i] = x;", "", "source:2: double"),
    "a lambda": (I + "auto f = [&](float x) { return x; };\nout[i] = f(a[i]);", "", "source:2: a lambda"),
    "a static local": (I + "static int n = 0;\nout[i] = a[i];", "", "source:2: a static local"),
    "two arrays in a statement": (
        I + "threadgroup float s[4], t[4];\nout[i] = a[i];",
        "",
        "source:2: two threadgroup arrays",
    ),
    "an initialised array": (
        I + "out[i] = a[i];\n\nthreadgroup float s[2] = {0, 0};",
        "",
        "source:4: threadgroup memory cannot",
    ),
    "an array in a helper": (
        I + "out[i] = a[i];",
        "inline void f() {\n  threadgroup float s[2];\n}",
        "header:2: threadgroup memory outside",
    ),
    "a spin": (
        I + "while (atomic_load_explicit((device atomic_uint*)out, memory_order_relaxed) == 0) {}",
        "",
        "source:2: a spin-wait",
    ),
    "a rule at a line that the text names": (
        '#line 7 "x.metal"\n' + I + "goto end;\nend: out[i] = a[i];",
        "",
        "x.metal:8: goto",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_problems_are_found(name: str) -> None:
    body, header, expected = BAD[name]
    found = lint(body, header)
    assert found, "nothing found"
    with pytest.raises(ValueError, match=expected):
        raise ValueError("\n".join(found))


def test_a_small_input_is_constant() -> None:
    header = "float get(const device float* p, uint i) { return p[i]; }"
    assert lint(I + "out[i] = get(a, i);", header, size=8) == []
    assert "source:2: error" in lint(I + "out[i] = get(a, i);", header, size=7)[0]


def test_a_float_does_not_become_bfloat_by_itself() -> None:
    assert lint(I + "out[i] = static_cast<T>(float(a[i]) * 2.0f);", dtype=mx.bfloat16) == []
    found = lint(I + "float x = a[i];\nout[i] = x;", dtype=mx.bfloat16)
    assert found == ["source:3: a number becomes bfloat by itself: write static_cast"]
    assert lint(I + "float x = a[i];\nout[i] = x;", dtype=mx.float16) == []


def test_bfloat_and_half_do_not_mix() -> None:
    body = I + "out[i] = static_cast<T>(a[i] * half(2));"
    assert "source:2: error" in lint(body, dtype=mx.bfloat16)[0]
