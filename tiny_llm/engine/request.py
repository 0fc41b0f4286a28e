"""Owns what the engine knows of a request: its answers, how many are under way, its figures."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import cast

from tiny_llm.data import Chunk, Completion, EndReason, Sequence, Timing
from tiny_llm.decoding.answer import Answer, Logprobs
from tiny_llm.decoding.beam import BeamSearch
from tiny_llm.engine.contexts import Context
from tiny_llm.sampling_params import BeamParams, SamplingParams
from tiny_llm.tokenizer.tokenizer import Tokenizer

_NEXT_SEED = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: far from the next request's seed


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and its answers, of which ``left`` have not ended. Times are the engine's, in seconds.

    With a ``search``, its beams are the ``answers``. Rows of ``contexts`` stand in its prompt; what is
    pinned of that has the number ``pin``.
    """

    id: int
    arrival: float
    prompt_len: int
    answers: list[Answer] = field(default_factory=list)
    left: int = 0
    started_s: float = 0.0
    first_token_s: float = 0.0
    cached_tokens: int = 0
    search: BeamSearch | None = None
    contexts: Collection[Context] = ()
    pin: int | None = None

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        params: SamplingParams,
        tokenizer: Tokenizer,
        end_ids: Collection[int],
        numbers: Iterator[int],
    ) -> Request:
        """A request with ``params.n`` answers to ``sequence``'s prompt, of at most ``params.max_tokens``.

        The first answer is made in ``sequence``; each other one will be in one of the next of ``numbers``,
        and draws by a seed that follows from that of ``params``.
        """
        request = cls(sequence.id, sequence.arrival, sequence.prompt_len, left=params.n)
        detokenizer = tokenizer.stream(sequence.tokens)
        is_search = isinstance(params, BeamParams)
        for index in range(1 if is_search else params.n):
            own = replace(params, seed=(cast(int, params.seed) + index * _NEXT_SEED) % 2**64)
            seq_id = next(numbers) if index else sequence.id
            request.answers.append(Answer.begun(index, seq_id, sequence, own, detokenizer.copy(), end_ids))
        if is_search:
            request.search = BeamSearch(request.answers[0])
        return request

    def drawing(self, answer: Answer) -> list[Answer]:
        """The answers that draw from the rows of ``answer``'s sequence: from the prompt's last, all."""
        begins = answer.index == 0 and not answer.checker.num_tokens
        return self.answers if begins else [answer]

    def chunk(self, answer: Answer, token: int, logprobs: Logprobs | None, now: float) -> Chunk:
        """Give an answer its next token; return what is to be told of it, but for its end."""
        self.first_token_s = self.first_token_s or now
        answer.last_s = now
        text = answer.push(token, logprobs)
        scored = self._scored(answer) if answer.checker.num_tokens == 1 else None
        told = None if logprobs is None else [logprobs]
        shown = answer.checker.shown_tokens
        return Chunk(text, (token,), None, answer.index, told, scored, shown_tokens=shown)

    def whole(self, answer: Answer, ended: Completion) -> Chunk:
        """All of an answer that ended, none of which has been told."""
        tokens, shown = tuple(ended.token_ids), ended.shown_tokens
        scored = self._scored(answer)
        return Chunk(ended.text, tokens, ended, ended.index, ended.logprobs, scored, shown_tokens=shown)

    def _scored(self, answer: Answer) -> list[Logprobs] | None:
        """What was asked of the prompt's tokens."""
        if answer.params.prompt_logprobs is None:
            return None
        known = self.answers[0].prompt_logprobs
        return [known[position] for position in range(1, self.prompt_len)]

    def completion(self, answer: Answer, reason: EndReason, now: float) -> Completion:
        """The whole answer, all of whose tokens have been committed."""
        tokens = answer.token_ids
        ttft = (self.first_token_s or now) - self.arrival
        later = answer.last_s - self.first_token_s if tokens else 0.0
        return Completion(
            text=answer.checker.text,
            token_ids=tokens,
            finish_reason=reason,
            prompt_token_ids=answer.tokens[: self.prompt_len].tolist(),
            logprobs=answer.logprobs if answer.params.logprobs is not None else None,
            timing=Timing(
                prompt_tokens=self.prompt_len,
                completion_tokens=len(tokens),
                ttft_s=ttft,
                prefill_tok_s=self.prompt_len / ttft if ttft > 0 else 0.0,
                decode_tok_s=(len(tokens) - 1) / later if later > 0 else 0.0,
            ),
            index=answer.index,
            cached_tokens=self.cached_tokens,
            error=answer.error,
            shown_tokens=answer.checker.shown_tokens,
            drafted_tokens=answer.drafted_tokens,
            accepted_tokens=answer.accepted_tokens,
            score=answer.score if self.search else None,
            stop_string=answer.checker.stop_string,
            embedding=None if answer.pool is None else answer.pool.vector(),
        )
