"""Owns what a request asks of the engine, and what comes of it: the chunks of all its answers, one stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import NamedTuple

from tiny_llm.data import Chunk, Completion
from tiny_llm.decoding.grammar import Grammar
from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.contexts import Joining
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.server.problems import Problem

ChunkStream = AsyncGenerator[list[tuple[int, Chunk]], None]
"""A job's chunks, whatever has come meanwhile at a time, each with the number of its answer, counted over all
prompts of the request."""


class Job(NamedTuple):
    """What a request asks of the engine: the same of each of its prompts.

    ``grammar`` is what the answers must match; it is compiled, into a constraint of ``params``, when the job
    begins. ``only_prompt``: of the answers nothing is wanted, so of their one token nothing is told.
    """

    prompts: Sequence[list[int]]
    params: SamplingParams
    priority: int = 0
    salt: str = ""
    grammar: Grammar | None = None
    only_prompt: bool = False
    keep: bool = True
    joining: Joining | None = None


async def chunks_of(engine: AsyncLLM, job: Job) -> ChunkStream:
    """The chunks of all answers as they come: those of prompt i have the indices from i * n on.

    Raises Problem for an answer that ended by a fault or too late.
    """
    n, begun = job.params.n, False
    shown = _ShownLogprobs()
    options = {"priority": job.priority, "salt": job.salt, "keep": job.keep, "joining": job.joining}
    streams = engine.streams(job.prompts, job.params, **options)
    async with aclosing(streams):
        async for came in streams:
            chunks: list[tuple[int, Chunk]] = []
            for number, chunk in came:
                problem = failure_of(chunk.completion, begun) if chunk.completion is not None else None
                if problem is not None:
                    if chunks:  # what came before it is told before it
                        yield chunks
                    raise problem
                if job.only_prompt:
                    chunk = _without_answer(chunk)
                index = number * n + chunk.index
                if chunk.logprobs is not None:
                    chunk.logprobs = shown.take(index, chunk.logprobs, chunk.shown_tokens)
                chunks.append((index, chunk))
            yield chunks
            begun = True


def _without_answer(chunk: Chunk) -> Chunk:
    """What a chunk says of the prompt alone."""
    ended = chunk.completion
    if ended is not None:
        ended = replace(ended, text="", token_ids=[], finish_reason="length", logprobs=None, shown_tokens=0)
    return Chunk("", (), ended, chunk.index, prompt_logprobs=chunk.prompt_logprobs)


class _ShownLogprobs:
    """Holds log-probabilities back until the text has their tokens: the two agree, as OpenAI's do.

    Those of a stop string and of the token that ends an answer never come: the text lacks them too.
    """

    def __init__(self) -> None:
        self._held: dict[int, list[dict[int, float]]] = defaultdict(list)
        self._told: dict[int, int] = defaultdict(int)

    def take(self, index: int, rows: list[dict[int, float]], shown_tokens: int) -> list[dict[int, float]]:
        """Add ``rows`` of an answer whose text has ``shown_tokens`` tokens now; return what is due."""
        held = [*self._held[index], *rows]
        due = max(0, shown_tokens - self._told[index])
        self._held[index] = held[due:]
        self._told[index] += due
        return held[:due]


def failure_of(ended: Completion, begun: bool) -> Problem | None:
    """An answer that ended by a fault or too late has no text that a client should take for one."""
    match ended.finish_reason:
        case "error":
            return Problem(500, ended.error or "The request failed.", code="generation_failed")
        case "timeout":
            where = "took too long" if begun else "waited too long"
            return Problem(503, f"The request {where}.", code="timeout")
        case "cancelled":
            return Problem(503, "The request was cancelled.", code="cancelled")
        case _:
            return None
