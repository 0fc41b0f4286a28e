"""Owns what ``bench`` measures: a model, random prompts of one length, greedy answers, how fast they came.

What runs is the engine that serves. Refuses to know other programs: benchmarks/ compares.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tiny_llm.engine.engine import Engine
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import CapacityError, RequestError
from tiny_llm.limits import MOST
from tiny_llm.memory import peak_memory_bytes
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.ops.backend import isa, num_threads, use
from tiny_llm.options import option
from tiny_llm.planning.fit import fit_steps
from tiny_llm.planning.rounds import Trial, interleave, seconds_of
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.settings import SchedulerSettings

WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Task:
    """What to measure: each of ``rounds`` answers ``batch`` prompts of ``prompt_tokens`` with ``new_tokens``.

    Raises RequestError for a number that is too small or too large.
    """

    load_format: Annotated[
        Literal["auto", "dummy"],
        option("Model", "dummy: random weights in a short name's shapes; no download."),
    ] = "auto"
    prompt_tokens: Annotated[int, option("Work", "Tokens of a prompt; they are random.")] = 512
    new_tokens: Annotated[int, option("Work", "Tokens of an answer.")] = 64
    batch: Annotated[int, option("Work", "Sequences at a time.")] = 1
    rounds: Annotated[int, option("Work", "Of which the median counts.")] = 3

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("batch", 1), ("rounds", 1)):
            if not least <= getattr(self, name) <= MOST:
                raise RequestError(f"{name} is {getattr(self, name)}, but must be from {least} to {MOST}.")


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens a second over all sequences, and the seconds until each of them has its first token."""

    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float


def bench(task: Task, model: str, fit: Path | None = None, **options: Any) -> dict[str, object]:
    """Load ``model``, measure, and return the task, the machine's side of it and the figures in one row.

    ``options`` are those of ``LLM``. Costs of steps, for ``simulate``, go to the file ``fit``.
    """
    asked = {"quantize": None, "dtype": None, "activations": "int8", **options}
    loading = {name: asked[name] for name in ("quantize", "dtype", "activations")}
    asked = {"model": model, "load_format": task.load_format, **loading}
    began = time.perf_counter()
    limits = options.pop("scheduler", SchedulerSettings())
    llm = LLM(
        DummyCheckpoint(model) if task.load_format == "dummy" else model,
        scheduler=replace(limits, max_queued_requests=max(limits.max_queued_requests, task.batch)),
        **options,
    )
    loaded = time.perf_counter() - began
    with llm, use(llm.backend):
        speed = measure(llm, task)
        if fit is not None:
            bits = asked["quantize"] or 16
            told = f"{model}, {bits} bits, on {llm.backend} {isa()}, {num_threads()} threads"
            fit_steps(llm.engine, llm.config, told).save(fit)
        return {
            **asked,
            **asdict(task),
            "backend": llm.backend,
            "isa": isa(),
            "threads": num_threads(),
            "ops_on_ours": ", ".join(llm.kernels.on_ours) or None,
            "same_tokens": llm.kernels.same_tokens,
            "load_s": round(loaded, 3),
            "prefill_tok_s": round(speed.prefill_tok_s, 2),
            "decode_tok_s": round(speed.decode_tok_s, 2),
            "ttft_s": round(speed.ttft_s, 4),
            "peak_memory_bytes": peak_memory_bytes(),
        }


def measure(llm: LLM, task: Task) -> Throughput:
    """The medians of ``task.rounds``, after a short round that only warms up.

    Raises RequestError if prompt and answer are longer than the model's context, CapacityError if the keys
    and values of all do not fit the pool together.
    """
    tokens, settings = task.prompt_tokens + task.new_tokens, llm.engine.settings
    if tokens > llm.max_context:
        raise RequestError(
            f"prompt_tokens and new_tokens are {tokens} together, "
            f"but the model's context is {llm.max_context}."
        )
    blocks = task.batch * -(-tokens // settings.block_size)
    if blocks > settings.kv_blocks:
        raise CapacityError(
            f"{task.batch} sequences of {tokens} tokens take {blocks} blocks, but there is memory for "
            f"{settings.kv_blocks}; give a smaller --batch, or more --kv-memory."
        )
    short = replace(task, prompt_tokens=min(WARM_UP_TOKENS, task.prompt_tokens), new_tokens=2)
    vocab = llm.config.vocab_size
    interleave(_Round(llm.engine, short, vocab).trials(), 1, pause=0)
    rates = interleave(_Round(llm.engine, task, vocab).trials(), task.rounds, pause=0)
    first, later = rates["first",].median, rates["later",].median
    return Throughput(first, later, task.batch * task.prompt_tokens / first)


class _Round:
    """Round after round: prompts that nobody has seen up to their first tokens, then all other tokens."""

    def __init__(self, engine: Engine, task: Task, vocab_size: int) -> None:
        self._engine = engine
        self._task = task
        self._chance = random.Random(task.prompt_tokens)
        self._vocab_size = vocab_size
        self._prompts: Sequence[list[int]] = ()

    def trials(self) -> list[Trial]:
        """A round's two turns."""
        task = self._task
        read, made = task.batch * task.prompt_tokens, task.batch * (task.new_tokens - 1)
        return [Trial(("first",), read, self._first), Trial(("later",), made, self._later)]

    def _first(self) -> float:
        """Seconds until each prompt has its first token. It is the only one: nothing else runs meanwhile."""
        task = self._task
        self._prompts = [
            [self._chance.randrange(self._vocab_size) for _ in range(task.prompt_tokens)]
            for _ in range(task.batch)
        ]
        self._add(1)
        return seconds_of(self._run)

    def _later(self) -> float:
        """Seconds for the tokens after these. The prompts are found in the prefix cache.

        Where not all of them begin in one step, the first have some of their tokens before the clock starts.
        """
        self._add(self._task.new_tokens)
        begun: set[int] = set()
        while len(begun) < self._task.batch:
            begun |= self._step()
        before = self._engine.totals.generation_tokens
        seconds = seconds_of(self._run)
        made = self._engine.totals.generation_tokens - before
        return seconds * self._task.batch * (self._task.new_tokens - 1) / made

    def _add(self, max_tokens: int) -> None:
        for prompt in self._prompts:
            self._engine.add(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, speculate=False))

    def _run(self) -> None:
        while len(self._engine):
            self._step()

    def _step(self) -> set[int]:
        """Whose turn it was. Raises RequestError if one of them failed."""
        events = self._engine.step()
        for _, chunk in events:
            if chunk.completion is not None and chunk.completion.error is not None:
                raise RequestError(chunk.completion.error)
        return {request_id for request_id, _ in events}
