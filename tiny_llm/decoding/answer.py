"""Owns what one answer remembers while it grows; all of it can be copied at any token.

The tokens themselves are the sequence's, which the scheduler writes: an answer reads them. Knows no
model, no step and no clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection
from copy import copy
from dataclasses import dataclass, field, replace

from tiny_llm.data import Sequence
from tiny_llm.decoding.pooling import Pool
from tiny_llm.decoding.stop import StopChecker
from tiny_llm.sampling.penalties import History, changes_logits, looks_back
from tiny_llm.sampling_params import BeamParams, Constraint, PoolingParams, SamplingParams
from tiny_llm.tokenizer.detokenizer import StreamDetokenizer

Logprobs = dict[int, float]  # {token id: log-probability}: the chosen token first, then the likeliest


@dataclass(slots=True, eq=False)
class Answer:
    """Answer ``index`` to a request, made in sequence ``seq_id``. ``params`` has its own seed.

    ``tokens`` are the prompt's ``prompt_len`` and, as far as they have been committed, the answer's.
    ``form`` keeps its place in the form that the answer must have. ``plain``: nothing changes its logits
    before a token is drawn. ``needs_last_token``: what the newest token is changes the next logits, so that
    nothing can be drawn ahead of it. Its last token stands at ``last_position``, if nothing ends it sooner.
    ``prompt_logprobs`` are by position. A beam has a ``score``, and in each step so many
    ``candidates`` for its next token; others have none. A text's vector is gathered in its ``pool``.
    ``last_s``: when its newest token came. ``ended``: nothing is drawn for it any more.
    """

    request_id: int
    seq_id: int
    index: int
    params: SamplingParams
    prompt_len: int
    tokens: array[int]
    checker: StopChecker
    history: History
    form: Constraint | None = None
    plain: bool = False
    needs_last_token: bool = False
    last_position: int = -1
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: dict[int, Logprobs] = field(default_factory=dict)
    error: str | None = None
    last_s: float = 0.0
    ended: bool = False
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    candidates: int = 0
    score: float = 0.0
    pool: Pool | None = None

    @classmethod
    def begun(
        cls,
        index: int,
        seq_id: int,
        sequence: Sequence,
        params: SamplingParams,
        detokenizer: StreamDetokenizer,
        end_ids: Collection[int],
    ) -> Answer:
        """An answer without tokens, to ``sequence``, which has its request's id; ``params`` is its own."""
        repeats = params.repetition_penalty != 1
        custom = bool(params.processors) or params.constraint is not None
        ends, candidates = {*params.stop_token_ids, *end_ids}, 0
        if isinstance(params, BeamParams):  # as many without an end token among the beams' as there are beams
            candidates = params.width * max(2, 1 + len(ends))
        return cls(
            request_id=sequence.id,
            seq_id=seq_id,
            index=index,
            params=params,
            prompt_len=sequence.prompt_len,
            tokens=sequence.tokens,
            checker=StopChecker(detokenizer, params, end_ids),
            history=History(prompt=frozenset(sequence.tokens) if repeats else frozenset(), end_ids=ends),
            form=params.constraint() if params.constraint else None,
            plain=not (custom or changes_logits(params, answered=0)),
            needs_last_token=custom or looks_back(params) or candidates > 0,
            last_position=sequence.prompt_len + params.max_tokens - 1,
            candidates=candidates,
            pool=Pool(params, sequence.prompt_len) if isinstance(params, PoolingParams) else None,
        )

    @property
    def token_ids(self) -> list[int]:
        """The answer's own tokens, as far as they have been committed."""
        return self.tokens[self.prompt_len :].tolist()

    def push(self, token: int, logprobs: Logprobs | None) -> str:
        """Take the next token in; return the text that may now be shown."""
        if self.needs_last_token:  # else no penalty looks at it
            self.history.answer[token] += 1
        if logprobs is not None:
            self.logprobs.append(logprobs)
        piece = self.checker.push(token)
        self.ended = self.checker.finish_reason is not None
        return piece

    def copy(self, index: int, seq_id: int) -> Answer:
        """One that has come as far, and goes its own way from here, in sequence ``seq_id``."""
        return replace(
            self,
            index=index,
            seq_id=seq_id,
            tokens=self.tokens[:],
            checker=self.checker.copy(),
            history=self.history.copy(),
            form=copy(self.form),
            logprobs=self.logprobs.copy(),
        )
