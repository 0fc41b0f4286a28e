"""Owns a step's way from logits to tokens: one flat list says which row is whose, and about which position.

A row that is about a token of the prompt is scored, any other is drawn from, all in one call; what goes
wrong with a row stays in its row. ``draw`` starts it and ``Drawing.decisions`` waits for it: between
the two the next step can be prepared, with tokens that nobody has seen.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import mlx.core as mx

from tiny_llm.data import GUESS, Plan
from tiny_llm.decoding.answer import Answer, Logprobs
from tiny_llm.decoding.structured_output import GrammarConstraint
from tiny_llm.sampling.allowed import keep_allowed
from tiny_llm.sampling.logprobs import Reported, named, reported
from tiny_llm.sampling.penalties import History, changes_logits, penalize
from tiny_llm.sampling.sampler import sample

NOT_FINITE = "The model's logits are not finite: the weights or the precision cannot carry this prompt."
NOTHING_LEFT = (
    "No token may come next: the answer's form, logit_bias, min_tokens or a processor bans every one. "
    "(A form that is complete allows only the end, which min_tokens forbids.)"
)
Sharing = Callable[[int], Sequence[Answer]]  # (a sequence's id) -> the answers that it computes for
Lap = Callable[[str], None]  # told the name of each part of a step when it is done


_NO_GUESSES = array("i")


class Row(NamedTuple):
    """Row ``row`` of a step's logits, about the token at ``position`` of an answer's sequence.

    It counts only if the ``guesses``, which stand between the answer's tokens and this one, are right.
    """

    row: int
    answer: Answer
    position: int
    guesses: array[int] = _NO_GUESSES

    @property
    def is_drawn(self) -> bool:
        """Whether its token is to be drawn, and not one of the prompt's, which are known."""
        return self.position >= self.answer.prompt_len

    @property
    def answered(self) -> int:
        """Tokens of the answer before this one, those included that are still being drawn."""
        return self.position - self.answer.prompt_len

    @property
    def token_ids(self) -> list[int]:
        """The answer's tokens before this one, as far as they have been committed, and the guesses."""
        return self.answer.token_ids + self.guesses.tolist()

    @property
    def history(self) -> History:
        """What penalties look at."""
        if not self.guesses:
            return self.answer.history
        history = self.answer.history.copy()
        history.answer.update(self.guesses)
        return history


class Decision(NamedTuple):
    """What a row's answer gets: a token and its log-probabilities, or an error.

    A beam gets its candidates for the next token instead: ``logprobs``, the likeliest first.
    """

    row: Row
    token: int
    logprobs: Logprobs | None
    error: str | None


def rows_of(plan: Plan, sharing: Sharing) -> list[Row]:
    """Every row of logits that ``plan`` asks for, in order.

    ``sharing(sequence's id)`` are the answers that it computes for: several while they all begin from one
    prompt, whose last row each of them draws from.
    """
    rows: list[Row] = []
    first = 0
    for item in plan.items:
        if not item.logit_rows:
            continue
        answers = sharing(item.seq_id)
        guessed = len(item.tokens) - item.logit_rows + 1
        position = item.start + guessed
        is_draft = item.logit_rows > 1 and position >= answers[0].prompt_len
        for index in range(first, first + item.logit_rows):
            if position < answers[0].prompt_len:
                rows.append(Row(index, answers[0], position))
            else:
                guesses = item.tokens[guessed : guessed + index - first] if is_draft else _NO_GUESSES
                rows += [Row(index, answer, position, guesses) for answer in answers]
            position += 1
        first += item.logit_rows
    return rows


def with_guesses(plan: Plan, guesses: Sequence[array[int]]) -> Plan:
    """``plan`` with other guesses, one array for each of its decodes."""
    items = [
        item._replace(tokens=item.tokens[:1] + own, logit_rows=1 + len(own))
        for item, own in zip(plan.items, guesses, strict=False)
    ]
    drafted = sum(map(len, guesses))
    return replace(plan, items=items + plan.items[plan.decodes :], drafted=drafted)


def within_forms(plan: Plan, sharing: Sharing) -> Plan:
    """``plan`` without guesses that an answer's form forbids, nor those behind them."""
    if not plan.drafted:
        return plan
    guesses = []
    for item in plan.items[: plan.decodes]:
        answer, own = sharing(item.seq_id)[0], item.tokens[1:]
        if own and own[0] != GUESS and isinstance(answer.form, GrammarConstraint):
            own = own[: answer.form.count_allowed(answer.token_ids, own.tolist())]
        guesses.append(own)
    return with_guesses(plan, guesses)


