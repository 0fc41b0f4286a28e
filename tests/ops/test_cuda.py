"""Every kernel as CUDA: NVIDIA's compiler takes it, in three dtypes. On a GPU it gives what ``ref`` gives.

MLX compiles by NVRTC on the machine with the GPU; here nvcc compiles the same text under the same signature.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tiny_llm.data import Pages, QuantizedTensor
from tiny_llm.metalsim.build import why_not
from tiny_llm.ops import backend, metal
from tiny_llm.ops.embedding import embedding
from tiny_llm.ops.experts import Routing, experts
from tiny_llm.ops.linear import gated, linears
from tiny_llm.ops.metal import blocks, cuda_text
from tiny_llm.ops.paged_attention import paged_attention
from tiny_llm.ops.quantized_matmul import quantized_matmul
from tiny_llm.ops.rms_norm import add_rms_norm, rms_norm
from tiny_llm.ops.rope import rope_frequencies, rope_qk
from tiny_llm.ops.swiglu import swiglu
from tiny_llm.sampling.sampler import sample
from tiny_llm.sampling_params import SamplingParams

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
CUDA_TYPE = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.int8: "int8_t",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
}
INCLUDES = (
    "#include <cstdint>\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cooperative_groups.h>\n"
)


def normal(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def calls(dtype: mx.Dtype) -> Iterator[Callable[[], Any]]:
    """A call of each op that has a kernel, in the variants that a model makes."""
    x, weight = normal(3, 896, dtype=dtype), normal(896, seed=1, dtype=dtype)
    yield lambda: rms_norm(x, weight, 1e-6)
    yield lambda: add_rms_norm(x, x * 2, weight, 1e-6)
    yield lambda: swiglu(x, x * 2)
    q, k, head = normal(3, 4, 64, dtype=dtype), normal(3, 2, 64, seed=1, dtype=dtype), normal(64, dtype=dtype)
    positions, inv_freq = mx.arange(3, dtype=mx.int32), rope_frequencies(64, 1e6)
    yield lambda: rope_qk(q, k, positions, inv_freq, None, None, 1e-6)
    yield lambda: rope_qk(q, k, positions, inv_freq, head, head, 1e-6)
    for rows in (1, 2, 16):
        for bits in (4, 8):
            many, bias = normal(rows, 128, dtype=dtype), normal(10, dtype=dtype)
            matrix = QuantizedTensor(*mx.quantize(normal(10, 128, dtype=dtype), 64, bits), 64, bits)
            yield lambda many=many, matrix=matrix: quantized_matmul(many, matrix)  # type: ignore[misc]
            yield lambda a=(many, [matrix] * 3, [bias] * 3): linears(*a)  # type: ignore[misc]
            yield lambda a=(many, matrix, matrix, None, None): gated(*a)  # type: ignore[misc]
    stack, back = (
        QuantizedTensor(*mx.quantize(normal(*shape, dtype=dtype), 64, 4), 64, 4)
        for shape in ((4, 64, 128), (4, 128, 64))
    )
    for rows in (1, 9):
        given = normal(rows, 128, dtype=dtype), normal(rows, 4), Routing(2, True), stack, stack, back
        yield lambda given=given: experts(*given)  # type: ignore[misc]
    pool = normal(8, 2, 64, 16, dtype=dtype), normal(8, 2, 16, 64, dtype=dtype)
    tables, lens = mx.array([[1, 5, 3], [4, 0, 0]]), mx.array([40, 2])
    pages = Pages(*(a.astype(mx.int32) for a in (mx.array([55, 64, 65]), tables, mx.array([0, 1, 3]), lens)))
    yield lambda: paged_attention(q, k, k, pool, pages)
    scales = normal(8, 2, 16, dtype=mx.float16) / 9
    int8 = (*((9 * array).astype(mx.int8) for array in pool), scales, scales)
    yield lambda: paged_attention(q, k, k, int8, pages)
    blocks = mx.arange(20) % 8, mx.array([0, 1]), mx.array([320])
    long = Pages(*(a.astype(mx.int32) for a in (mx.array([63]), blocks[0][None], *blocks[1:])))
    yield lambda: paged_attention(q[:1], k[:1], k[:1], pool, long)
    alike, lens = mx.array([[0, 1, 2, 3, 4, 5, 6, 7, b] for b in (8, 9)]), mx.array([129, 130])
    pair = Pages(*(a.astype(mx.int32) for a in (mx.array([128, 145]), alike, mx.array([0, 1, 2]), lens)))
    more = normal(10, 2, 64, 16, dtype=dtype), normal(10, 2, 16, 64, dtype=dtype)
    yield lambda: paged_attention(q[:2], k[:2], k[:2], more, pair)
    table = QuantizedTensor(*mx.quantize(normal(9, 64, dtype=dtype), 32, 4), 32, 4)
    yield lambda: embedding(mx.array([8, 0, 3]), table)
    few = [SamplingParams(temperature=0.9, top_k=k, top_p=0.8, seed=k) for k in (0, 9)]
    yield lambda: sample(normal(2, 900), few, [1, 2])
    yield lambda: sample(normal(2, 901), few, [1, 2])


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = shutil.which("nvcc")
    if not found:
        pytest.skip("there is no nvcc, NVIDIA's compiler")
    return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CUDA function of each different kernel that is called; what it would compute is not looked at."""
    if reason := why_not():
        pytest.skip(reason)
    functions: dict[str, None] = {}

    def note(text: metal.Text, mode: str) -> metal.Kernel:
        def run(**call: Any) -> list[mx.array]:
            functions[function(text, f"kernel_{len(functions)}", **call)] = None
            return [mx.zeros(*of) for of in zip(call["output_shapes"], call["output_dtypes"], strict=True)]

        return run

    monkeypatch.setattr(metal, "_made", note)
    for name in (
        "quantized_matmul_metal.matmul_tiles_keep_bits",
        "paged_attention.attention_tiles_keep_bits",
    ):
        monkeypatch.setattr(f"tiny_llm.ops.{name}", lambda *_, **__: False)  # as on CUDA
    for dtype in DTYPES:
        with backend.use("metalsim"):
            for call in calls(dtype):
                mx.eval(call())
    return list(functions)


