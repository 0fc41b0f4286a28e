"""Owns the requests that wait or run, and what becomes of a step's tokens: chunks, ends, beams.

What ends here ends in the scheduler too. Knows no model and no clock: it is told the time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from math import isfinite
from typing import NamedTuple

from tiny_llm.data import Advance, Chunk, Completion, EndReason, Output, Plan
from tiny_llm.data import Sequence as TokenSequence
from tiny_llm.decoding.answer import Answer
from tiny_llm.decoding.decide import NOT_FINITE, Decision, by_sequence
from tiny_llm.decoding.pooling import PooledRows
from tiny_llm.engine.contexts import Context, Contexts, JoinedPrompt
from tiny_llm.engine.request import Request
from tiny_llm.engine.stats import EngineStats
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.tokenizer.tokenizer import Tokenizer


class Event(NamedTuple):
    """A chunk of an answer, and whose."""

    request_id: int
    chunk: Chunk


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

    def add(self, sequence: TokenSequence, params: SamplingParams, prompt: JoinedPrompt) -> None:
        """Take a request in. Raises what ``Scheduler.add`` does."""
        request = Request.of(sequence, params, self._tokenizer, self._end_ids, self._numbers)
        request.contexts, request.pin = prompt.contexts, prompt.pin and prompt.pin[0]
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
