"""Owns what /v1/completions and /v1/chat/completions share: choices under one head, and their usage."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

from tiny_llm.data import Chunk, Completion
from tiny_llm.server.answers import new_id, usage
from tiny_llm.server.bodies import StreamOptions
from tiny_llm.server.events import ResponseWriter, event_of, events_around
from tiny_llm.server.jobs import Job
from tiny_llm.server.service import Service


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
