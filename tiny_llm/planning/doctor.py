"""Owns ``python main.py doctor``: what runs here, what does not and why, what was found of our kernels.

Of a model: which of its ops have kernels here, found by running one layer of it; what in its folder is out of
the ordinary, as far as its small tensors and files show it. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import mlx.core as mx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tiny_llm.config import ModelConfig, ModelFacts, Quantization
from tiny_llm.engine.llm import LLM
from tiny_llm.engine.settings import usual_block_size
from tiny_llm.errors import ConfigError, WeightError
from tiny_llm.memory import available_memory_bytes
from tiny_llm.metrics import fallbacks
from tiny_llm.models.checkpoint import DummyCheckpoint, open_checkpoint
from tiny_llm.models.loading import check_options, kv_dtype
from tiny_llm.ops.backend import BACKENDS, GPU_KERNELS, active, choose, use
from tiny_llm.options import BackendOption, DebugOption, DtypeOption, QuantizeOption, command_app, option
from tiny_llm.planning.memory import find_config, plan_memory
from tiny_llm.planning.memory_report import heading, roofs, verdict
from tiny_llm.planning.speed import FORMAT, measure_machine, predict
from tiny_llm.proving.choice import choose as choose_kernels
from tiny_llm.proving.record import Proof, Shapes, machine, records
from tiny_llm.proving.trial import Limits, proved
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.weights.gguf.facts import tensors_at
from tiny_llm.weights.hub import resolve
from tiny_llm.weights.reader import Piece, read_ahead

app = command_app()


@app.command()
def doctor(
    model: Annotated[
        str | None,
        option(
            "Model", "Also say which kernels this one's shapes get: a short name, a folder.", "--model", "-m"
        ),
    ] = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    backend: BackendOption = None,
    debug: DebugOption = False,
) -> None:
    """Say which backends this machine has, and which of our GPU kernels proved right and fast on it.

    With --model: which kernels its shapes get and what falls back (on a GPU they are tried if they were
    not), what is unusual in its files, what memory it takes, and how fast it can be here.
    """
    console = Console(highlight=False)
    if model is not None:
        config = find_config(model)
        _kernels(console, config, choose(backend), dtype, quantize)
        with use(backend):
            return _forecast(console, model, config, dtype, quantize)
    about = machine(active())
    console.print(f"device    {about['device']}, {about['system']}", soft_wrap=True)
    console.print(f"MLX       {about['mlx']}, kernels {about['kernels']}", soft_wrap=True)
    console.print("backends")
    for name in BACKENDS:
        mark = ", the default" if name == active() else ""
        console.print(f"  {name:<9} {_state(name)}{mark}", soft_wrap=True)
    found = records()
    if not found:
        console.print("kernels   none of ours was tried on a GPU here; the first start on one does it")
    for record in found:
        console.print()
        console.print(table(record.backend, record.shapes, record.read()))


def _kernels(
    console: Console, config: ModelFacts, backend: str, dtype: str | None, quantize: int | None
) -> None:
    check_options(dtype, quantize)
    if backend in GPU_KERNELS:
        with use(backend):
            kept = kv_dtype(config, dtype=dtype, quantize=quantize)
        shapes = Shapes.of(config, quantize, kept, usual_block_size(backend))
        with console.status("Trying our kernels") as status:
            proofs = proved(
                backend, shapes, Limits.of(backend), lambda part, what: status.update(f"{part:4.0%} {what}")
            )
        return console.print(table(backend, shapes, proofs))
    runs = {"cpu": "our C++ kernel", "ref": "plain MLX", "mlx": "MLX's fast operation"}[backend]
    without = fallen_back(config, backend, dtype=dtype, quantize=quantize)
    made = Table(title=f"{config.model_type} on backend {backend}", title_justify="left")
    for name in ("op", "runs"):
        made.add_column(name, no_wrap=True)
    for op in ops_of(config):
        fell = without.get(op)
        made.add_row(op, Text("plain MLX: no kernel for these arrays", "yellow") if fell else runs)
    console.print(made)


def _forecast(
    console: Console, model: str, config: ModelFacts, dtype: str | None, quantize: int | None
) -> None:
    """What is unusual in the model's files where they are on disk, its memory, its speed."""
    try:
        lines = list(unusual(resolve(model, offline=True))) or ["nothing"]
    except WeightError:
        lines = ["its weights are not on disk, so they were not looked at"]
    plan = plan_memory(model, available=available_memory_bytes(), dtype=dtype, quantize=quantize)
    format = config.quantization.kept if config.quantization else None
    if quantize:
        format = Quantization(quantize, FORMAT.group_size)
    speed = f"not measured: backend {active()!r} is there to be compared with"
    if active() not in ("ref", "metalsim"):
        machine = measure_machine(rounds=3, format=format)
        speed = roofs(machine, predict(config, machine, quantize=format, prompt=plan.context, answer=1))
    told = [("unusual", *lines), ("memory", heading(plan), verdict(plan)[0]), ("speed", speed)]
    for name, *rows in told:
        for row, text in enumerate(rows):
            console.print(f"{'' if row else name:<9} {text}", soft_wrap=True)


