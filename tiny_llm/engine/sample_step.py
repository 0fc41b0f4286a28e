"""Owns a step's way from logits to tokens: one call for all rows; a fault stays in its row.

``begin`` says what is to be drawn and starts it; ``Drawing.end`` waits for it. Between the two the
next step can be prepared, with tokens that nobody has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import mlx.core as mx

from tiny_llm.engine.request import Choice
from tiny_llm.engine.stats import StepClock
from tiny_llm.sampling.allowed import keep_allowed
from tiny_llm.sampling.logprobs import Reported, named, reported
from tiny_llm.sampling.penalties import changes_logits, penalize
from tiny_llm.sampling.sampler import sample

NOT_FINITE = "The model's logits are not finite: the weights or the precision cannot carry this prompt."


class Drawn(NamedTuple):
    """What a row got: a token and its log-probabilities, or an error."""

    token: int
    logprobs: dict[int, float] | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Drawing:
    """Rows of which tokens are being drawn. ``tokens`` uint32 [R] may be used before they are known."""

    choices: Sequence[Choice]
    tokens: mx.array
    finite: mx.array
    asked: list[int]
    report: Sequence[mx.array]
    errors: list[str | None]

    def end(self, clock: StepClock) -> list[Drawn]:
        """Wait for the tokens. The step's one synchronisation."""
        mx.eval(self.tokens, self.finite, *self.report)
        clock.lap("forward")  # and the drawing itself, which is a part of the same evaluation
        named = _named(self.tokens, self.asked, self.choices, self.report) if self.asked else []
        logprobs = dict(zip(self.asked, named, strict=True))
        ids, good = cast(list[int], self.tokens.tolist()), cast(list[bool], self.finite.tolist())
        drawn = [
            Drawn(token, logprobs.get(row), self.errors[row] or (None if ok else NOT_FINITE))
            for row, (token, ok) in enumerate(zip(ids, good, strict=True))
        ]
        clock.lap("sample")
        return drawn


@dataclass(frozen=True, slots=True)
class Scoring:
    """A part of a prompt: what is reported of the ``targets`` that come from position ``start`` on."""

    choice: Choice
    start: int
    targets: list[int]
    report: Reported

    @classmethod
    def of(cls, logits: mx.array, choice: Choice, position: int) -> Scoring:
        """Rows [n, V] of the prompt's tokens from ``position`` on; the last one's successor is no prompt."""
        start = position + 1
        targets = choice.request.prompt[start : start + logits.shape[0]]
        rows, tokens = logits[: len(targets)], mx.array(targets, mx.uint32)
        return cls(choice, start, targets, reported(rows, tokens, choice.params.prompt_logprobs or 0))

    def keep(self) -> None:
        """Give the request what has been computed."""
        chosen, ids, values = (cast(list[list[float]], array.tolist()) for array in self.report)
        for i, target in enumerate(self.targets):
            told = named(target, cast(float, chosen[i]), cast(list[int], ids[i]), values[i])
            self.choice.request.prompt_logprobs[self.start + i] = told


def begin(logits: mx.array, choices: Sequence[Choice], ahead: int, clock: StepClock) -> Drawing:
    """Start drawing a token for each choice from its row of logits [R, V].

    ``ahead`` counts tokens of each answer that have been drawn and are not known yet.
    """
    errors: list[str | None] = [None] * len(choices)
    scores = _changed(logits, choices, errors)
    positions = [len(c.request.prompt) + len(c.answer.token_ids) + ahead for c in choices]
    tokens = sample(scores, [c.params for c in choices], positions)
    # A NaN or an infinity among a row's logits is what gets drawn, so not all need be looked at.
    finite = mx.isfinite(mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0])
    asked = [row for row, choice in enumerate(choices) if choice.params.logprobs is not None]
    report = _report(logits, tokens, asked, choices) if asked else ()
    clock.lap("sample")
    mx.async_eval(tokens, finite, *report)  # type: ignore[no-untyped-call]  # MLX's stubs lack its types
    clock.lap("forward")  # MLX lets a CPU be a few operations behind, and waits for the others
    return Drawing(choices, tokens, finite, asked, report, errors)


