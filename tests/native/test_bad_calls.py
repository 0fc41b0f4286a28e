"""Calls of the module with arguments that make no sense: an error or an answer, never a crash.

Each call is a right one with one or two arguments exchanged. They are made in a process of their own,
which names each call before it makes it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.ops import backend

pytestmark = pytest.mark.skipif(not backend.works(), reason="the CPU kernels are not built")
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"isa", "best_isa", "set_isa", "num_threads", "set_num_threads", "keep_memory", "kernel_seconds"}

CHILD = """
import faulthandler, math, random, sys
import mlx.core as mx
import tiny_llm._cpu as cpu

faulthandler.enable()

def f(*shape, dtype=mx.float32):
    return mx.random.normal(shape).astype(dtype)

ids = mx.array([1, 0, 3], dtype=mx.int32)
words, scales, biases = mx.quantize(f(8, 64), group_size=32, bits=4)
dense, wide = cpu.pack_dense(f(8, 64)), cpu.pack_dense(f(4, 16, dtype=mx.bfloat16))
packed = cpu.pack_quantized(words, scales, biases, 32, 4, False)
many, less = cpu.pack_dense(f(4, 16, 64)), cpu.pack_dense(f(4, 64, 16))
exact = cpu.pack_quantized(*mx.quantize(f(20, 128), group_size=128, bits=8), 128, 8, True)
pool, tables = (f(4, 1, 8, 16), f(4, 1, 16, 8)), mx.array([[0], [2]], dtype=mx.int32)
starts, lens = mx.array([0, 2, 3], dtype=mx.int32), mx.array([2, 4], dtype=mx.int32)
slots = mx.array([0, 1, 35], dtype=mx.int32)
RIGHT = {
    "rms_norm": (f(3, 16), f(16), 1e-6),
    "add_rms_norm": (f(3, 16), f(3, 16), f(16), 1e-6),
    "pack_quantized": (words, scales, biases, 32, 4, False),
    "pack_dense": (f(8, 64),),
    "linear": (f(3, 64), [packed, packed], [None, f(8)]),
    "gated": (f(3, 64), dense, dense, None, f(8)),
    "experts": (f(3, 64), f(3, 4), f(4), 2, True, many, many, less),
    "experts_gated": (f(3, 64), f(3, 4), f(4), 2, True, many, many),
    "experts_down": (f(6, 16), f(3, 4), f(4), 2, True, less),
    "quantized_rows": (f(3, 64), words, scales, biases, 32, 4),
    "embedding": (ids, packed),
    "rope": (f(3, 2, 8), ids, f(4)),
    "rope_qk": (f(3, 2, 8), f(3, 1, 8), ids, f(4), None, f(8), 1e-6),
    "softmax": (f(3, 16),),
    "argmax": (f(3, 16),),
    "all_float32": (f(3, 16), ids),
    "logprobs": (f(3, 16), mx.array([1, 0, 15], dtype=mx.uint32), 4),
    "sample": (f(2, 16), [0.0, 1.0], [0, 5], [1.0, 0.9], [0.0, 0.1], [1, 2], [7, 8]),
    "swiglu": (f(3, 16), f(3, 16)),
    "untouched_zeros": ((2, 3, 4), mx.float16),
    "copy_blocks": (f(4, 2, 8), f(3, 2, 8), mx.array([[0, 2], [3, 1]], dtype=mx.int32)),
    "attend": (f(3, 2, 8), f(3, 1, 8), f(3, 1, 8), *pool, slots, tables, starts, lens, 0.3),
}
TYPES = (mx.float32, mx.bfloat16, mx.float16, mx.int32, mx.int64, mx.uint32, mx.uint8, mx.bool_, mx.complex64)
SHAPES = ((), (0,), (1,), (3,), (16,), (64,), (3, 16), (0, 16), (3, 0), (3, 64), (0, 64), (16, 3), (8, 64),
          (3, 2, 8), (3, 1, 8), (0, 2, 8), (3, 2, 7), (2, 0, 8), (1, 3, 64), (8, 8), (2,), (2, 1), (3, 1),
          (2, 2), (4, 1, 8, 16), (4, 1, 16, 8), (0, 1, 8, 16))

def wrong(choice):
    if choice.random() < 0.6:
        shape = choice.choice(SHAPES)
        array = (mx.random.normal(shape) * 4).astype(mx.float32)
        if len(shape) > 1 and choice.random() < 0.3:
            array = array.transpose()
        return array.astype(choice.choice(TYPES)) if choice.random() < 0.5 else array
    numbers = [-1, 0, 1, 3, 5, 64, 2**31, 2**40, math.nan, -math.inf, True, None, "x"]
    matrices = [dense, wide, packed, exact, [], [None], [packed], [exact], [exact, packed], [dense, None]]
    return choice.choice([*numbers, *matrices, ids, ids[:0]])

def words_for(value):
    if isinstance(value, mx.array):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, list):
        return f"[{', '.join(map(words_for, value))}]"
    return f"Matrix {value.shape}" if isinstance(value, cpu.Matrix) else repr(value)

refused = 0
for number in range(int(sys.argv[1])):
    choice = random.Random(number)
    mx.random.seed(number)
    name = choice.choice(sorted(RIGHT))
    arguments = list(RIGHT[name])
    for _ in range(choice.randint(1, 2)):
        arguments[choice.randrange(len(arguments))] = wrong(choice)
    print(number, name, *map(words_for, arguments), flush=True)
    try:
        result = getattr(cpu, name)(*arguments)
        mx.eval(result.data if isinstance(result, cpu.Matrix) else result)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        refused += 1
        print("  ", type(error).__name__, str(error).splitlines()[0], flush=True)
print("functions", *sorted(RIGHT))
print("refused", refused)
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", backend.cpu.best_isa() if backend.works() else "amx"])
def test_no_call_crashes(isa: str) -> None:
    calls = 3000
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(calls)],
        cwd=ROOT,
        env={**os.environ, "TINY_LLM_CPU_ISA": isa, "MALLOC_PERTURB_": "165"},
        capture_output=True,
        text=True,
    )
    last = "\n".join(result.stdout.splitlines()[-3:])
    assert result.returncode == 0, f"exit code {result.returncode} after\n{last}\n{result.stderr[-2000:]}"
    refused = int(result.stdout.split("refused ")[-1])
    assert calls * 0.3 < refused < calls, "most are errors, and some are calls like any other"
    there = {name for name in dir(backend.cpu) if callable(getattr(backend.cpu, name)) and name[0].islower()}
    tried = set(result.stdout.split("functions ")[-1].splitlines()[0].split())
    assert tried == there - SETTINGS, "a function of the module is tried nowhere here"


def test_a_message_says_what_was_expected_and_given() -> None:
    with pytest.raises(ValueError, match=r"\[rms_norm\] expected weight float32 \[16\], got float32 \[3\]"):
        backend.cpu.rms_norm(mx.zeros((2, 16)), mx.zeros(3), 0.0)