def function(
    text: metal.Text,
    name: str,
    inputs: Sequence[mx.array | float],
    template: Sequence[tuple[str, Any]],
    output_dtypes: Sequence[mx.Dtype],
    **_: Any,
) -> str:
    """A kernel's text in a namespace of its own, under the signature that MLX puts before it."""
    arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
    made = cuda_text(text.inputs, text.header, text.body, [a.ndim == 0 for a in arrays], "")
    parameters = [f"const {CUDA_TYPE[a.dtype]}* {n}" for n, a in zip(made.inputs, arrays, strict=True)]
    parameters += [f"{CUDA_TYPE[d]}* {n}" for n, d in zip(text.outputs, output_dtypes, strict=True)]
    constants = "".join(constant(n, value) for n, value in template)
    return (
        f"namespace {name}_of_{text.name} {{\n{made.header}\n"
        f"__global__ void run({', '.join(parameters)}) {{\n{constants}{made.body}\n}}\n}}\n"
    )


def constant(name: str, value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {CUDA_TYPE[value]};\n"
    kind = "bool" if isinstance(value, bool) else "int"
    return f"constexpr {kind} {name} = {int(value)};\n"


@pytest.mark.slow
def test_nvidias_compiler_takes_every_kernel(nvcc: str, made: list[str], tmp_path: Path) -> None:
    every = {
        name
        for file in metal.folder().glob("*.metal")
        for name, text in metal.texts(file.stem).items()
        if "simdgroup_matrix" not in text.body  # CUDA has them not, and the op does not ask for them there
    }
    assert every == {text.split("_of_")[1].split(" ")[0] for text in made}, "a kernel without a call here"
    prelude = (metal.folder("cuda") / "metal.cuh").read_text()
    (tmp_path / "all.cu").write_text(INCLUDES + prelude + "".join(made))
    command = [nvcc, "-std=c++17", "-arch=sm_80", "-Werror=all-warnings", "-Xptxas=-v", "-cubin"]
    done = subprocess.run(
        [*command, "-o", "all.cubin", "all.cu"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "bytes spill stores" in line]
    assert len(spills) == len(made)
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills), done.stderr


def test_a_grid_has_no_thread_beyond_it() -> None:
    assert blocks((32, 16, 3), (32, 4, 2)) == (32, 4, 1)
    assert blocks((4864 * 3, 1, 1), (256, 1, 1)) == (256, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_gives_what_ref_gives(dtype: mx.Dtype) -> None:
    if not mx.cuda.is_available():
        pytest.skip("MLX finds no CUDA device")
    for call in calls(dtype):
        with backend.use("ref"):
            expected = call()
        with backend.use("cuda"):
            got = call()
        pairs = [(got, expected)] if isinstance(got, mx.array) else list(zip(got, expected, strict=True))
        for ours, reference in pairs:
            assert mx.allclose(ours.astype(mx.float32), reference.astype(mx.float32), rtol=1e-2, atol=1e-2)
