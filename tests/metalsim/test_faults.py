"""A planted fault of every class: found in strict mode, with what, where in the text, and which threads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest

from tiny_llm.errors import ConfigError
from tiny_llm.metalsim.build import CompileError
from tiny_llm.metalsim.faults import KernelFault
from tiny_llm.metalsim.run import metal_kernel

from .conftest import Run

I = "uint i = thread_position_in_grid.x;\n"  # noqa: E741
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
SHARED = "threadgroup float s[64];\n"


@dataclass
class Fault:
    """A body, how it is run, and what must be said of it."""

    body: str
    kind: str
    line: int
    says: str
    inputs: int = 1
    grid: int = 64
    tg: int = 64
    options: dict[str, Any] = field(default_factory=dict)


FAULTS = {
    "read past the end": Fault(
        I + "out[i] = a[i + 1];", "bounds", 2, r"\(63, 0, 0\).* reads element 64 of a, which has 64"
    ),
    "read before the start": Fault(
        I + "const device float* p = a;\nout[i] = p[int(i) - 2];", "bounds", 3, r"reads element -[12] of a"
    ),
    "write past the end": Fault(
        I + "\nout[i + (i == 9)*64] = 1;", "bounds", 3, r"\(9, 0, 0\).* writes element 73 of out"
    ),
    "read far away": Fault(I + "out[i] = a[i * 100000000u];", "bounds", 2, "of a"),
    "wild": Fault(
        I + "out[i] = *(const device float*)(ulong(i) + 64);", "wild pointer", 2, "in no buffer at all"
    ),
    "threadgroup array past its end": Fault(
        I
        + SHARED
        + f"threadgroup float z[4];\nthreadgroup float* p = s;\n(p + i)[1] = 1;\n{BARRIER}out[i] = s[i];",
        "bounds",
        5,
        r"writes element 64 of threadgroup array 's', which has 64",
    ),
    "race in threadgroup memory, a read after a write": Fault(
        I + SHARED + f"s[i] = 0;\n{BARRIER}if (i < 32) s[i] = a[i];\n\nout[i] = s[(i + 1) % 64];",
        "race",
        0,
        r"race: thread \(\d+, 0, 0\) of threadgroup \(0, 0, 0\) (reads|writes) element \d+ of .* 's' "
        r"at source:[57] `.*;`, and thread \(\d+, 0, 0\) of threadgroup .* (wrote|read) it at source:[57] `",
    ),
    "race in threadgroup memory, a write after a read": Fault(
        I + SHARED + f"s[i] = a[i];\n{BARRIER}float x = s[63 - i];\ns[i] = x;\nout[i] = x;",
        "race",
        0,
        "it at source:[56]",
    ),
    "a barrier that does not speak of that memory": Fault(
        I + SHARED + "s[i] = a[i];\nthreadgroup_barrier(mem_flags::mem_device);\nout[i] = s[63 - i];",
        "race",
        5,
        r"reads element \d+ of .* 's' at source:5 `out\[i\] = s\[63 - i\];`, and .* wrote it at source:3",
    ),
    "a barrier of the simdgroup alone": Fault(
        I
        + SHARED
        + f"s[i] = 0;\n{BARRIER}s[i] = a[i];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n"
        + "out[i] = s[63 - i];",
        "race",
        0,
        "'s'",
    ),
    "two threads write one element": Fault(
        I + "out[i] = 0;\nout[i / 2] = a[i];", "race", 3, "element .* of out"
    ),
    "threadgroups write one element": Fault(
        I + "if (i < 32) out[i] = 1;\nelse out[i - 32] = 2;", "race", 0, r"of threadgroup \(0, 0, 0\)", tg=32
    ),
    "a plain write beside an atomic one": Fault(
        I
        + "atomic_fetch_add_explicit(&out[0], 1.0f, memory_order_relaxed);\n"
        + "if (i == 5) ((device float*)out)[0] = 1;",
        "race",
        0,
        "element 0 of out",
        options={"atomic_outputs": True, "init": 0},
    ),
    "uninitialised threadgroup memory": Fault(
        I + SHARED + f"if (i != 7) s[i] = 1;\n{BARRIER}out[i] = s[i];",
        "uninitialised",
        5,
        "element 7 of threadgroup array 's', which nobody has written",
    ),
    "what another threadgroup left": Fault(
        I + SHARED + f"if (i < 32) s[i] = 1;\n{BARRIER}out[i] = s[i % 32];", "uninitialised", 5, "'s'", tg=32
    ),
    "an output read before it is written": Fault(I + "out[i] += a[i];", "uninitialised", 2, "of out"),
    "an element never written": Fault(
        I + "if (i % 32 < 30) out[i] = a[i];", "never written", 0, "element 30 of out and 3 more"
    ),
    "an input written": Fault(
        I + "out[i] = 1;\n((device float*)a)[i] = 2;", "input written", 3, "input written: .* writes element"
    ),
    "misaligned": Fault(
        I + "out[i] = 0;\nif (i == 0) out[0] = (*(const device float4*)(a + 1)).x;",
        "misaligned",
        3,
        "reads 16 bytes at byte 4 of a, no multiple of 16",
    ),
    "barrier that some do not reach": Fault(
        I + "out[i] = 0;\nif (i < 40) {\n" + BARRIER + "}", "barrier divergence", 4, "has ended"
    ),
    "two barriers": Fault(
        I + "out[i] = 0;\nif (i < 32) {\n" + BARRIER + "} else {\n" + BARRIER + "}",
        "barrier divergence",
        0,
        "is elsewhere",
    ),
    "a return before a barrier": Fault(
        I + "out[i] = 0;\nif (i == 3) return;\n" + BARRIER,
        "barrier divergence",
        4,
        r"thread \(3, 0, 0\) .* has ended",
    ),
    "lanes that do not take part": Fault(
        I + "float x = a[i];\nif (i % 32 < 9)\n  x = simd_sum(x);\nout[i] = x;",
        "simd divergence",
        4,
        "in a reduction",
    ),
    "two operations": Fault(
        I + "float x = a[i];\nif (i % 2) x = simd_sum(x);\nelse x = simd_shuffle(x, 0);\nout[i] = x;",
        "simd divergence",
        0,
        "is elsewhere",
    ),
    "a lane at a barrier": Fault(
        I + "float x = a[i];\nif (i % 2) x = simd_max(x);\nelse " + BARRIER + "out[i] = x;",
        "simd divergence",
        3,
        "reduction",
    ),
    "a spin": Fault(
        I + "while (atomic_load_explicit(&out[0], memory_order_relaxed) == 0) {}",
        "time limit",
        2,
        "not done after 0.2 s",
        options={"atomic_outputs": True, "init": 0, "time_limit": 0.2},
    ),
    "too much threadgroup memory": Fault(
        "threadgroup float s[9000];\ns[0] = 1;",
        "too much threadgroup memory",
        1,
        "36000 bytes, of which there are 32768",
    ),
    "an array of a thread past its end": Fault(
        I + "float v[4] = {0};\nv[(i + 2) % 5] = 1;\nout[i] = v[0];",
        "undefined",
        3,
        "an index outside of its array",
    ),
    "a division by 0": Fault(
        I + "out[i] = 5 / int(i);", "undefined", 2, r"a division by 0 in thread \(0, 0, 0\)"
    ),
    "a shift": Fault(I + "out[i] = 1u << i;", "undefined", 2, "more bits"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str, run: Run) -> None:
    fault = FAULTS[name]
    with pytest.raises(KernelFault, match=fault.says) as caught:
        run(
            fault.body,
            *[mx.ones(64)] * fault.inputs,
            grid=fault.grid,
            tg=fault.tg,
            out=[((64,), mx.float32)],
            **fault.options,
        )
    assert caught.value.kind == fault.kind, caught.value
    if fault.line:
        assert caught.value.line == ("source", fault.line), caught.value
    assert "kernel 'test': " in str(caught.value)


GOOD = {
    "a barrier between": I + SHARED + f"s[i] = a[i];\n{BARRIER}out[i] = s[63 - i];",
    "a barrier of the simdgroup": I
    + SHARED
    + "s[i] = a[i];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = s[i ^ 31];",
    "device memory behind its barrier": I
    + "out[i] = a[i];\nthreadgroup_barrier(mem_flags::mem_device);\nfloat x = out[63 - i];\n"
    + "threadgroup_barrier(mem_flags::mem_device);\nout[i] = x;",
    "own element again": I + "out[i] = a[i];\nout[i] += 1;",
    "a loop of barriers": I
    + SHARED
    + f"float x = a[i];\nfor (int n = 0; n < 5; n++) {{ s[i] = x;\n{BARRIER}"
    + f"x += s[(i + n) % 64];\n{BARRIER}}}\n"
    + "out[i] = x;",
    "uniform branches": I
    + SHARED
    + f"float x = a[i];\nif (a[0] > 0) {{ {BARRIER} x = simd_sum(x); }}\nout[i] = x;",
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_passes(name: str, seed: int, run: Run) -> None:
    a = mx.arange(64, dtype=mx.float32) + 1
    strict = run(GOOD[name], a, grid=64, tg=64, out=[((64,), mx.float32)], seed=seed)
    fast = run(GOOD[name], a, grid=64, tg=64, out=[((64,), mx.float32)], mode="fast")
    assert mx.array_equal(strict[0], fast[0]).item()


def test_the_order_of_threads_is_drawn_anew_for_each_seed(run: Run) -> None:
    body = I + "out[i] = atomic_fetch_add_explicit((device atomic_uint*)out2, 1u, memory_order_relaxed);"
    orders = [
        tuple(
            run(body, grid=256, tg=64, out=[((256,), mx.uint32), ((1,), mx.uint32)], init=0, seed=s)[
                0
            ].tolist()
        )
        for s in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == list(range(256))


def test_a_mutable_input_lies_row_by_row(run: Run) -> None:
    """MLX would make it so before the kernel runs: what the kernel then writes is lost with the copy."""
    pool = mx.zeros((4, 32)).T
    with pytest.raises(ValueError, match="expected a row by row: MLX would write to a copy of it"):
        run("out[0] = 0;", pool, out=[((1,), mx.float32)], mutable_inputs=("a",))


def test_outputs_may_be_partial_and_inputs_mutable_where_that_is_said(run: Run) -> None:
    pool = mx.zeros(8)
    mx.eval(pool)
    body = I + "if (i < 4) { out[i] = 5; ((device float*)a)[i] = 7; }"
    (out,) = run(body, pool, out=[((32,), mx.float32)], partial_outputs=("out",), mutable_inputs=("a",))
    assert out[:4].tolist() == [5.0] * 4
    assert pool.tolist() == [7.0] * 4 + [0.0] * 4


def test_bytes_are_counted() -> None:
    kernel = metal_kernel("copy", ["a", "w"], ["out"], I + "out[i] = a[i] + w[0];")
    _, traffic = kernel.measure(
        inputs=[mx.ones(64), mx.ones(1)],
        grid=(64, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
    )
    assert traffic.read == {"a": 256, "w": 256, "out": 0}
    assert traffic.fetched == {"a": 256, "w": 2 * 4, "out": 0}
    assert traffic.written == {"a": 0, "w": 0, "out": 256}


def test_a_compilers_error_is_at_the_authors_line(run: Run) -> None:
    with pytest.raises(CompileError, match=r"^source:2: error: use of undeclared identifier 'nothing'"):
        run(I + "out[i] = nothing;")
    with pytest.raises(CompileError, match=r"^header:3: error: "):
        run(I + "out[i] = 1;", header="\n\nint f() { return nothing; }\n")


def test_lines_are_those_of_a_file_that_the_text_names(run: Run) -> None:
    with pytest.raises(KernelFault, match=r"at norm.metal:41 `out\[i \+ 64\] = 1;`") as caught:
        run('#line 40 "norm.metal"\n' + I + "out[i + 64] = 1;")
    assert caught.value.line == ("norm.metal", 41)


def test_a_fault_in_a_helper_is_at_the_helpers_line(run: Run) -> None:
    header = "inline float get(const device float* p, uint i) {\n  return p[i + 1];\n}\n"
    with pytest.raises(KernelFault) as caught:
        run(I + "out[i] = get(a, i);", mx.ones(32), header=header)
    assert caught.value.line == ("header", 2)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"grid": (0, 1, 1)}, ValueError, "a grid of three positive"),
        ({"tg": (2048, 1, 1), "grid": 2048}, ValueError, "at most 1024 threads"),
        ({"out": []}, ValueError, "at least one output"),
        ({"mode": "quick"}, ConfigError, "expected one of strict, fast"),
        ({"out": [((32,), mx.float64)]}, ConfigError, "Metal has no"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], says: str, run: Run) -> None:
    with pytest.raises(error, match=says):
        run(I + "out[i] = 1;", **change)


def test_it_is_eager(run: Run) -> None:
    with pytest.raises(ValueError, match="eval"):
        mx.compile(lambda a: run(I + "out[i] = a[i];", a)[0])(mx.ones(32))
