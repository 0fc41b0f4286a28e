"""Owns what ``bench`` measures: a model, random prompts of one length, greedy answers, how fast they came.

The figures are of making tokens, not of text. Refuses to know other programs: benchmarks/ compares.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice, pairwise
from typing import Literal

import mlx.core as mx

from tiny_llm.data import Batch, KVCache
from tiny_llm.decoding.generate import PREFILL_CHUNK, generate, prefill
from tiny_llm.engine.memory import peak_memory_bytes
from tiny_llm.engine.rounds import Trial, interleave, seconds_of
from tiny_llm.errors import RequestError
from tiny_llm.kv.dense import DenseCache
from tiny_llm.models.loading import kv_dtype, load_dummy, load_model
from tiny_llm.models.registry import Model
from tiny_llm.ops.backend import isa, num_threads, set_threads, use
from tiny_llm.sampling.sampler import sample
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.weights.hub import resolve

GREEDY = SamplingParams()
WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Task:
    """What to measure. ``load_format`` "dummy" is random weights in the shapes of a short name.

    Each of ``rounds`` answers ``batch`` prompts of ``prompt_tokens`` with ``new_tokens`` each.
    Raises RequestError for a number that is too small.
    """

    model: str
    load_format: Literal["auto", "dummy"] = "auto"
    quantize: int | None = None
    dtype: str | None = None
    activations: str = "int8"
    prompt_tokens: int = 512
    new_tokens: int = 64
    batch: int = 1
    rounds: int = 3

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("batch", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} is {getattr(self, name)}, but must be at least {least}.")


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second over all sequences, and the seconds until each of them has its first token."""

    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float


def bench(
    task: Task, *, backend: str | None = None, threads: int | None = None, offline: bool = False
) -> dict[str, object]:
    """Load the model, measure, and return the task, the machine's side of it and the figures in one row."""
    set_threads(threads)
    with use(backend) as chosen:
        began = time.perf_counter()
        model = _load(task, offline)
        loaded = time.perf_counter() - began
        speed = measure(model, task)
        return {
            **asdict(task),
            "backend": chosen,
            "isa": isa(),
            "threads": num_threads(),
            "load_s": round(loaded, 3),
            "prefill_tok_s": round(speed.prefill_tok_s, 2),
            "decode_tok_s": round(speed.decode_tok_s, 2),
            "ttft_s": round(speed.ttft_s, 4),
            "peak_memory_bytes": peak_memory_bytes(),
        }


def _load(task: Task, offline: bool) -> Model:
    dtype, quantize, activations = task.dtype, task.quantize, task.activations
    if task.load_format == "dummy":
        return load_dummy(task.model, dtype=dtype, quantize=quantize, activations=activations)
    folder = resolve(task.model, offline=offline)
    return load_model(folder, dtype=dtype, quantize=quantize, activations=activations)


def measure(model: Model, task: Task) -> Speed:
    """The medians of ``task.rounds``, after a short round that only warms up; on the backend in use.

    Raises RequestError if prompt and answer are longer than the model's context.
    """
    tokens, context = task.prompt_tokens + task.new_tokens, model.config.max_position_embeddings
    if tokens > context:
        raise RequestError(
            f"Prompt and answer are {tokens} tokens, the context of {task.model} is {context}."
        )
    chance = random.Random(0)
    vocab = model.config.vocab_size
    prompts = [[chance.randrange(vocab) for _ in range(task.prompt_tokens)] for _ in range(task.batch)]
    kept = kv_dtype(model.config, dtype=task.dtype, quantize=task.quantize)
    interleave(_trials(model, [prompt[:WARM_UP_TOKENS] for prompt in prompts], 2, kept), 1, pause=0)
    rates = interleave(_trials(model, prompts, task.new_tokens, kept), task.rounds, pause=0)
    first, later = rates["first",].median, rates["later",].median
    return Speed(first, later, task.batch * task.prompt_tokens / first)


def _trials(
    model: Model, prompts: Sequence[Sequence[int]], new_tokens: int, kept: mx.Dtype | None
) -> list[Trial]:
    """A round is two turns: prompts up to the first tokens, then all the others."""
    under_way: list[Iterator[object]] = []

    def first() -> float:
        steps = _one(model, prompts[0], kept) if len(prompts) == 1 else _together(model, prompts, kept)
        under_way[:] = [steps]
        return seconds_of(lambda: next(steps))

    def later() -> float:
        return seconds_of(lambda: list(islice(under_way[0], new_tokens - 1)))

    read, made = len(prompts) * len(prompts[0]), len(prompts) * (new_tokens - 1)
    return [Trial(("first",), read, first), Trial(("later",), made, later)]


def _one(model: Model, prompt: Sequence[int], kept: mx.Dtype | None) -> Iterator[object]:
    return generate(model, DenseCache(model.config.num_layers, kept), prompt, GREEDY)


def _together(model: Model, prompts: Sequence[Sequence[int]], kept: mx.Dtype | None) -> Iterator[object]:
    """Prompts one after the other, then a flat batch of all sequences a step."""
    size, start = len(prompts), len(prompts[0])
    caches = [DenseCache(model.config.num_layers, kept) for _ in prompts]
    logits = [prefill(model, kv, prompt, PREFILL_CHUNK) for kv, prompt in zip(caches, prompts, strict=True)]
    tokens = sample(mx.concatenate(logits), [GREEDY] * size, [start] * size)
    for position in count(start):
        mx.eval(tokens)
        yield tokens
        positions, rows = mx.full(size, position, mx.int32), mx.arange(size)
        batch = Batch(tokens.astype(mx.int32), positions, tuple(range(size + 1)), rows)
        tokens = sample(model(batch, Separate(caches)), [GREEDY] * size, [position + 1] * size)


class Separate:
    """A cache of its own for each sequence of a batch. Satisfies ``data.KVCache``."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self._caches = caches

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array, batch: Batch) -> mx.array:
        """Return [T, H, D]: each sequence's rows attend through its own cache."""
        outs = []
        for kv, (start, end) in zip(self._caches, pairwise(batch.query_start_loc), strict=True):
            rows = slice(start, end)
            alone = Batch(batch.tokens[rows], batch.positions[rows], (0, end - start), batch.logit_rows)
            outs.append(kv.attend(layer, q[rows], k[rows], v[rows], alone))
        return mx.concatenate(outs)
