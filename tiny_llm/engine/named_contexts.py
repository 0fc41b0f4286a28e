"""Owns ``LLM.contexts``: contexts as whoever uses the library sees them. Knows no pool and no step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tiny_llm.data import Completion
from tiny_llm.engine.contexts import Context, NewContext
from tiny_llm.engine.engine import Engine
from tiny_llm.engine.prompts import Prompt
from tiny_llm.sampling_params import SamplingParams


class ContextInfo(NamedTuple):
    """A context's size, in tokens and bytes, and its use; the seconds that are left of its time, if any.

    ``is_ready`` is whether all of it is computed and kept.
    """

    name: str
    tokens: int
    bytes: int
    hits: int
    left_s: float | None
    is_ready: bool


@dataclass(frozen=True, slots=True, eq=False)
class NamedContexts:
    """``llm.contexts.add("handbook", text)``, then ``llm.generate(prompt, contexts=["handbook"])``.

    Engine and stream are the LLM's.
    """

    _engine: Engine
    _stream: Callable[..., Iterator[object]]

    def add(self, name: str, text: Prompt | Completion, *, ttl_s: float | None = None) -> ContextInfo:
        """Compute a text, or token ids, and keep it: for ``ttl_s`` seconds, or until it is removed.

        Of a completion, the prompt and the answer are kept. What is in the pool already is not computed
        again. Raises RequestError for a name that another text has, CapacityError where there is no room.
        """
        if isinstance(text, Completion):
            text = text.prompt_token_ids + text.token_ids
        for _ in self._stream(text, SamplingParams(max_tokens=1), context=NewContext(name, ttl_s)):
            pass
        return self[name]

    def remove(self, name: str) -> None:
        """Let go of one. Raises RequestError for a name that there is not."""
        self._engine.contexts.remove(name)

    def __getitem__(self, name: str) -> ContextInfo:
        return info(self._engine, self._engine.contexts.find(name))

    def __iter__(self) -> Iterator[ContextInfo]:
        return iter(listed(self._engine))

    def __len__(self) -> int:
        return len(listed(self._engine))


def listed(engine: Engine, salt: str = "") -> Sequence[ContextInfo]:
    """What there is of a salt, the oldest first."""
    return [info(engine, one) for one in engine.contexts.listed(salt)]


def info(engine: Engine, context: Context) -> ContextInfo:
    """What is told of one."""
    blocks = engine.scheduler.blocks.blocks_for(len(context.token_ids))
    left = context.expires_s - engine.now()
    return ContextInfo(
        context.name,
        len(context.token_ids),
        blocks * engine.block_bytes,
        context.hits,
        None if left == float("inf") else max(0.0, left),
        engine.contexts.is_ready(context),
    )