def _state(name: str) -> str:
    try:
        choose(name)
    except ConfigError as error:
        return str(error)
    return "there"


def table(backend: str, shapes: Shapes, proofs: Mapping[str, Proof]) -> Table:
    """What was found for one backend and model: a row for each op and shape, and what "auto" makes of it."""
    kernels = choose_kernels(backend, proofs, "auto", False, dense=shapes.dense)
    made = Table(title=_title(backend, shapes), title_justify="left", caption=kernels.line)
    made.caption_justify = "left"
    for name in ("op", "shape"):
        made.add_column(name, no_wrap=True)
    for name in ("ours, us", "MLX, us", "ratio"):
        made.add_column(name, justify="right", no_wrap=True)
    for name in ("right?", "runs"):
        made.add_column(name, no_wrap=True)
    made.add_column("why")
    for op, proof in proofs.items():
        is_ours = op in (kernels.ours or ())
        for i, row in enumerate(_rows(proof)):
            runs = Text("ours" if is_ours else "MLX's", "green" if is_ours else "yellow")
            first = (op, "no" if proof.wrong else "yes", runs, kernels.why[op]) if not i else ("", "", "", "")
            made.add_row(first[0], *row, *first[1:])
        made.add_section()
    return made


def _title(backend: str, shapes: Shapes) -> str:
    weights = f"{shapes.bits} bits in groups of {shapes.group_size}" if shapes.bits else "not quantized"
    return (
        f"{backend}: hidden {shapes.hidden}, heads {shapes.heads}/{shapes.kv_heads} x {shapes.head_dim}, "
        f"MLP {shapes.intermediate}, vocabulary {shapes.vocab:,}, {weights}, {shapes.dtype}"
        f"{', pages of int8' if shapes.int8_pages else ''}"
    )


def _rows(proof: Proof) -> Iterator[tuple[str, str, str, str]]:
    """Shape, ours, MLX's, and our speed as a share of MLX's; one row of nothing where nothing was timed."""
    for timing in proof.timings:
        yield timing.shape, f"{timing.ours_us:,.1f}", f"{timing.mlx_us:,.1f}", f"{timing.ratio:.2f}x"
    if not proof.timings:
        yield "", "", "", ""


LARGE_NORM = 10.0
"""Norm weights beyond it were trained on purpose, and small errors before them become large ones behind."""


