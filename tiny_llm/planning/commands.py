"""Owns ``python main.py memory``: its options, and one call. Nothing is loaded, and no network asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from rich.console import Console

from tiny_llm.config import Quantization
from tiny_llm.errors import RequestError
from tiny_llm.memory import available_memory_bytes, parse_bytes
from tiny_llm.models.loading import weight_dtype
from tiny_llm.ops.backend import active, use
from tiny_llm.options import (
    BackendOption,
    DebugOption,
    DtypeOption,
    JsonOption,
    KvDtypeOption,
    ModelOption,
    QuantizeOption,
    command_app,
    option,
)
from tiny_llm.planning.memory import find_config, plan_memory
from tiny_llm.planning.memory_report import as_json, as_svg, roofs, show
from tiny_llm.planning.speed import FORMAT, measure_machine, predict, traffic, traffic_lines

app = command_app()


@app.command()
def memory(
    model: ModelOption = "demo",
    context: Annotated[int | None, option("Work", "Tokens of prompt and answer together.")] = None,
    batch: Annotated[int, option("Work", "Sequences at a time.")] = 1,
    ranks: Annotated[int, option("Work", "Processes that share it: also say what travels between them.")] = 1,
    memory: Annotated[
        str | None, option("Work", "What there is, such as 16GB; by default what is free.")
    ] = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    kv_dtype: KvDtypeOption = "auto",
    backend: BackendOption = None,
    svg: Annotated[Path | None, option("Output", "Also draw it, into this file.")] = None,
    speed: Annotated[
        bool, option("Output", "Also measure this machine, and say what it allows.", "--speed")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say how much memory a model takes, and how far this machine's reaches; nothing is loaded.

    --model may also be a config.json.
    """
    free = available_memory_bytes() if memory is None else parse_bytes(memory, "--memory")
    with use(backend):
        plan = plan_memory(
            model, available=free, dtype=dtype, quantize=quantize, context=context, batch=batch, kept=kv_dtype
        )
        if speed and quantize is None:
            raise RequestError("--speed measures quantized matrices; give --quantize 4 or 8.")
        machine = measure_machine() if speed else None
        config = find_config(model)
        stored = weight_dtype(config, dtype=dtype, quantize=quantize)
        item = 4 if active() == "cpu" else stored.size  # which computes in float32 whatever they are
    if json:
        print(as_json(plan))
    else:
        show(plan, Console())
    if ranks > 1:
        lines = traffic_lines(traffic(config, ranks, batch, item))
        print("\n".join(lines), file=sys.stderr if json else sys.stdout)
    if machine is not None and quantize is not None:
        format = Quantization(quantize, FORMAT.group_size)
        size = {"prompt": plan.context, "answer": 1, "batch": batch}
        print(roofs(machine, predict(config, machine, quantize=format, **size)))
    if svg is not None:
        svg.write_text(as_svg(plan), encoding="utf-8")