def by_sequence(plan: Plan, decisions: Iterable[Decision]) -> list[tuple[int, list[Decision]]]:
    """For each item with logit rows its sequence's id, and the decisions on its rows, in order.

    None on one in the middle of a prompt; left out are those on answers that ended while the step ran, and
    those that count on a guess which was wrong.
    """
    found: list[tuple[int, list[Decision]]] = []
    owner: list[list[Decision]] = []  # of each row of logits
    for item in plan.items:
        if item.logit_rows:
            own: list[Decision] = []
            found.append((item.seq_id, own))
            owner += [own] * item.logit_rows
    for decision in decisions:
        own = owner[decision.row.row]
        if not decision.row.answer.ended and _guessed_right(own, decision.row):
            own.append(decision)
    return found


def _guessed_right(before: Sequence[Decision], row: Row) -> bool:
    """Whether the row's guesses are what was drawn ``before`` it, in the same step."""
    if not row.guesses:
        return True
    last = before[-1] if before else None
    return last is not None and last.row.position == row.position - 1 and last.token == row.guesses[-1]


class _Report(NamedTuple):
    """Log-probabilities on their way: of ``rows``, each of which wants ``counts`` of the likeliest."""

    rows: Sequence[Row]
    counts: Sequence[int]
    tokens: mx.array
    arrays: Reported

    def read(self) -> list[Logprobs]:
        """One for each row."""
        tokens = cast(list[int], self.tokens.tolist())
        chosen, ids, values = (cast(list[list[float]], array.tolist()) for array in self.arrays)
        return [
            named(token, cast(float, chosen[n]), cast(list[int], ids[n][:count]), values[n][:count])
            for n, (token, count) in enumerate(zip(tokens, self.counts, strict=True))
        ]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A step's rows on their way to tokens. ``tokens`` uint32 [len(rows)] may be used before they are known.

    ``rows`` are those that are drawn from. ``finite`` is whether the model gave a number for the token;
    ``allowed`` whether it may be taken.
    """

    rows: list[Row]
    tokens: mx.array
    finite: mx.array
    allowed: mx.array
    errors: list[str | None]
    reports: list[_Report]

    def arrays(self) -> list[mx.array]:
        """All that is being computed."""
        told = (array for report in self.reports for array in report.arrays)
        return [self.tokens, self.finite, self.allowed, *told]

    def decisions(self, lap: Lap) -> list[Decision]:
        """Wait for the tokens, the step's one synchronisation; what is scored goes to its answers."""
        mx.eval(*self.arrays())
        lap("forward")  # and the drawing itself, which is a part of the same evaluation
        told: dict[int, Logprobs] = {}
        for report in self.reports:
            for row, logprobs in zip(report.rows, report.read(), strict=True):
                if row.is_drawn:
                    told[id(row)] = logprobs
                else:
                    row.answer.prompt_logprobs[row.position] = logprobs
        tokens = cast(list[int], self.tokens.tolist())
        finite = cast(list[bool], self.finite.tolist())
        allowed = cast(list[bool], self.allowed.tolist())
        decisions = []
        for n, row in enumerate(self.rows):
            error = self.errors[n]
            if error is None and not finite[n]:
                error = NOT_FINITE
            elif error is None and not allowed[n]:
                error = NOTHING_LEFT
            decisions.append(Decision(row, tokens[n], told.get(id(row)), error))
        lap("sample")
        return decisions


def draw(logits: mx.array, rows: Sequence[Row], lap: Lap) -> Drawing:
    """Start drawing a token for each of ``rows`` that is not scored, from logits [R, V]."""
    drawn = [row for row in rows if row.is_drawn]
    errors: list[str | None] = [None] * len(drawn)
    own = _taken(logits, drawn)
    scores = changed(own, drawn, errors)
    tokens = sample(scores, [row.answer.params for row in drawn], [row.position for row in drawn])
    # A NaN or an infinity among a row's logits is what gets drawn, so not all need be looked at.
    finite = mx.isfinite(_at(own, tokens))
    allowed = finite if scores is own else _at(scores, tokens) > -mx.inf
    wanted = [None if row.answer.candidates else row.answer.params.logprobs for row in drawn]
    candidates = [
        max(row.answer.candidates, row.answer.params.logprobs or 0) if row.answer.candidates else None
        for row in drawn
    ]
    reports = [*_told(own, drawn, tokens, wanted), *_told(scores, drawn, tokens, candidates)]
    if scored := [row for row in rows if not row.is_drawn]:
        known = mx.array([row.answer.tokens[row.position] for row in scored], mx.uint32)
        counts = [row.answer.params.prompt_logprobs or 0 for row in scored]
        reports += _told(_taken(logits, scored), scored, known, counts)
    drawing = Drawing(drawn, tokens, finite, allowed, errors, reports)
    lap("sample")
    mx.async_eval(*drawing.arrays())  # type: ignore[no-untyped-call]  # MLX's stubs lack its types
    lap("forward")  # MLX lets a CPU be a few operations behind, and waits for the others
    return drawing


