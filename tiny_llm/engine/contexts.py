"""Owns named contexts: texts that are computed once, kept, and put before prompts by name.

``exact``: one after the other, each computed after those before it, so that nothing differs from one long
prompt; what is computed so is kept as well. ``independent``: each computed by itself and turned to its place,
in any order at no cost; an approximation, since none has seen the others (Gim et al. 2024, Prompt Cache; Hu
et al. 2024, EPIC). Knows no text and no arrays: it says what is pinned in the pool, and what is joined of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import Literal, NamedTuple, get_args

from tiny_llm.data import Completion, MovedPart
from tiny_llm.errors import CapacityError, RequestError
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.scheduler import Scheduler

Joined = Literal["exact", "independent"]
_SHARE = 2  # at most one in so many blocks is pinned
_MOST_NAME = 128  # characters


class NewContext(NamedTuple):
    """A prompt is to be kept as ``name``, for ``ttl_s`` seconds, or until it is removed."""

    name: str
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Joining:
    """The contexts ``names`` stand before token ``at`` of a prompt, in this order, joined ``how``.

    Of each the first ``recompute`` tokens are computed anew all the same where they are independent: they
    see what stands before them (Hu et al. 2024).
    """

    names: Sequence[str]
    how: Joined = "exact"
    recompute: int = 0
    at: int = 0

    def __post_init__(self) -> None:
        names = self.names
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise RequestError("contexts must be a list of names.", param="contexts")
        if self.how not in get_args(Joined):
            what = f"join is {self.how!r}, but must be one of {', '.join(get_args(Joined))}."
            raise RequestError(what, param="join")
        if not isinstance(self.recompute, int) or self.recompute < 0:
            raise RequestError(
                f"recompute is {self.recompute!r}, but must be a number of tokens.", param="recompute"
            )


@dataclass(slots=True, eq=False)
class Context:
    """A text that is kept. ``hits`` counts the prompts that it stood before; times are the engine's.

    ``number`` is under which its blocks are pinned; ``users`` are under way with rows of it, and put off that
    it goes.
    """

    name: str
    salt: str
    token_ids: array[int]
    number: int
    created_s: float
    expires_s: float
    hits: int = 0
    users: int = 0
    is_removed: bool = False
    chains: list[bytes] = field(default_factory=list)


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


class JoinedPrompt(NamedTuple):
    """What a prompt becomes behind its contexts: see ``data.Sequence``."""

    token_ids: array[int]
    parts: tuple[MovedPart, ...]
    pin: tuple[int, int] | None
    salt: str
    contexts: Sequence[Context]


class Contexts:
    """All contexts of an engine, by name and salt: nobody finds one of another salt.

    Times are those of ``clock``. ``broken`` are those that could not be computed.
    """

    def __init__(
        self, scheduler: Scheduler, block_bytes: int, clock: Callable[[], float], *, can_turn: bool
    ) -> None:
        self._scheduler = scheduler
        self._block_bytes = block_bytes
        self._clock = clock
        self._can_turn = can_turn
        self._by_name: dict[tuple[str, str], Context] = {}
        self._chains: dict[bytes, int] = {}  # by what is computed one after the other: where it is pinned
        self._numbers = count()
        self.broken: list[Context] = []

    def listed(self, salt: str = "") -> list[ContextInfo]:
        """What there is of a salt, the oldest first."""
        return [self.told(one.name, salt) for one in self._by_name.values() if one.salt == salt]

    def told(self, name: str, salt: str = "") -> ContextInfo:
        """What is told of one. Raises RequestError for a name that there is not."""
        one = self.find(name, salt)
        tokens, left = len(one.token_ids), one.expires_s - self._clock()
        size = self._scheduler.blocks.blocks_for(tokens) * self._block_bytes
        return ContextInfo(
            name, tokens, size, one.hits, None if left == inf else max(0.0, left), self.is_ready(one)
        )

    def find(self, name: str, salt: str = "") -> Context:
        """Raises RequestError for a name that there is not."""
        found = self._by_name.get((salt, name))
        if found is None:
            known = ", ".join(one.name for one in self.listed(salt)) or "none"
            raise RequestError(f"There is no context {name!r}; there are: {known}.", param="contexts")
        return found

    def is_ready(self, context: Context) -> bool:
        """Whether all of it is computed and kept."""
        return context.number in self._scheduler.pins

    def add(self, new: NewContext, prompt: Sequence[int], salt: str, now: float) -> Context:
        """Enter a context that is being computed. Said again, it stays longer.

        Raises RequestError for a name that is another text's, CapacityError where the pool has no room.
        """
        if not isinstance(new.name, str) or not 0 < len(new.name) <= _MOST_NAME:
            raise RequestError(f"A context's name has 1 to {_MOST_NAME} characters.", param="name")
        if new.ttl_s is not None and not new.ttl_s > 0:
            raise RequestError(f"ttl is {new.ttl_s}, but must be some seconds.", param="ttl")
        tokens, expires = array("i", prompt), inf if new.ttl_s is None else now + new.ttl_s
        known = self._by_name.get((salt, new.name))
        if known is not None and known.token_ids != tokens:
            what = f"There is a context {new.name!r} of another text; remove it first."
            raise RequestError(what, param="name", code="already_exists")
        if known is not None:
            known.expires_s = expires
            return known
        if (missing := self._missing(len(tokens))) > 0:
            blocks = self._scheduler.blocks
            raise CapacityError(
                f"Contexts may take {blocks.allowed_blocks // _SHARE} blocks of {blocks.block_size} tokens, "
                f"and with this one they would take {missing} more: remove one, or give more memory with "
                "--kv-memory."
            )
        made = Context(new.name, salt, tokens, next(self._numbers), now, expires)
        self._by_name[salt, new.name] = made
        return made

    def remove(self, name: str, salt: str = "") -> None:
        """Let go of a context, once nobody is under way with it. Raises RequestError for one that is not."""
        self._drop(self.find(name, salt))

    def expire(self) -> None:
        """Let go of those whose time is up."""
        now = self._clock()
        for context in [one for one in self._by_name.values() if one.expires_s <= now]:
            self._drop(context)

    def lost(self) -> Iterator[Context]:
        """Those that are not in the pool any more: to be computed again."""
        return (one for one in self._by_name.values() if not self.is_ready(one))

    def joined(self, prompt: Sequence[int], joining: Joining | None, salt: str) -> JoinedPrompt:
        """A prompt behind its contexts. Raises RequestError for a name that there is not."""
        own = array("i", prompt)
        if joining is None or not joining.names:
            return JoinedPrompt(own, (), None, salt, ())
        contexts = [self.find(name, salt) for name in joining.names]
        tokens, ends = own[: joining.at], [joining.at]
        for context in contexts:
            context.hits += 1
            tokens.extend(context.token_ids)
            ends.append(len(tokens))
        tokens.extend(own[joining.at :])
        if joining.how == "exact":
            return JoinedPrompt(tokens, (), self._chain(tokens[: ends[-1]], contexts, salt), salt, ())
        if not self._can_turn:
            what = "join: this model's keys cannot be turned to another place; join contexts exactly."
            raise RequestError(what, param="join", code="unsupported")
        parts = tuple(
            MovedPart(start + skip, end, context.number, skip)
            for context, start, end in zip(contexts, ends, ends[1:], strict=False)
            if (skip := joining.recompute if start else 0) < end - start
        )
        for context in contexts:
            context.users += 1
        # Its blocks are not those of the same tokens computed in order: they have names of their own.
        return JoinedPrompt(tokens, parts, None, f"{salt}/{ends}/{joining.recompute}", contexts)

    def settle(self, number: int) -> None:
        """A prompt that was to be pinned under ``number`` has ended: was it, and is it still wanted?"""
        context = next((one for one in self._by_name.values() if one.number == number), None)
        if context is not None and not self.is_ready(context):
            self._drop(context)
            self.broken.append(context)
        elif context is None and number not in self._chains.values():
            self._scheduler.pins.release(number)

    def leave(self, contexts: Iterable[Context]) -> None:
        """A prompt of these has ended."""
        for context in contexts:
            context.users -= 1
            if context.is_removed and not context.users:
                self._scheduler.pins.release(context.number)

    def _chain(self, tokens: array[int], contexts: Sequence[Context], salt: str) -> tuple[int, int] | None:
        """Where the first tokens of a prompt are to be kept, too, if they are more than one context."""
        if tokens == contexts[0].token_ids:
            return None
        chain = salt.encode() + b"/" + tokens.tobytes()
        number = self._chains.get(chain)
        if number is None:
            if self._missing(len(tokens)) > 0:
                return None
            number = self._chains[chain] = next(self._numbers)
            for context in contexts:
                context.chains.append(chain)
        return number, len(tokens)

    def _missing(self, tokens: int) -> int:
        """Blocks by which contexts would be too many with ``tokens`` more."""
        blocks = self._scheduler.blocks
        used = self._scheduler.pins.used_blocks + blocks.blocks_for(tokens)
        return used - blocks.allowed_blocks // _SHARE

    def _drop(self, context: Context) -> None:
        del self._by_name[context.salt, context.name]
        context.is_removed = True
        numbers = [self._chains.pop(chain) for chain in context.chains if chain in self._chains]
        for number in numbers if context.users else (*numbers, context.number):
            self._scheduler.pins.release(number)


@dataclass(frozen=True, slots=True, eq=False)
class NamedContexts:
    """``llm.contexts.add("handbook", text)``, then ``llm.generate(prompt, contexts=["handbook"])``."""

    _contexts: Contexts
    _stream: Callable[..., Iterator[object]]

    def add(
        self, name: str, text: str | Sequence[int] | Completion, *, ttl_s: float | None = None
    ) -> ContextInfo:
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
        self._contexts.remove(name)

    def __getitem__(self, name: str) -> ContextInfo:
        return self._contexts.told(name)

    def __iter__(self) -> Iterator[ContextInfo]:
        return iter(self._contexts.listed())

    def __len__(self) -> int:
        return len(self._contexts.listed())
