"""Owns the answer to "will it fit?": a model, a context and a batch against a machine's memory. Chapter 0.2.

Needs a model's config only, never its weights or a network. Refuses to know how an answer is shown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tiny_llm.config import ModelFacts, Quantization
from tiny_llm.engine.settings import BLOCK_SIZE
from tiny_llm.errors import RequestError
from tiny_llm.memory import kept_bytes
from tiny_llm.models.footprint import (
    Training,
    activation_bytes,
    held_tokens,
    kv_token_bytes,
    parameter_count,
    training_bytes,
    weights_bytes,
)
from tiny_llm.models.loading import QUANTIZE_GROUP, check_options, kv_dtype, weight_dtype
from tiny_llm.models.registry import find, load_config, read_config
from tiny_llm.ops.backend import active
from tiny_llm.ops.kv_pool import KvFormat
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.weights.hub import resolve
from tiny_llm.weights.names import config_of, short_names

MAX_BATCH = 1_000_000
PROGRAM_BYTES = 90 * 10**6
"""Python, MLX and what they import: what is held with a model of 278 MB, less those."""
HUGE_PAGE = 2**21


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that serving ``batch`` sequences of ``context`` tokens takes.

    ``program`` is what is there without a model, and what the pool's whole pages take beside what lies in
    them. ``buffers`` are what MLX may keep of finished steps of other sizes, beside what the next one takes.
    """

    weights: int
    kv: int
    activations: int
    program: int
    buffers: int

    @property
    def total(self) -> int:
        """What such sequences take at their peak."""
        return self.weights + self.kv + self.activations + self.program

    @property
    def most(self) -> int:
        """What they take after requests of many lengths."""
        return self.total + self.buffers


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a model needs, beside ``available`` bytes of memory, and how far those reach.

    ``largest_context`` is with ``batch``, ``largest_batch`` with ``context``; 0: not even one.
    """

    model: str
    parameters: int
    bits: int | None
    weight_dtype: str
    kv_dtype: str
    context: int
    batch: int
    kv_token: int
    need: Need
    training: Training
    available: int
    largest_context: int
    largest_batch: int

    @property
    def fits(self) -> bool:
        """Whether it can be served here."""
        return self.need.most <= self.available


def serving_need(
    config: ModelFacts, weights: int, kv_token: int, buffers: int, context: int, batch: int
) -> Need:
    """Bytes for ``batch`` sequences of ``context`` tokens: whole blocks of keys and values, one step."""
    scheduler = SchedulerSettings()
    held = held_tokens(config, context, scheduler.max_num_batched_tokens)
    kv = batch * -(-held // BLOCK_SIZE) * BLOCK_SIZE * kv_token
    step = min(scheduler.max_num_batched_tokens, batch * context)
    # What the system gives an array of the pool at a time: one of keys and one of values a layer, at least.
    pages = 2 * config.num_layers * (HUGE_PAGE if active() == "cpu" and sys.platform == "linux" else 1)
    activations = activation_bytes(config, step, min(batch, scheduler.max_num_seqs))
    return Need(weights, kv, activations, PROGRAM_BYTES + -kv % pages, buffers)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number from 1 to ``most`` that ``fits``; 0 if 1 does not.

    What fits goes on fitting when there is less of it, so halving the range finds it.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def plan_memory(
    model: str,
    *,
    available: int,
    dtype: str | None = None,
    quantize: int | None = None,
    context: int | None = None,
    batch: int = 1,
    kept: str = "auto",
) -> MemoryPlan:
    """Plan for ``available`` bytes, on the backend in use. ``context`` None is 4,096, or the model's if less.
    ``kept`` is what keys and values are, as in ``loading.kv_dtype``.

    Raises ConfigError for a model or an option that is unknown, RequestError for a number out of range.
    """
    check_options(dtype, quantize, kept=kept)
    config = find_config(model)
    limit = config.max_position_embeddings
    context = min(4096, limit) if context is None else context
    for name, value, most in (("context", context, limit), ("batch", batch, MAX_BATCH)):
        if not 1 <= value <= most:
            raise RequestError(f"{name} is {value}, but for {model} must be from 1 to {most:,}.")
    weight = weight_dtype(config, dtype=dtype, quantize=quantize)
    pages = KvFormat.of(config, BLOCK_SIZE, kv_dtype(config, dtype=dtype, quantize=quantize, kept=kept))
    kv_token = kv_token_bytes(config, pages.dtype.size) + pages.scale_bytes
    packed = active() == "cpu" and find(config.model_type).packed
    format = None if quantize is None else Quantization(quantize, QUANTIZE_GROUP)
    weights = weights_bytes(config, weight.size, 4 if packed else weight.size, format)
    need = partial(serving_need, config, weights, kv_token, kept_bytes(available))
    return MemoryPlan(
        model=model,
        parameters=parameter_count(config),
        bits=quantize or (config.quantization.bits if config.quantization else None),
        weight_dtype=str(weight).removeprefix("mlx.core."),
        kv_dtype=str(pages.dtype).removeprefix("mlx.core."),
        context=context,
        batch=batch,
        kv_token=kv_token,
        need=need(context, batch),
        training=training_bytes(config, batch * context),
        available=available,
        largest_context=largest(lambda n: need(n, batch).most <= available, limit),
        largest_batch=largest(lambda n: need(context, n).most <= available, MAX_BATCH),
    )


def find_config(model: str) -> ModelFacts:
    """The config of a short name, of a bundled model, of a folder, of a config.json, or of a model on disk.

    Never asks the network. Raises ConfigError or WeightError where there is none.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return load_config(path)
    names = {row.repo_id.lower(): name for name, row in short_names().items()}
    name = names.get(model.lower(), model.lower())
    if name in short_names() and not path.is_dir():
        return read_config(config_of(name))
    return load_config(resolve(model, offline=True))