def unusual(folder: Path) -> Iterator[str]:
    """A line for each thing that may surprise whoever runs the model of a folder or a GGUF file.

    Reads vectors only. Raises ConfigError or WeightError for what cannot be used at all.
    """
    model = open_checkpoint(folder)
    config, tokenizer = model.config, model.tokenizer
    name, most = largest_norm(folder)
    if most > LARGE_NORM:
        yield f"norm weights up to {most:,.4g} ({name}): differences before that norm show large behind it."
    scaling = config.rope_scaling if isinstance(config, ModelConfig) else None
    trained = scaling.original_max_position_embeddings if scaling else 0
    if scaling and trained and trained < config.max_position_embeddings:
        yield (
            f"a context of {config.max_position_embeddings:,} tokens, trained on {trained:,}: "
            f"positions are stretched ({scaling.kind})."
        )
    if not tokenizer.has_chat_template:
        yield "no chat template: chats need one; generate and completions do not."
    if not any(token < config.vocab_size for token in model.end_ids):
        yield "no end token: answers end at max_tokens, or at a stop string."
    if tokenizer.vocab_size > config.vocab_size:
        more = tokenizer.vocab_size - config.vocab_size
        yield f"{more:,} tokens of the tokenizer are beyond the model's {config.vocab_size:,}."


def largest_norm(folder: Path) -> tuple[str, float]:
    """The norm with the largest weight, and that; ("", 0) where no tensor is called one."""
    stored = tensors_at(folder)
    norms = sorted(name for name, tensor in stored.items() if "norm" in name and len(tensor.shape) == 1)
    most = "", 0.0
    with ExitStack() as stack:
        paths = {stored[name].path for name in norms}
        files = {path: stack.enter_context(path.open("rb", buffering=0)) for path in paths}
        pieces = (Piece(files[stored[name].path], stored[name]) for name in norms)
        for name, weight in zip(norms, read_ahead(pieces), strict=True):
            largest = mx.abs(weight.astype(mx.float32)).max().item()
            assert isinstance(largest, float)
            most = max(most, (name, largest), key=lambda found: found[1])
    return most


OPS = ("linear", "paged_attention", "rms_norm", "rope", "swiglu", "argmax", "sample")
"""Those of backend "cpu" that have kernels."""
VOCAB = 1024  # a larger head would take longer, and is the same kernel's


class _OneLayer(DummyCheckpoint):
    """Random weights in one layer of a model's shapes."""

    def __init__(self, config: ModelConfig) -> None:
        experts = config.experts and replace(config.experts, layers=frozenset({0}))
        self.config = replace(
            config,
            num_layers=1,
            experts=experts,
            vocab_size=min(config.vocab_size, VOCAB),
            max_position_embeddings=min(config.max_position_embeddings, 64),
        )


def ops_of(config: ModelFacts) -> list[str]:
    """Which of OPS a model runs, and which it has in their place."""
    if not isinstance(config, ModelConfig):
        return list(OPS)
    others = {
        "rms_norm": "layer_norm" if config.norm == "layer" else "rms_norm",
        "rope": "" if config.learned_positions else "rope",
        "swiglu": "swiglu" if config.mlp == "swiglu" else "gelu",
    }
    return [name for op in OPS if (name := others.get(op, op))] + ["experts"] * (config.experts is not None)


def fallen_back(
    config: ModelFacts, backend: str, *, dtype: str | None, quantize: int | None
) -> Mapping[str, int]:
    """How often each op had no kernel, from prompt to drawn tokens. Raises ConfigError for a plug-in's."""
    if not isinstance(config, ModelConfig):
        raise ConfigError(
            f"{config.model_type!r} is a plug-in's architecture: give it to bench, which runs it."
        )
    before = fallbacks().read()
    with LLM(_OneLayer(config), backend=backend, dtype=dtype, quantize=quantize, kv_memory=2**26) as llm:
        for temperature in (0.0, 0.8):
            params = SamplingParams(max_tokens=3, temperature=temperature, top_p=0.9, seed=1, ignore_eos=True)
            llm.generate([[1] * 20, [2] * 3], params)
    return {op: count - before.get(op, 0) for op, count in fallbacks().read().items()}
