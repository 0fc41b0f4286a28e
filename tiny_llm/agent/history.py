"""Owns what a model is told of a run: the task, its steps, and in place of the oldest what receipts say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

FULL, AFTER = 0.75, 0.5
"""Shares of a model's room: above the first, steps are put into short form until the second is kept."""


@dataclass(frozen=True, slots=True)
class RunStep:
    """One turn: the ``action``, or None where what was ``said`` was none, and what came of it.

    ``brief`` is a line that its receipt backs; ``hint`` is what the user said next.
    """

    action: Mapping[str, Any] | None
    said: str
    shown: str
    brief: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class RunHistory:
    """A run as a model reads it. The first ``short`` steps are told by their receipts alone."""

    task: str
    steps: Sequence[RunStep] = field(default=())
    short: int = 0

    def with_step(self, step: RunStep) -> RunHistory:
        """One more step."""
        return replace(self, steps=(*self.steps, step))

    def with_hint(self, hint: str) -> RunHistory:
        """The user's ``hint``, behind what there is so far."""
        if not self.steps:
            return replace(self, task=f"{self.task}\n\n{hint}")
        return replace(self, steps=(*self.steps[:-1], replace(self.steps[-1], hint=hint)))

    @property
    def summary(self) -> str:
        """The steps in short form; "" if there are none."""
        if not self.short:
            return ""
        told = [f"{step.brief}\n{step.hint}".rstrip() for step in self.steps[: self.short]]
        return "\n".join(["Done so far, from the log:", *told])

    def fitted(self, size: Callable[[RunHistory], int], room: int) -> RunHistory:
        """The same within ``room`` tokens, if that can be: the last step stays whole."""
        if size(self) <= FULL * room:
            return self
        short = self
        while short.short < len(self.steps) - 1 and size(short) > AFTER * room:
            short = replace(short, short=short.short + 1)
        return short
