"""Owns the requests that wait or run: their answers and figures, and what becomes of a step's tokens.

What ends here ends in the scheduler too. Knows no model and no clock: it is told the time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from math import isfinite
from typing import NamedTuple, cast

from tiny_llm.data import Advance, Chunk, Completion, EndReason, Output, Plan, Timing
from tiny_llm.data import Sequence as TokenSequence
from tiny_llm.decoding.answer import Answer, Logprobs
from tiny_llm.decoding.beam import BeamSearch
from tiny_llm.decoding.decide import NOT_FINITE, Decision, by_sequence
from tiny_llm.decoding.pooling import PooledRows
from tiny_llm.engine.contexts import Context, Contexts
from tiny_llm.engine.stats import EngineStats
from tiny_llm.sampling_params import BeamParams
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.tokenizer.tokenizer import Tokenizer

_NEXT_SEED = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: far from the next request's seed


class Event(NamedTuple):
    """A chunk of an answer, and whose."""

    request_id: int
    chunk: Chunk


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
        cls, sequence: TokenSequence, tokenizer: Tokenizer, end_ids: Collection[int], numbers: Iterator[int]
    ) -> Request:
        """A request with as many answers to ``sequence``'s prompt as its params say.

        The first answer is made in ``sequence``; each other one will be in one of the next of ``numbers``,
        and draws by a seed that follows from the params'.
        """
        params = sequence.params
        request = cls(sequence.id, sequence.arrival, sequence.prompt_len, left=params.n)
        request.pin = sequence.pin and sequence.pin[0]
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


@dataclass(slots=True, eq=False, repr=False)
class OpenRequests:
    """Requests by number, and their answers by sequence; an answer that has ended is in neither."""

    _scheduler: Scheduler
    _contexts: Contexts
    _totals: EngineStats
    _tokenizer: Tokenizer
    _end_ids: Collection[int]
    _requests: dict[int, Request] = field(default_factory=dict)
    _answers: dict[int, Answer] = field(default_factory=dict)  # by sequence
    _numbers: Iterator[int] = field(default_factory=partial(count, 1))  # a request has its first sequence's

    def __len__(self) -> int:
        return len(self._requests)

    def number(self) -> int:
        """The next request's, and its first sequence's."""
        return next(self._numbers)

    def add(self, sequence: TokenSequence, contexts: Collection[Context]) -> None:
        """Take a request in. Raises what ``Scheduler.add`` does."""
        request = Request.of(sequence, self._tokenizer, self._end_ids, self._numbers)
        request.contexts = contexts
        self._scheduler.add(sequence)
        self._requests[request.id] = request
        self._answers |= {answer.seq_id: answer for answer in request.answers}

    def of(self, seq_id: int) -> Request:
        """The request that a sequence is of."""
        return self._requests[self._answers[seq_id].request_id]

    def answers(self, request_id: int) -> Sequence[Answer]:
        """Those of a request that have not ended; none of one that is not open."""
        return self._requests[request_id].answers if request_id in self._requests else []

    def users(self, context: Context) -> list[Answer]:
        """The first answer of each request that a context stands in."""
        return [one.answers[0] for one in self._requests.values() if context in one.contexts]

    def drawing(self, seq_id: int) -> list[Answer]:
        """The answers that draw from a sequence's rows."""
        return self.of(seq_id).drawing(self._answers[seq_id])

    def commit(self, plan: Plan, decisions: Sequence[Decision], now: float) -> list[Event]:
        """Give each answer its token, and the scheduler what comes of it; forget what has ended."""
        chunks: dict[int, Chunk] = {}  # by sequence
        for decision in decisions if plan.drafted else ():
            decision.row.answer.drafted_tokens += len(decision.row.guesses) > 0
        events: list[Event] = []
        advances, searching = list[Advance](), dict[int, Request]()
        for seq_id, own in by_sequence(plan, decisions):
            parts: dict[int, Advance] = {}  # by answer
            for decision in own:
                answer = decision.row.answer
                request = self._requests[answer.request_id]
                if request.search is not None:
                    request.search.take(decision)
                    searching[request.id] = request
                elif not answer.ended:  # else by a token before this one
                    begun = parts.get(answer.seq_id, Advance(answer.seq_id, ()))
                    parts[answer.seq_id] = self._take(decision, begun, now, chunks)
                    answer.accepted_tokens += len(decision.row.guesses) > 0
            # Of several answers that begin from one prompt, all but the first become forks of its sequence.
            first, *forks = parts.values() or (Advance(seq_id, ()),)
            advances.append(first._replace(forks=tuple(forks)))
        of_beams = [advance for own in searching.values() for advance in self._search(own, now, events)]
        for sequence in self._scheduler.commit(plan, advances, of_beams):
            answer = self._answers[sequence.id]
            answer.tokens = sequence.tokens  # a fork's are its own from here on
            chunk = chunks.get(sequence.id)
            if chunk is None:  # in the middle of its prompt, or a beam
                continue
            if sequence.finish_reason is not None:
                chunk.completion = self._end(answer, sequence.finish_reason, now)
            events.append(Event(answer.request_id, chunk))
        return events

    def embedded(self, pooled: Iterable[PooledRows], now: float) -> list[Event]:
        """The texts that have been read to their ends are over: their vectors are there."""
        events: list[Event] = []
        for one in pooled:
            if one.pool.is_whole:
                error = None if all(map(isfinite, one.pool.vector())) else NOT_FINITE
                output = self._scheduler.cancel(one.seq_id, "error" if error else "stop")
                events += self.ended([output], now, error)
        return events

    def ended(self, outputs: Sequence[Output | None], now: float, error: str | None = None) -> list[Event]:
        """The chunks of sequences that the scheduler ended. One that had not begun ends all its answers."""
        events: list[Event] = []
        for output in outputs:
            if output is None or output.seq_id not in self._answers:  # a beam, ended with its search
                continue
            request = self.of(output.seq_id)
            if request.search is not None:
                request.search.error = error
                events += self._end_search(request, output.finish_reason, now)
                continue
            for answer in self.drawing(output.seq_id):
                answer.error = error
                completion = self._end(answer, output.finish_reason, now)
                chunk = Chunk("", (), completion, answer.index, shown_tokens=completion.shown_tokens)
                events.append(Event(answer.request_id, chunk))
        return events

    def _take(self, decision: Decision, begun: Advance, now: float, chunks: dict[int, Chunk]) -> Advance:
        """One token more for one answer, or its end by an error of its own; ``chunks`` has what to tell."""
        answer = decision.row.answer
        request = self._requests[answer.request_id]
        if decision.error is not None:
            answer.error, answer.ended = decision.error, True
            shown = answer.checker.shown_tokens
            chunks.setdefault(answer.seq_id, Chunk("", index=answer.index, shown_tokens=shown))
            return begun._replace(finish_reason="error")
        self._totals.count_token(answer, request.arrival, now)
        chunk = request.chunk(answer, decision.token, decision.logprobs, now)
        if answer.seq_id in chunks:
            chunk = chunks[answer.seq_id].followed_by(chunk)
        chunks[answer.seq_id] = chunk
        return begun._replace(
            tokens=(*begun.tokens, decision.token), finish_reason=answer.checker.finish_reason
        )

    def _search(self, request: Request, now: float, events: list[Event]) -> list[Advance]:
        """Let a request's beams go on, if all are ready; those left behind give their blocks back at once."""
        search, before = request.search, request.answers
        assert search is not None
        if not search.is_ready and search.error is None:
            return []
        for beam in before:
            self._totals.count_token(beam, request.arrival, now)
            beam.last_s = now
        request.first_token_s = request.first_token_s or now
        advances = search.advance(self._numbers) if search.error is None else []
        if search.is_over:
            events += self._end_search(request, "error" if search.error else None, now)
            return []
        alive = {advance.seq_id for advance in advances}
        self._leave(beam for beam in before if beam.seq_id not in alive)
        request.answers = search.beams
        self._answers |= {beam.seq_id: beam for beam in search.beams}
        return advances

    def _leave(self, beams: Iterable[Answer]) -> None:
        """Forget beams, and free their blocks."""
        for beam in beams:
            self._scheduler.cancel(beam.seq_id)
            del self._answers[beam.seq_id]

    def _end_search(self, request: Request, reason: EndReason | None, now: float) -> list[Event]:
        """A search is over, or ended by something else: its answers are what has been found."""
        self._leave(request.answers)
        assert request.search is not None
        ended = []
        for answer in request.search.answers():
            completion = self._end(answer, reason or answer.checker.finish_reason or "stop", now)
            ended.append(Event(request.id, request.whole(answer, completion)))
        return ended

    def _end(self, answer: Answer, reason: EndReason, now: float) -> Completion:
        """Forget an answer, and its request with the last one; return the whole of it."""
        self._totals.ends[reason] += 1
        answer.ended = True
        self._answers.pop(answer.seq_id, None)  # one that a search has found is in no sequence
        request = self._requests[answer.request_id]
        request.left -= 1
        if not request.left:
            del self._requests[request.id]
            self._contexts.leave(request.contexts)
            if request.pin is not None:
                self._contexts.settle(request.pin)
        return request.completion(answer, reason, now)
