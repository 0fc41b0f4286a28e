"""Owns POST /v1/completions: text on from text, as OpenAI's older interface has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import nan

from fastapi import Request
from fastapi.responses import Response

from tiny_llm.data import Chunk, Completion
from tiny_llm.engine.llm import LLM
from tiny_llm.server.answers import new_id, usage
from tiny_llm.server.events import ResponseWriter, answered, event_of, events_around
from tiny_llm.server.jobs import Job
from tiny_llm.server.logprobs import LogprobWriter
from tiny_llm.server.params import (
    DEFAULT_COMPLETION_TOKENS,
    grammar_of,
    job_of,
    params_of,
    prompt_ids,
    require_model,
    stream_usage,
)
from tiny_llm.server.service import Service, aside
from tiny_llm.server.text_bodies import CompletionBody
from tiny_llm.tokenizer.places import TokenPlaces


async def complete(service: Service, request: Request, body: CompletionBody) -> Response:
    """Answer one request, at once or as a stream."""
    require_model(body.model, service.settings.name)
    job = await aside(request, lambda: _job(service.llm, body, request.state.salt))
    writer = await aside(request, lambda: CompletionWriter(service, body, job))
    return await answered(service, request, job, writer, stream=body.stream)


def _job(llm: LLM, body: CompletionBody, key_salt: str) -> Job:
    grammar = grammar_of(body)
    prompts = prompt_ids(llm, body.prompt)
    most = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    params = params_of(llm, body, prompts, max_tokens=most, logprobs=body.logprobs)
    if body.echo:
        params = replace(params, prompt_logprobs=body.logprobs)
    job = job_of(body, prompts, params, key_salt, grammar)
    return job._replace(only_prompt=body.max_tokens == 0)


class CompletionWriter(ResponseWriter):
    """/v1/completions' words."""

    asked_by = "prompt"

    def __init__(self, service: Service, body: CompletionBody, job: Job) -> None:
        self._tokenizer = service.llm.tokenizer
        self._body = body
        self._logprobs = LogprobWriter(self._tokenizer, body.logprobs or 0)
        self._job = job
        self._echoes = [self._echo(prompt) for prompt in body.prompt] if body.echo else []
        self._places: dict[int, TokenPlaces] = {}  # of answers whose log-probabilities are told
        self._usage = stream_usage(body.stream_options, job)
        self._quick: dict[int, Callable[[str], bytes]] = {}  # of answers that began: only their text changes
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.settings.name,
        }

    def whole(self, answers: Sequence[Sequence[Chunk]], ended: Sequence[Completion]) -> dict[str, object]:
        """The response of a request that is not streamed."""
        choices = []
        for index, (chunks, completion) in enumerate(zip(answers, ended, strict=True)):
            text = self._before(index) + "".join(chunk.text for chunk in chunks)
            rows: list[dict[int, float]] = []
            for chunk in chunks:
                rows += self._rows(index, chunk)
            choices.append(self._choice(index, text, rows, completion))
        return {**self._head, "choices": choices, "usage": usage(ended)}

    def events(self, index: int, chunk: Chunk) -> bytes:
        """One event a chunk that has something to tell."""
        self._usage.take(index, chunk)
        begun = index in self._quick
        is_text_alone = chunk.completion is None and not chunk.logprobs and not self._usage.always
        if begun and is_text_alone:
            return self._quick[index](chunk.text) if chunk.text else b""
        if not begun:
            self._quick[index] = events_around(partial(self._event, index))
        text = chunk.text if begun else self._before(index) + chunk.text
        if not text and not chunk.logprobs and chunk.completion is None:
            return b""
        return event_of(self._event(index, text, self._rows(index, chunk), chunk.completion))

    def closing(self, ended: Sequence[Completion]) -> bytes:
        """The usage, where it was asked for."""
        if not self._usage.at_end:
            return b""
        return event_of({**self._head, "choices": [], "usage": usage(ended)})

    def _event(
        self, index: int, text: str, rows: Sequence[dict[int, float]] = (), ended: Completion | None = None
    ) -> dict[str, object]:
        choice = self._choice(index, text, rows, ended)
        return {**self._head, "choices": [choice], **self._usage.so_far(index)}

    def _choice(
        self, index: int, text: str, rows: Sequence[dict[int, float]], ended: Completion | None
    ) -> dict[str, object]:
        told = None
        if self._body.logprobs is not None:
            places = self._places.get(index) or self._places.setdefault(index, self._places_of(index))
            told = self._logprobs.completion(rows, places)
        reason = None if ended is None else ended.finish_reason
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}

    def _rows(self, index: int, chunk: Chunk) -> list[dict[int, float]]:
        """The log-probabilities that come with a chunk: its own, after the prompt's if it is echoed."""
        rows = list(chunk.logprobs or ())
        if chunk.prompt_logprobs is None:
            return rows
        first = self._job.prompts[index // self._body.n][0]  # how likely it was, nothing tells
        return [{first: nan}, *chunk.prompt_logprobs, *rows]

    def _places_of(self, index: int) -> TokenPlaces:
        """Where in the text the tokens of answer ``index`` begin, those of an echoed prompt first."""
        number = index // self._body.n
        ids = self._job.prompts[number]
        known: list[int] = []
        if self._body.echo:
            prompt = self._body.prompt[number]
            if isinstance(prompt, str):
                known = self._tokenizer.places(prompt, ids)
            else:
                echoed = TokenPlaces(self._tokenizer.stream(skip_special_tokens=False))
                known = [echoed.take(token) for token in ids]
        return TokenPlaces(self._tokenizer.stream(ids), len(self._before(index)), known)

    def _before(self, index: int) -> str:
        """What stands before answer ``index``: its prompt, where that is to be echoed."""
        return self._echoes[index // self._body.n] if self._echoes else ""

    def _echo(self, prompt: str | list[int]) -> str:
        """A prompt as text."""
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(prompt, skip_special_tokens=False)