def needs_history(choice: Choice) -> bool:
    """Whether this answer's next logits are changed by what the token before them is."""
    answered = len(choice.answer.token_ids) + 1
    return bool(choice.params.processors or choice.constraint) or changes_logits(choice.params, answered)


def _changed(logits: mx.array, choices: Sequence[Choice], errors: list[str | None]) -> mx.array:
    """Penalties for the rows that ask for them, each row's processors, forms; a fault goes to ``errors``."""
    rows = [r for r, c in enumerate(choices) if changes_logits(c.params, len(c.answer.token_ids))]
    if rows:
        own = [choices[r] for r in rows]
        logits = penalize(logits, rows, [c.params for c in own], [c.history for c in own])
    changed = {r: _processed(logits[r], c, errors, r) for r, c in enumerate(choices) if c.params.processors}
    if changed:
        logits = mx.stack([changed[r] if r in changed else logits[r] for r in range(len(choices))])
    if any(choice.constraint for choice in choices):
        mx.async_eval(logits)  # type: ignore[no-untyped-call]  # the model runs while forms are asked
        vocab = logits.shape[-1]
        allowed = [_allowed(choice, errors, row, vocab) for row, choice in enumerate(choices)]
        logits = keep_allowed(logits, allowed)
    return logits


def _allowed(choice: Choice, errors: list[str | None], row: int, vocab: int) -> bytes | None:
    """The tokens that the answer's form can go on with; None for all of them.

    A form may be the caller's code: a mask that does not fit is that request's fault, not the step's.
    """
    if choice.constraint is None or errors[row] is not None:
        return None
    try:
        mask = choice.constraint(choice.answer.token_ids)
        if not isinstance(mask, bytes) or len(mask) != vocab:
            raise TypeError(f"expected {vocab} bytes, got {mask!r:.60}")
        return mask
    except Exception as error:
        errors[row] = f"The answer's form failed: {type(error).__name__}: {error}"
        return None


def _processed(row: mx.array, choice: Choice, errors: list[str | None], number: int) -> mx.array:
    """The row after its processors. They are the caller's code: what they raise is that request's fault."""
    tokens = choice.request.prompt + choice.answer.token_ids
    scores = row.astype(mx.float32)
    try:
        for processor in choice.params.processors:
            given = processor(list(tokens), scores)
            if not isinstance(given, mx.array) or given.shape != row.shape:
                raise TypeError(f"expected an mx.array of shape {row.shape}, got {given!r:.60}")
            scores = given.astype(mx.float32)
        mx.eval(scores)
    except Exception as error:
        errors[number] = f"A logits processor failed: {type(error).__name__}: {error}"
        return row.astype(mx.float32)
    return scores


def _report(logits: mx.array, tokens: mx.array, asked: list[int], choices: Sequence[Choice]) -> Reported:
    """For rows that ask: as many of the likeliest as any of them wants."""
    at, most = mx.array(asked), max(cast(int, choices[row].params.logprobs) for row in asked)
    return reported(logits[at], tokens[at], most)


def _named(
    tokens: mx.array, asked: list[int], choices: Sequence[Choice], report: Sequence[mx.array]
) -> list[dict[int, float]]:
    """{token id: log-probability} a row: the chosen one first, then as many of the best as it asked for."""
    ids = cast(list[int], tokens.tolist())
    chosen, best, values = (cast(list[list[float]], array.tolist()) for array in report)
    few = [cast(int, choices[row].params.logprobs) for row in asked]
    rows = zip(asked, chosen, best, values, few, strict=True)
    return [
        named(ids[row], cast(float, own), cast(list[int], row_ids[:most]), row_values[:most])
        for row, own, row_ids, row_values, most in rows
    ]
