"""How near does each op come to what this machine can do? Shapes of Qwen2-0.5B, or of ``--shape``.

A call's least time is the longer of its bytes over the read bandwidth and its operations over the arithmetic
peak (int8 dot products for quantized matrices, float32 multiply-adds else), both measured just before; the
percent is that over the time that it took. Matrices are more than a cache holds, as in a model; other
arguments are in the cache, as in a model. Then all linear layers together for several rows, and what of a
token's time, through the engine, is not spent in kernels. Medians; prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
from measure.ceiling import KINDS, ceilings_or_none
from measure.engine import engine_of
from measure.machine import Watch, foreign_share_now, warning
from measure.op_cases import Case, cases
from measure.sides import numbers

from tiny_llm.config import ModelConfig
from tiny_llm.data import SamplingParams
from tiny_llm.layers.linear import heads_of
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.loading import load_model
from tiny_llm.models.registry import Model
from tiny_llm.ops.backend import kernel_seconds, set_threads, use
from tiny_llm.weights.names import config_of

TOGETHER = (1, 2, 4, 8, 16, 32)
STEPS = 32


def peaks(threads: int) -> Mapping[str, float] | None:
    """Units a second of each kind of ceiling; None, said aloud, without a compiler."""
    with ceilings_or_none() as ceilings:
        if ceilings is None:
            return None
        return {kind: statistics.median(ceilings.rate(kind, threads) for _ in range(3)) for kind in KINDS}


def seconds_a_call(calls: Sequence[Callable[[], object]], rounds: int) -> float:
    """The median over rounds, after one that is not counted, of all calls in one evaluation."""
    taken = []
    for _ in range(rounds + 1):
        outs = [call() for call in calls]
        began = time.perf_counter()
        mx.eval(outs)
        taken.append((time.perf_counter() - began) / len(calls))
    return statistics.median(taken[1:])


def row(case: Case, seconds: float, peak: Mapping[str, float] | None) -> dict[str, float | str | None]:
    """One op's figures; ``percent`` is of the nearer ceiling."""
    share = None
    if peak is not None and peak[case.peak]:
        share = max(case.bytes / peak["read"], case.operations / peak[case.peak]) / seconds
    return {
        "us": round(seconds * 1e6, 2),
        "gb_s": round(case.bytes / seconds / 1e9, 2),
        "gop_s": round(case.operations / seconds / 1e9, 1),
        "percent": None if share is None else round(100 * share, 1),
        "rounds_of": len(case.calls),
    }


def show(name: str, figures: Mapping[str, float | str | None]) -> None:
    """Print one op's line."""
    words = [name, *(figures[column] for column in ("us", "gb_s", "gop_s", "percent"))]
    print("{:<30}{:>12}{:>10}{:>10}{:>9}".format(*("-" if word is None else word for word in words)))


def linear_layers(model: Decoder, x: mx.array) -> mx.array:
    """Every matrix of the model met once by each row of x, and nothing else."""
    for layer in model.layers:
        attention = layer.self_attn
        maps = attention.q_proj, attention.k_proj, attention.v_proj
        query, *_ = heads_of(x, maps, attention.head_dim)
        x = layer.mlp(attention.o_proj(query))
    return model.lm_head(x)


def decode_step_s(model: Model) -> tuple[float, float]:
    """Seconds of a greedy token after a short prompt, through the engine; and of the kernels in it."""
    engine = engine_of(model)
    engine.add([1] * 16, SamplingParams(max_tokens=3 * STEPS, ignore_eos=True, speculate=False))
    for _ in range(STEPS):
        engine.step()
    began, before = time.perf_counter(), kernel_seconds() or 0.0
    for _ in range(STEPS):
        engine.step()
    return (time.perf_counter() - began) / STEPS, ((kernel_seconds() or 0.0) - before) / STEPS


def together_s(model: Decoder, rounds: int) -> dict[int, float]:
    """Seconds for all linear layers by the number of rows, which take turns."""
    E = model.config.hidden_size
    inputs = {rows: mx.random.normal((rows, E)) for rows in TOGETHER}
    mx.eval(inputs)
    taken: dict[int, list[float]] = {rows: [] for rows in TOGETHER}
    for _ in range(rounds):
        for rows, x in inputs.items():
            taken[rows].append(seconds_a_call([partial(linear_layers, model, x)], 1))
    return {rows: statistics.median(seconds) for rows, seconds in taken.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen2-0.5b")
    parser.add_argument(
        "--rows", type=numbers, default=(1, 16, 512), help="tokens a step, with commas between"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens that attention sees")
    parser.add_argument("--window", type=int, default=0, help="of these, the last that a row sees; 0: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", help="ref or cpu; the best one by default")
    parser.add_argument("--activations", choices=("int8", "exact"), default="int8")
    options = parser.parse_args()
    if said := warning(foreign_share_now(), "before the start"):
        print(said)
    set_threads(options.threads)
    with use(options.backend) as backend:
        measure(options, backend)


def measure(options: argparse.Namespace, backend: str) -> None:
    """All of it, on the backend in use."""
    peak, watch = peaks(options.threads), Watch(())
    config = ModelConfig.from_hf(config_of(options.shape))
    config = replace(config, windows=(options.window,) * config.num_layers)
    ops: dict[str, object] = {}
    for rows in options.rows:
        print(f"\n{f'{rows} rows':<30}{'us a call':>12}{'GB/s':>10}{'GOP/s':>10}{'percent':>9}")
        for case in cases(config, rows, options.context, options.activations == "exact"):
            figures = row(case, seconds_a_call(case.calls, options.rounds), peak)
            show(case.name, figures)
            ops[f"{case.name}, {rows} rows"] = figures
    model = load_model(DummyCheckpoint(options.shape), quantize=4, activations=options.activations)
    assert isinstance(model, Decoder)
    together = {rows: rows / s for rows, s in together_s(model, options.rounds).items()}
    print(f"\n{'all linear layers':<30}{'tok/s':>12}{'of one row':>12}")
    for rows, rate in together.items():
        print(f"{f'{rows} rows':<30}{rate:>12.1f}{rate / together[1]:>11.2f}x")
    steps = sorted(decode_step_s(model) for _ in range(options.rounds))
    step, kernels = steps[len(steps) // 2]
    share = 1 - kernels / step
    print(f"\na token in {step * 1e3:.2f} ms, of which kernels {kernels * 1e3:.2f}: all else is {share:.1%}")
    if said := warning(watch.foreign_share(), "meanwhile"):
        print(said)
    facts = {"benchmark": "ops", "shape": options.shape, "backend": backend, "threads": options.threads}
    found = {
        "peaks": peak,
        "ops": ops,
        "linear_tok_s": together,
        "kernels_ms": kernels * 1e3,
        "step_ms": step * 1e3,
    }
    print(json.dumps(facts | found | {"overhead_share": share, "foreign_share": watch.foreign_share()}))


if __name__ == "__main__":
    main()