def _told(
    logits: mx.array, rows: Sequence[Row], tokens: mx.array, wanted: Sequence[int | None]
) -> list[_Report]:
    """What is to be reported of the rows that want a number of the likeliest tokens: one report, or none."""
    asked = [n for n, count in enumerate(wanted) if count is not None]
    if not asked:
        return []
    if len(asked) < len(rows):
        at = mx.array(asked)
        logits, tokens = logits[at], tokens[at]
    counts = [wanted[n] or 0 for n in asked]
    return [_Report([rows[n] for n in asked], counts, tokens, reported(logits, tokens, max(counts)))]


def _taken(logits: mx.array, rows: Sequence[Row]) -> mx.array:
    """The logits of ``rows``: a copy only where they are not simply all of them."""
    at = [row.row for row in rows]
    if at == list(range(logits.shape[0])):
        return logits
    return logits[mx.array(at, mx.int32)]


def _at(values: mx.array, tokens: mx.array) -> mx.array:
    return mx.take_along_axis(values, tokens[:, None], axis=-1)[:, 0]


def changed(logits: mx.array, rows: Sequence[Row], errors: list[str | None]) -> mx.array:
    """Logits [R, V] as the R ``rows`` draw from them, their answers' penalties, processors and forms heeded.

    A row's fault goes to its place in ``errors``.
    """
    if all(row.answer.plain for row in rows):
        return logits
    penalized = [
        (n, row.answer.params, row.history, row.answered)
        for n, row in enumerate(rows)
        if changes_logits(row.answer.params, row.answered)
    ]
    if penalized:
        logits = penalize(logits, penalized)
    if any(row.answer.params.processors for row in rows):
        logits = mx.stack([_processed(logits[n], row, errors, n) for n, row in enumerate(rows)])
    if any(row.answer.form for row in rows):
        mx.async_eval(logits)  # type: ignore[no-untyped-call]  # the model runs while forms are asked
        vocab = logits.shape[-1]
        allowed = [_allowed(row, errors, n, vocab) for n, row in enumerate(rows)]
        logits = keep_allowed(logits, allowed)
    return logits


def _allowed(row: Row, errors: list[str | None], number: int, vocab: int) -> bytes | None:
    """The tokens that the answer's form can go on with; None for all of them.

    A form may be the caller's code: a mask that does not fit is that request's fault, not the step's.
    """
    form = row.answer.form
    if form is None or errors[number] is not None:
        return None
    try:
        # What is only guessed does not move the answer's own form; one that forbids a guess fails here, in a
        # row that does not count.
        mask = (copy(form) if row.guesses else form)(row.token_ids)
        if not isinstance(mask, bytes) or len(mask) != vocab:
            raise TypeError(f"expected {vocab} bytes, got {mask!r:.60}")
        return mask
    except Exception as error:
        errors[number] = f"The answer's form failed: {type(error).__name__}: {error}"
        return None


def _processed(logits: mx.array, row: Row, errors: list[str | None], number: int) -> mx.array:
    """The row after its processors. They are the caller's code: what they raise is that request's fault."""
    scores = logits.astype(mx.float32)
    if not row.answer.params.processors:
        return scores
    tokens = row.answer.tokens.tolist() + row.guesses.tolist()
    try:
        for processor in row.answer.params.processors:
            given = processor(list(tokens), scores)
            if not isinstance(given, mx.array) or given.shape != logits.shape:
                raise TypeError(f"expected an mx.array of shape {logits.shape}, got {given!r:.60}")
            scores = given.astype(mx.float32)
        mx.eval(scores)
    except Exception as error:
        errors[number] = f"A logits processor failed: {type(error).__name__}: {error}"
        return logits.astype(mx.float32)
    return scores
