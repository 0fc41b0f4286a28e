"""Owns POST /v1/completions, and what chats share with it: choices under one head, and their usage."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from math import nan

from tiny_llm.data import Chunk, Completion
from tiny_llm.server.answers import new_id, usage
from tiny_llm.server.bodies import StreamOptions
from tiny_llm.server.events import ResponseWriter, event_of, events_around
from tiny_llm.server.jobs import Job
from tiny_llm.server.logprobs import LogprobWriter
from tiny_llm.server.params import prompts_job
from tiny_llm.server.service import Service
from tiny_llm.server.text_bodies import CompletionBody
from tiny_llm.tokenizer.places import TokenPlaces


class ChoiceWriter(ResponseWriter):
    """A response of choices. ``kind`` is what it is called; its id begins with ``prefix``."""

    def __init__(
        self, service: Service, options: StreamOptions | None, job: Job, *, kind: str, prefix: str
    ) -> None:
        self._options = options or StreamOptions()
        self._read = [len(prompt) for prompt in job.prompts for _ in range(job.params.n)]
        self._made = [0] * len(self._read)
        self._quick: dict[int, Callable[[str], bytes]] = {}  # of answers that began: only their text changes
        self._head = {
            "id": new_id(prefix),
            "object": kind,
            "created": int(time.time()),
            "model": service.settings.name,
        }

    def whole(self, answers: Sequence[Sequence[Chunk]], ended: Sequence[Completion]) -> dict[str, object]:
        """The response of a request that is not streamed."""
        choices = [self._whole_choice(index, chunks, ended[index]) for index, chunks in enumerate(answers)]
        return {**self._head, "choices": choices, "usage": usage(ended)}

    def events(self, index: int, chunk: Chunk) -> bytes:
        """What a chunk is told by; where only the text has grown, quickly."""
        self._made[index] += len(chunk.token_ids)
        is_first = index not in self._quick
        if is_first:
            self._quick[index] = events_around(partial(self._text_event, index))
        told = self._told(index, chunk, is_first)
        if not isinstance(told, str):
            return b"".join([event_of(self._event(index, choice)) for choice in told])
        if self._options.continuous_usage_stats and told:
            return event_of(self._text_event(index, told))
        return self._quick[index](told) if told else b""

    def closing(self, ended: Sequence[Completion]) -> bytes:
        """The usage, where it was asked for."""
        if not self._options.include_usage:
            return b""
        return event_of({**self._head, "choices": [], "usage": usage(ended)})

    @abstractmethod
    def _whole_choice(self, index: int, chunks: Sequence[Chunk], ended: Completion) -> dict[str, object]:
        """An answer that is complete."""

    @abstractmethod
    def _text_choice(self, index: int, text: str) -> dict[str, object]:
        """How it is told that an answer has grown by ``text``, and by nothing else."""

    @abstractmethod
    def _told(self, index: int, chunk: Chunk, is_first: bool) -> str | list[dict[str, object]]:
        """What a chunk is told by: the text that its answer has only grown by, or choices, an event each."""

    def _text_event(self, index: int, text: str) -> dict[str, object]:
        return self._event(index, self._text_choice(index, text))

    def _event(self, index: int, choice: dict[str, object]) -> dict[str, object]:
        return {**self._head, "choices": [choice], **self._usage_so_far(index)}

    def _usage_so_far(self, index: int) -> dict[str, object]:
        """What an event of answer ``index`` has beside its choice."""
        if not self._options.continuous_usage_stats:
            return {"usage": None} if self._options.include_usage else {}
        read, made = self._read[index], self._made[index]
        return {"usage": {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}}


DEFAULT_TOKENS = 16  # as OpenAI has it


def completion(service: Service, body: CompletionBody, key_salt: str) -> tuple[Job, CompletionWriter]:
    """What a request asks of the engine, and who writes the response."""
    most = DEFAULT_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    job = prompts_job(service.llm, body, key_salt, most)
    if body.echo:
        params = replace(job.params, prompt_logprobs=body.logprobs)
        job = job._replace(params=params, only_prompt=body.max_tokens == 0)
    return job, CompletionWriter(service, body, job)


class CompletionWriter(ChoiceWriter):
    """/v1/completions' words."""

    asked_by = "prompt"

    def __init__(self, service: Service, body: CompletionBody, job: Job) -> None:
        super().__init__(service, body.stream_options, job, kind="text_completion", prefix="cmpl")
        self._tokenizer = service.llm.tokenizer
        self._body = body
        self._logprobs = LogprobWriter(self._tokenizer, body.logprobs or 0)
        self._job = job
        decode = partial(self._tokenizer.decode, skip_special_tokens=False)
        echoed = body.prompt if body.echo else ()
        self._echoes = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in echoed]
        self._places = cache(self._places_of)

    def _whole_choice(self, index: int, chunks: Sequence[Chunk], ended: Completion) -> dict[str, object]:
        text = self._before(index) + "".join(chunk.text for chunk in chunks)
        rows = [row for chunk in chunks for row in self._rows(index, chunk)]
        return self._choice(index, text, rows, ended)

    def _text_choice(self, index: int, text: str) -> dict[str, object]:
        return self._choice(index, text, [], None)

    def _told(self, index: int, chunk: Chunk, is_first: bool) -> str | list[dict[str, object]]:
        text = self._before(index) + chunk.text if is_first else chunk.text
        if chunk.completion is None and not chunk.logprobs and chunk.prompt_logprobs is None:
            return text
        return [self._choice(index, text, self._rows(index, chunk), chunk.completion)]

    def _choice(
        self, index: int, text: str, rows: Sequence[dict[int, float]], ended: Completion | None
    ) -> dict[str, object]:
        told = None
        if self._body.logprobs is not None:
            told = self._logprobs.completion(rows, self._places(index))
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
