"""How much memory does loading take, over what the weights themselves take? And what does serving take?

Writes a random checkpoint of about 1 GB with Qwen2-0.5B's shapes to a temporary folder, and loads it in
a fresh process for each row. Peak is the process's largest resident set less what it was before
loading; a ratio of 1 means that nothing but the weights was ever in memory. Prints a table and one
JSON line. Linux counts a parent's peak as its child's, so writing, too, has a process of its own.

``--serve qwen2-0.5b,llama-3-8b --context 64,1024`` instead has models with random weights of 4 bits read one
prompt of so many tokens each; it compares the peak with what ``main.py memory`` predicts, and shows what
``stats()`` then tells. ``--layers 14`` for a long context of a large one: more take more of weights, keys and
values only, whose size is known. With fewer, what the first layers free is given back before the last ones
want it: 8 layers of LLaMA-3-8B's took 11 % less at 4,096 tokens than was predicted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import mlx.core as mx
from measure.sides import numbers

from tiny_llm.config import ModelConfig, Quantization
from tiny_llm.data import Matrix, QuantizedTensor, SamplingParams
from tiny_llm.engine.llm import LLM
from tiny_llm.memory import available_memory_bytes, peak_memory_bytes
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.models.registry import expected_tensors, quantizable_tensors
from tiny_llm.ops.backend import use
from tiny_llm.ops.linear import pack
from tiny_llm.planning.memory import plan_memory
from tiny_llm.weights.checkpoint import load_weights
from tiny_llm.weights.names import config_of

ROWS: Mapping[str, tuple[str | None, int | None]] = {
    "as stored (bfloat16)": (None, None),
    "cast to float32": ("float32", None),
    "quantized to 8 bits": (None, 8),
    "quantized to 4 bits": (None, 4),
}


def write_checkpoint(folder: Path, model: str, shards: int = 2) -> None:
    """Random bfloat16 weights with a short name's shapes, in ``shards`` files with an index."""
    shapes = expected_tensors(ModelConfig.from_hf(config_of(model)))
    weight_map: dict[str, str] = {}
    for number in range(shards):
        names = list(shapes)[number::shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        arrays = {name: mx.random.normal(shapes[name], dtype=mx.bfloat16) for name in names}
        mx.save_safetensors(str(folder / file), arrays)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def nbytes(weight: Matrix) -> int:
    """Bytes of the arrays that one entry is made of."""
    if isinstance(weight, QuantizedTensor):
        return weight.packed.nbytes + weight.scales.nbytes + weight.biases.nbytes
    return weight.nbytes


def load_once(folder: Path, model: str, row: str) -> None:
    """In the child: load, and print the figures as JSON."""
    dtype, bits = ROWS[row]
    config = ModelConfig.from_hf(config_of(model))
    mx.eval(mx.zeros((1,)) + 1)  # the backend's own memory is not the loader's
    before, began = peak_memory_bytes(), time.perf_counter()
    weights = load_weights(
        folder,
        expected_tensors(config),
        dtype=getattr(mx, dtype) if dtype else None,
        quantization=None,
        quantize=Quantization(bits, 64) if bits else None,
        quantizable=quantizable_tensors(config),
        finish=partial(pack, exact=False),
    )
    seconds = time.perf_counter() - began
    figures = {
        "weights_mb": sum(map(nbytes, weights.values())) / 1e6,
        "peak_mb": (peak_memory_bytes() - before) / 1e6,
        "seconds": seconds,
    }
    print(json.dumps(figures))


def run_child(model: str, folder: str, row: str, *more: str) -> str:
    """Run one row in a process of its own, and return what it printed."""
    command = [sys.executable, __file__, "--model", model, *more, "--child", folder, row]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def serve_once(model: str, layers: int | None, context: int) -> None:
    """In the child: one request of ``context`` tokens, prompt and answer; print the figures as JSON."""
    checkpoint = DummyCheckpoint(model)
    checkpoint.config = ModelConfig.from_hf(facts_of(model, layers))
    llm = LLM(checkpoint, quantize=4)
    prompt = [(i * 7919) % 1000 for i in range(context - 1)]
    llm.engine.add(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
    while len(llm.engine):
        llm.engine.step()
    print(json.dumps({"peak": peak_memory_bytes(), "told": llm.engine.stats().memory_bytes}))


def facts_of(model: str, layers: int | None) -> dict[str, object]:
    """The facts of a short name's config.json, with so many layers."""
    facts = config_of(model)
    return facts if layers is None else {**facts, "num_hidden_layers": layers}


def serve(models: Sequence[str], contexts: Sequence[int], layers: int | None) -> None:
    """Print what serving was predicted to take, and what it took."""
    print(f"{'peak, MB':<14}{'context':>8}{'predicted':>11}{'measured':>10}{'off':>7}{'stats()':>9}")
    rows = []
    with use(None), tempfile.TemporaryDirectory() as folder:
        for model, context in product(models, contexts):
            config = Path(folder) / "config.json"
            config.write_text(json.dumps(facts_of(model, layers)))
            available = available_memory_bytes()
            plan = plan_memory(str(config), available=available, quantize=4, context=context)
            more = [] if layers is None else ["--layers", str(layers)]
            figures = json.loads(run_child(model, str(context), "serve", *more))
            off = plan.need.total / figures["peak"] - 1
            rows.append({"model": model, "context": context, "predicted": plan.need.total, **figures})
            sizes = [plan.need.total, figures["peak"], figures["told"]]
            predicted, peak, told = (round(size / 1e6) for size in sizes)
            print(f"{model:<14}{context:>8}{predicted:>11}{peak:>10}{off:>+7.1%}{told:>9}", flush=True)
    print(json.dumps({"benchmark": "load_memory", "layers": layers, "serving": rows}))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2-0.5b", help="short name whose shapes to use")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "ROW"), help=argparse.SUPPRESS)
    parser.add_argument("--serve", help="short names, with commas between: measure serving them")
    parser.add_argument("--context", type=numbers, default=(64, 1024), help="tokens, with commas between")
    parser.add_argument("--layers", type=int, help="of these models, instead of all: large ones take hours")
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve.split(","), options.context, options.layers)
    if options.child:
        folder, row = options.child
        if row == "serve":
            serve_once(options.model, options.layers, int(folder))
        elif row == "write":
            write_checkpoint(Path(folder), options.model)
        else:
            load_once(Path(folder), options.model, row)
        return
    results = {}
    print(f"{'':<24}{'weights MB':>12}{'peak MB':>10}{'ratio':>8}{'s':>8}")
    with tempfile.TemporaryDirectory() as folder:
        run_child(options.model, folder, "write")
        for row in ROWS:
            figures = json.loads(run_child(options.model, folder, row))
            ratio = figures["peak_mb"] / figures["weights_mb"]
            results[row] = {name: round(value, 1) for name, value in figures.items()} | {
                "ratio": round(ratio, 3)
            }
            print(
                f"{row:<24}{figures['weights_mb']:>12.0f}{figures['peak_mb']:>10.0f}{ratio:>8.3f}"
                f"{figures['seconds']:>8.1f}"
            )
    print(json.dumps({"benchmark": "load_memory", "model": options.model, "rows": results}))


if __name__ == "__main__":
    main()
