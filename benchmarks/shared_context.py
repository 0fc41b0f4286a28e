"""What do sequences gain that share the beginning of their contexts? Attention, a decode step, and memory.

Tables whose first blocks are the same, against tables of as many blocks of their own with the same keys and
values: what is computed is equal, bit for bit, and what is read is not. Layers of one shape take turns; the
step is that of a model of random weights, 4 bits, up to its logits. Both sides in turns, medians.
Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import mlx.core as mx
from measure.engine import engine_of
from measure.sides import numbers

from tiny_llm.config import ModelFacts
from tiny_llm.data import Batch, Plan, PlanItem
from tiny_llm.engine.batch import build_batch
from tiny_llm.kv.paged import PagedCache
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.models.loading import load_model
from tiny_llm.models.registry import Model

BITS, BLOCK = 4, 16


@dataclass(frozen=True)
class Row:
    """Milliseconds of a layer's attention and of a whole step, and blocks; apart over shared."""

    sequences: int
    attention_ms: float
    attention_ratio: float
    step_ms: float
    step_ratio: float
    blocks_saved: float


def plan_of(sequences: int, context: int, shared: int) -> Plan:
    """A step of one token each, at the end of contexts of which the first ``shared`` tokens are one."""
    common, own = shared // BLOCK, (context - shared) // BLOCK
    items = []
    for i in range(sequences):
        first = common + i * own
        table = array("i", [*range(common), *range(first, first + own)])
        items.append(PlanItem(i, array("i", [i + 1]), context - 1, table, 1))
    return Plan(items, common + sequences * own, decodes=sequences)


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def in_turns(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """The median milliseconds of each; the first round is not counted."""
    taken = [[milliseconds(call) for call in calls] for _ in range(rounds + 1)][1:]
    return [statistics.median(side) for side in zip(*taken, strict=True)]


def attention(config: ModelFacts, cache: PagedCache, batch: Batch) -> None:
    """That of every layer, one after the other."""
    heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
    rows = batch.tokens.size
    q, k, v = (
        mx.random.normal((rows, n, config.head_dim), key=mx.random.key(i)) for i, n in enumerate(heads)
    )
    for layer in range(config.num_layers):
        mx.eval(cache.attend(layer, q, k, v, batch))


def step(model: Model, cache: PagedCache, batch: Batch) -> None:
    """A whole step, up to its logits."""
    mx.eval(model(batch, cache))


def measure(sequences: int, given: argparse.Namespace) -> Row:
    """Time both sides."""
    model = load_model(DummyCheckpoint(given.shape), quantize=BITS)
    made = engine_of(model)
    plans = [plan_of(sequences, given.context, shared) for shared in (given.shared, 0)]
    attends, steps = list[Callable[[], object]](), list[Callable[[], object]]()
    for plan in plans:
        cache = PagedCache(made.cache.format, max_blocks=plan.num_blocks)
        cache.prepare(plan)
        batch = build_batch(plan, BLOCK)
        attends.append(partial(attention, model.config, cache, batch))
        steps.append(partial(step, model, cache, batch))
    shared_ms, apart_ms = in_turns(attends, given.rounds)
    shared_step, apart_step = in_turns(steps, given.rounds)
    return Row(
        sequences,
        shared_ms / model.config.num_layers,
        apart_ms / shared_ms,
        shared_step,
        apart_step / shared_step,
        1 - plans[0].num_blocks / plans[1].num_blocks,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2-0.5b")
    parser.add_argument("--context", type=int, default=2304)
    parser.add_argument("--shared", type=int, default=2048)
    parser.add_argument("--sequences", type=numbers, default=(16, 64))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    rows = [measure(sequences, given) for sequences in given.sequences]
    print(f"{given.shared} of {given.context} tokens are shared")
    print("sequences | attention ms a layer | against apart | step ms | against apart | blocks saved")
    for row in rows:
        attention = f"{row.attention_ms:20.2f} | {row.attention_ratio:12.2f}x"
        step = f"{row.step_ms:7.1f} | {row.step_ratio:12.2f}x"
        print(f"{row.sequences:9} | {attention} | {step} | {row.blocks_saved:12.1%}")
    told = {"shape": given.shape, "context": given.context, "shared": given.shared}
    print(json.dumps({"benchmark": "shared_context", **told, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
