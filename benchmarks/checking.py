"""Where does a step that checks guesses spend its time, against one of a single row? Interleaved; medians.

One sequence of ``--context`` tokens on ``--shape`` with random 4-bit weights. The parts are made alone, each
of all layers in one evaluation; what the whole model takes beyond them is norms, rotations, additions.
Prints a table of milliseconds and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from tiny_llm import LLM, SamplingParams
from tiny_llm.data import Batch, Plan, PlanItem
from tiny_llm.engine.batch import build_batch
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.layers.linear import gated_by, heads_of
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.ops.backend import set_threads, use
from tiny_llm.sampling.sampler import sample

Part = Callable[[], list[mx.array]]


class NoAttention:
    """A cache with which attention is its query."""

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, batch: Batch, *, window: int = 0
    ) -> mx.array:
        """Return q; k and v are made too."""
        return q.reshape(q.shape[0], -1) + 0 * (k.sum() + v.sum())


def parts(llm: LLM, rows: int, context: int) -> dict[str, Part]:
    """What makes each part's arrays for a step of ``rows`` rows behind ``context`` tokens."""
    model, cache, size = llm.engine.runner.model, llm.engine.cache, llm.engine.settings.block_size
    blocks = array("i", range(-(-(context + rows) // size)))

    def batch(start: int, count: int, wanted: int) -> Batch:
        item = PlanItem(1, array("i", range(7, 7 + count)), start, blocks, wanted)
        plan = Plan([item], len(blocks))
        cache.prepare(plan)
        return build_batch(plan, size)

    mx.eval(model(batch(0, context, 1), cache), cache.arrays())
    config, layers = model.config, model.layers  # type: ignore[attr-defined]
    width, inner, wide = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    x, long, heads = (
        mx.random.normal((rows, n)).astype(model.norm.weight.dtype) for n in (width, inner, wide)
    )  # type: ignore[attr-defined]
    params = [replace(SamplingParams(temperature=1.0), seed=1)] * rows
    drawn = mx.random.normal((rows, config.vocab_size))
    mx.eval(x, long, heads, drawn)
    attention = [layer.self_attn for layer in layers]

    def whole(kv: object) -> list[mx.array]:
        return [model(batch(context, rows, rows), kv), *cache.arrays()]  # type: ignore[arg-type]

    return {
        "whole model": lambda: whole(cache),
        "without attention": lambda: whole(NoAttention()),
        "q, k, v": lambda: [
            y for a in attention for y in heads_of(x, (a.q_proj, a.k_proj, a.v_proj), a.head_dim)
        ],
        "attention's output": lambda: [a.o_proj(heads) for a in attention],
        "gate, up": lambda: [gated_by(x, one.mlp.gate_proj, one.mlp.up_proj) for one in layers],
        "down": lambda: [one.mlp.down_proj(long) for one in layers],
        "head": lambda: [model.lm_head(x)],  # type: ignore[attr-defined]
        "draw": lambda: [sample(drawn, params, list(range(rows)))],
    }


def milliseconds(part: Part, clock: Callable[[], float]) -> float:
    """What it takes to make and evaluate a part."""
    began = clock()
    mx.eval(part())
    return 1e3 * (clock() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen2-0.5b", help="short name of the random model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 5, 8])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--busy", action="store_true", help="one thread's CPU time, for a machine in use")
    options = parser.parse_args()
    set_threads(1 if options.busy else None)
    clock = time.process_time if options.busy else time.perf_counter
    llm = LLM(DummyCheckpoint(options.shape), quantize=4, engine=EngineSettings(kv_blocks=256))
    found: dict[str, dict[int, list[float]]] = {}
    with use(llm.backend, llm.kernels.ours):
        made = {rows: parts(llm, rows, options.context) for rows in options.rows}
        for _ in range(options.rounds):
            for name in made[options.rows[0]]:
                for rows in options.rows:
                    taken = found.setdefault(name, {}).setdefault(rows, [])
                    taken.append(milliseconds(made[rows][name], clock))
    medians = {
        name: {rows: statistics.median(ms) for rows, ms in by_rows.items()} for name, by_rows in found.items()
    }
    print(f"{'rows':<22}" + "".join(f"{rows:>9}" for rows in options.rows))
    for name, by_rows in medians.items():
        print(f"{name:<22}" + "".join(f"{ms:>9.2f}" for ms in by_rows.values()))
    print(
        json.dumps(
            {"benchmark": "checking", "shape": options.shape, "context": options.context, "ms": medians}
        )
    )


if __name__ == "__main__":
    main()
