"""Owns what the engine knows of a request: its answers as they grow, and its figures at the end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import cast

from tiny_llm.data import Chunk, Completion, EndReason, SamplingParams, Timing
from tiny_llm.decoding.stop import Answer
from tiny_llm.sampling.penalties import History
from tiny_llm.sampling_params import Constraint
from tiny_llm.tokenizer.tokenizer import Tokenizer

_NEXT_SEED = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: far from the next request's seed


@dataclass(slots=True, eq=False)
class Choice:
    """One of a request's answers. ``params`` has its own seed."""

    request: Request
    index: int
    params: SamplingParams
    answer: Answer
    history: History
    constraint: Constraint | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)
    error: str | None = None
    last_s: float = 0.0

    def push(self, token: int, logprobs: dict[int, float] | None, now: float) -> Chunk:
        """Take the next token in; the chunk carries the completion if it ends the answer."""
        request = self.request
        request.first_token_s = request.first_token_s or now
        self.last_s = now
        self.history.answer[token] += 1
        if logprobs is not None:
            self.logprobs.append(logprobs)
        piece = self.answer.push(token)
        reason = self.answer.finish_reason
        whole = self.completion(reason, now) if reason else None
        told = None if logprobs is None else [logprobs]
        first = self.params.prompt_logprobs is not None and len(self.answer.token_ids) == 1
        scored = [request.prompt_logprobs[i] for i in range(1, len(request.prompt))] if first else None
        return Chunk(piece, (token,), whole, self.index, told, scored)

    def ended(self, reason: EndReason, now: float, error: str | None = None) -> Chunk:
        """The chunk of an answer that something else ends."""
        self.error = error
        return Chunk("", (), self.completion(reason, now), self.index)

    def completion(self, reason: EndReason, now: float) -> Completion:
        """The whole answer."""
        request, tokens = self.request, self.answer.token_ids
        ttft = (request.first_token_s or now) - request.arrival
        later = self.last_s - request.first_token_s if tokens else 0.0
        return Completion(
            text=self.answer.text,
            token_ids=tokens,
            finish_reason=reason,
            prompt_token_ids=request.prompt,
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            timing=Timing(
                prompt_tokens=len(request.prompt),
                completion_tokens=len(tokens),
                ttft_s=ttft,
                prefill_tok_s=len(request.prompt) / ttft if ttft > 0 else 0.0,
                decode_tok_s=(len(tokens) - 1) / later if later > 0 else 0.0,
            ),
            index=self.index,
            cached_tokens=request.cached_tokens,
            error=self.error,
        )


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and the answers to it. Times are seconds of the engine's clock."""

    id: int
    prompt: list[int]
    arrival: float
    choices: list[Choice] = field(default_factory=list)
    started_s: float = 0.0
    first_token_s: float = 0.0
    cached_tokens: int = 0
    prompt_logprobs: dict[int, dict[int, float]] = field(default_factory=dict)  # by position

    @classmethod
    def of(
        cls,
        request_id: int,
        prompt: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        end_ids: Collection[int],
        limit: int,
        arrival: float,
    ) -> Request:
        """A request with ``params.n`` answers, of ``limit`` tokens each at most; params has a seed."""
        request = cls(request_id, prompt, arrival)
        seen = frozenset(prompt) if params.repetition_penalty != 1 else frozenset()
        banned = {*params.stop_token_ids, *end_ids}
        for index in range(params.n):
            seed = (cast(int, params.seed) + index * _NEXT_SEED) % 2**64
            own = replace(params, seed=seed)
            form = params.constraint() if params.constraint else None
            answer = Answer(tokenizer.stream(), own, end_ids, limit)
            request.choices.append(Choice(request, index, own, answer, History(seen, banned), form))
        return request
