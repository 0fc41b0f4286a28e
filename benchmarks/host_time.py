"""How long does the host take to build a decode step's graph? Ours and mlx-lm's, in turns; nothing is run.

A GPU's step takes at least so long. Random 4-bit weights in a model's shapes, a token each of ``--rows``
sequences; from the tokens before to the likeliest next ones. What MLX has one kernel for on a GPU it builds
of many operations on a CPU: each is one operation of the same arrays here, for both sides. Our Metal kernels
are called as on a Mac, which MLX allows without one while a graph is exported. Thread time, medians of the
least of ten in a row, which the rest of the machine disturbs less.
Prints a table and one JSON line; ``--profile`` shows where one side's time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from measure.sides import numbers
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import _get_classes

from tiny_llm.data import Plan, PlanItem
from tiny_llm.engine.batch import build_batch
from tiny_llm.kv.paged import PagedCache
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.loading import load_model
from tiny_llm.models.replay import Replay
from tiny_llm.ops import swiglu
from tiny_llm.ops.argmax import argmax
from tiny_llm.ops.backend import use
from tiny_llm.ops.kv_pool import KvFormat
from tiny_llm.weights.names import config_of

CONTEXT, BLOCK, DTYPE = 100, 32, mx.bfloat16
IN_A_ROW = 10
OURS = {
    "mlx": ("mlx", True),
    "mlx, not replayed": ("mlx", False),
    "metal": ("metal", True),
    "metal, not replayed": ("metal", False),
}
MLX_LM = "mlx-lm"

Step = tuple[Callable[[], mx.array], Callable[[], None]]
"""What builds a graph, and what lets go of it."""


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """One operation for each call of what is one kernel there."""

    def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        return mx.depends(x, [weight])

    def rope(x: mx.array, *_: object, offset: int | mx.array, **_named: object) -> mx.array:
        return mx.depends(x, [offset] if isinstance(offset, mx.array) else [x])

    def attention(q: mx.array, k: mx.array, v: mx.array, **_: object) -> mx.array:
        return mx.depends(q, [k, v])

    with (
        patch.object(mx.metal, "is_available", lambda: True),
        patch.object(mx.fast, "rms_norm", rms_norm),
        patch.object(mx.fast, "rope", rope),
        patch.object(mx.fast, "scaled_dot_product_attention", attention),
        patch.object(swiglu, "swiglu_mlx", swiglu.fused()),
    ):
        yield


def ours(shape: str, rows: int, backend: str, played: bool) -> Step:
    """A step of ours on ``backend``, from a plan; ``played`` again, as on a GPU, or built anew."""
    with use(backend):
        model = load_model(DummyCheckpoint(shape), dtype="bfloat16", quantize=4)
        assert isinstance(model, Decoder)
        run = Replay(model) if played else model
        cache = PagedCache(KvFormat.of(model.config, BLOCK, DTYPE), max_blocks=rows * BLOCK)
    blocks = -(-(CONTEXT + 1) // BLOCK)
    tables = [array("i", range(row * blocks, (row + 1) * blocks)) for row in range(rows)]
    drawn = mx.zeros((rows,), mx.uint32)
    items = [PlanItem(row, array("i", [-1 - row]), CONTEXT, table, 1) for row, table in enumerate(tables)]
    plan = Plan(items, rows * blocks)
    with use(backend):
        cache.prepare(plan)
    mx.eval(cache.arrays(), drawn)
    pools = list(cache._layers)

    def step() -> mx.array:
        with use(backend):
            batch = build_batch(plan, BLOCK, drawn)
            cache.prepare(plan)
            return argmax(run(batch, cache))

    def reset() -> None:
        cache._layers = list(pools)

    return step, reset


def theirs(shape: str, rows: int) -> Step:
    """A step of mlx-lm's, as its ``generate_step`` does it."""
    config = config_of(shape)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.set_dtype(DTYPE)
    nn.quantize(model, group_size=64, bits=4)
    attention = model.layers[0].self_attn
    head_dim = config["hidden_size"] // attention.n_heads
    made = mx.zeros((rows, attention.n_kv_heads, CONTEXT, head_dim), DTYPE)
    caches = [KVCache() for _ in model.layers]
    for one in caches:
        one.update_and_fetch(made, made)
    mx.eval(model.parameters(), [one.state for one in caches])
    kept = [(one.keys, one.values) for one in caches]
    drawn = mx.zeros((rows,), mx.uint32)

    def step() -> mx.array:
        return mx.argmax(model(drawn[:, None], cache=caches)[:, -1], axis=-1)

    def reset() -> None:
        for one, (keys, values) in zip(caches, kept, strict=True):
            one.keys, one.values, one.offset = keys, values, CONTEXT

    return step, reset


def microseconds(step: Step) -> float:
    """The least that one of a few in a row takes this thread; to let go of a graph is not in it."""
    build, reset = step
    taken = []
    for _ in range(IN_A_ROW):
        began = time.thread_time()
        graph = build()
        taken.append(time.thread_time() - began)
        del graph
        reset()
    return 1e6 * min(taken)


def main() -> None:
    """Measure and print."""
    options_of = argparse.ArgumentParser(description=__doc__)
    options_of.add_argument("--shape", default="qwen2-0.5b")
    options_of.add_argument("--rows", type=numbers, default=(1, 4), help="sequences, with commas between")
    options_of.add_argument("--rounds", type=int, default=40)
    options_of.add_argument("--profile", choices=(*OURS, MLX_LM), help="one side, and no more")
    options = options_of.parse_args()
    found: dict[int, dict[str, float]] = {}
    print(f"{'rows':>4} {'side':>20} {'us a step':>10} {'of mlx-lm':>10}")
    for rows in options.rows:
        with as_on_a_gpu():
            sides = {name: ours(options.shape, rows, *how) for name, how in OURS.items()}
            sides[MLX_LM] = theirs(options.shape, rows)
            run = partial(measured, sides, options.rounds, options.profile, told := {})
            mx.export_function(lambda _: None, run, mx.zeros(1))
        found[rows] = told
        for name, us in told.items():
            print(f"{rows:>4} {name:>20} {us:>10} {us / told[MLX_LM]:>10.2f}")
    print(json.dumps({"benchmark": "host_time", "shape": options.shape, "us": found}))


def measured(
    sides: Mapping[str, Step], rounds: int, profiled: str | None, told: dict[str, float], traced: mx.array
) -> mx.array:
    """Tell each side's microseconds, or show one side's profile."""
    for step in sides.values():
        microseconds(step)
    gc.freeze()
    if profiled:
        cProfile.runctx(
            "for _ in range(10): run(step)", {"run": microseconds}, {"step": sides[profiled]}, sort="tottime"
        )
        return traced
    found = [{name: microseconds(step) for name, step in sides.items()} for _ in range(rounds)]
    told |= {name: round(median(one[name] for one in found)) for name in sides}
    return traced


if __name__ == "__main__":
    main()
