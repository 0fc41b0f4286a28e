"""Whole models on backend mlx: logits as ``ref`` has them, in three dtypes, for ragged batches in chunks."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.data import Plan, PlanItem
from tiny_llm.engine.batch import build_batch
from tiny_llm.kv.paged import PagedCache
from tiny_llm.metalsim.build import why_not
from tiny_llm.models.loading import load_model
from tiny_llm.ops.backend import use
from tiny_llm.ops.kv_pool import KvFormat
from tiny_llm.ops.metal import VARIABLE as METALSIM_VARIABLE
from tiny_llm.proving.choice import OPS

# Of the largest logit. In 16 bits MLX's CPU device also sums in them, which its kernels for GPUs do not.
TOLERANCE = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 0.12}
# Of each step: (sequence, first position, tokens). Prompts in chunks beside tokens of others.
STEPS = [
    [(0, 0, 40), (1, 0, 3)],
    [(1, 3, 1), (0, 40, 25), (2, 0, 9)],
    [(0, 65, 1), (1, 4, 1), (2, 9, 1)],
    [(0, 66, 1), (1, 5, 1), (2, 10, 1), (3, 0, 17)],
    [(2, 11, 1)],
]
MOST = 80  # tokens of a sequence


def logits_of(
    folder: Path,
    backend: str,
    dtype: str,
    quantize: int | None,
    size: int,
    ours: frozenset[str] = frozenset(),
) -> mx.array:
    """Of every token of ``STEPS``."""
    with use(backend, ours):
        model = load_model(folder, dtype=dtype, quantize=quantize)
        format = KvFormat.of(model.config, size, getattr(mx, dtype))
        blocks = -(-MOST // size)
        cache = PagedCache(format, max_blocks=4 * blocks)
        outs = []
        for step in STEPS:
            items = []
            for sequence, start, count in step:
                ids = [(7 * sequence + 3 * p) % model.config.vocab_size for p in range(start, start + count)]
                # Blocks of a sequence lie apart, except for the last one's.
                table = [sequence * blocks + i if sequence == 3 else 3 * i + sequence for i in range(blocks)]
                own = table[: -(-(start + count) // size)]
                items.append(PlanItem(sequence, array("i", ids), start, array("i", own), count))
            plan = Plan(items, 4 * blocks, [], [], [])
            cache.prepare(plan)
            outs.append(model(build_batch(plan, size), cache))
            mx.eval(outs[-1])
    return mx.concatenate(outs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("case", "quantize", "size"),
    [
        ("qwen2_tied", None, 16),
        ("qwen2_14_heads", 4, 32),
        ("qwen3", None, 64),
        ("qwen3", 8, 16),
        ("llama_llama3", None, 32),
        ("llama_bias", None, 16),
    ],
)
def test_logits_of_ragged_batches(
    golden: Path, case: str, quantize: int | None, size: int, dtype: str, off: Callable[..., float]
) -> None:
    folder = golden / case
    expected = logits_of(folder, "ref", dtype, quantize, size)
    error = off(logits_of(folder, "mlx", dtype, quantize, size), expected)
    assert error < TOLERANCE[dtype], f"off by {error:.2g} of the largest logit"


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason="no clang for metalsim")
@pytest.mark.parametrize("ours", [*OPS, "all but attention"])
def test_each_kernel_of_ours_stands_on_the_floor(
    golden: Path, ours: str, off: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One op on ours and the others on MLX's, and the other way round: shapes and pools agree."""
    monkeypatch.setenv(METALSIM_VARIABLE, "fast")
    ops = frozenset(OPS) - {"paged_attention"} if ours == "all but attention" else frozenset({ours})
    folder = golden / "qwen3"
    expected = logits_of(folder, "ref", "float32", 8, 16)
    got = logits_of(folder, "metalsim", "float32", 8, 16, ops)
    assert off(got, expected) < TOLERANCE["float32"]
