"""The text that we compile is MLX's own, and rewriting it keeps the author's lines."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tiny_llm.metalsim.run import MetalKernel, metal_kernel
from tiny_llm.metalsim.source import ATTRIBUTES, find_arrays, threadgroup_arrays

DTYPES = [
    *(mx.bool_, mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64),
    *(mx.float16, mx.bfloat16, mx.float32),
]
NAMES = ["a", "x", "w_1", "inp", "a_shape_of", "grid"]


def random_call(seed: int) -> tuple[dict[str, Any], list[mx.array], dict[str, Any]]:
    """Arguments of metal_kernel, inputs, and the other arguments of the kernel's call."""
    rng = random.Random(seed)
    names = rng.sample(NAMES, rng.randrange(len(NAMES)))
    parts = [f"{n}_{rng.choice(['shape', 'strides', 'ndim'])};" for n in names if rng.random() < 0.5]
    parts += [f"{name}.x;" for name, _ in rng.sample(ATTRIBUTES, rng.randrange(5))]
    rng.shuffle(parts)
    shapes = [[rng.randrange(4) + 1 for _ in range(rng.randrange(4))] for _ in names]
    outputs = rng.randrange(3) + 1
    kernel = {
        "name": rng.choice(["k", "kernel_2", "Long_name"]),
        "input_names": names,
        "output_names": ["o", "out_2", "z"][:outputs],
        "source": "\n".join(parts),
        "header": rng.choice(["", "inline int f() { return 1; }\n", "// x_shape"]),
        "atomic_outputs": rng.random() < 0.2,
    }
    values = [rng.choice([True, False, 0, 7, -3, *DTYPES]) for _ in range(rng.randrange(4))]
    call = {
        "template": [(f"T{i}", v) for i, v in enumerate(values)],
        "output_dtypes": [rng.choice(DTYPES) for _ in range(outputs)],
        "output_shapes": [(2, 2)] * outputs,
        "grid": (4, 1, 1),
        "threadgroup": (4, 1, 1),
    }
    return kernel, [mx.zeros(shape, rng.choice(DTYPES)) for shape in shapes], call


def text_of_mlx(
    kernel: dict[str, Any], inputs: list[mx.array], call: dict[str, Any], capfd: Any, folder: Path
) -> str:
    """What MLX prints: it makes the text without a Metal device too, while it exports a function."""
    made = mx.fast.metal_kernel(**kernel)

    def traced(*arrays: mx.array) -> Any:
        return made(inputs=[*arrays], verbose=True, **call)

    capfd.readouterr()
    mx.export_function(str(folder / "function.mlxfn"), traced, *inputs)
    return str(capfd.readouterr().out.split("```\n")[1])


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_the_text_is_the_one_that_mlx_makes(first: int, capfd: Any, tmp_path: Path) -> None:
    for seed in range(first, first + 50):
        kernel, inputs, call = random_call(seed)
        expected = text_of_mlx(kernel, inputs, call, capfd, tmp_path)
        ours: MetalKernel = metal_kernel(**kernel)
        text = ours.variant(inputs, call["output_dtypes"], call["template"]).text
        assert text + "\n" == expected, f"seed {seed}"


ARRAYS = {
    "threadgroup float a[32];": ["a"],
    "threadgroup T a[2][BM * (BK + 4)];": ["a"],
    "threadgroup float a[4], b[4][2];": ["a", "b"],
    "threadgroup vec<T, 4> tile[8];": ["tile"],
    "threadgroup alignas(16) half x[8];": ["x"],
    "threadgroup float total;": ["total"],
    "threadgroup atomic<uint> count[2];": ["count"],
    "threadgroup float* p = a;": [],
    "// threadgroup float a[32];": [],
    "threadgroup_barrier(mem_flags::mem_threadgroup);": [],
    "auto p = (threadgroup float*)a;": [],
    "f((const threadgroup half *)a, b);": [],
}


@pytest.mark.parametrize(("text", "names"), ARRAYS.items())
def test_threadgroup_arrays_become_the_simulators_memory(text: str, names: list[str]) -> None:
    body = f"int i;\n{text}\nint j;"
    made = threadgroup_arrays(body)
    assert [f'"{name}")' in made for name in names] == [True] * len(names)
    assert made.count("msim_array(") == len(names)
    assert made.split("\n")[0] == "int i;" and made.split("\n")[-1] == "int j;"


def test_a_statement_over_lines_keeps_those_that_follow_where_they_were() -> None:
    body = "threadgroup\n  float a[4];\nint last;"
    assert threadgroup_arrays(body).split("\n")[2] == "int last;"
    assert len(list(find_arrays(body))) == 1
