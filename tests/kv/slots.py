"""What lies in the slots of a pool, said by the tokens that it stands for."""

from __future__ import annotations

from collections.abc import Sequence

from tiny_llm.data import Plan

SIZE = 4
PRIVATE = "private"
"""The salt of what goes to no disk, here."""


class Pool:
    """What a slot's keys and values stand for: the salt and all tokens up to its own."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.slots: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.host: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.disk: dict[bytes, list[tuple[str, tuple[int, ...]]]] = {}  # by content, what its slots held

    def __contains__(self, content: bytes) -> bool:
        return content in self.disk

    def worth_reading(self, computed_ms: float, within_ms: float) -> int:
        return int(within_ms)

    def read(self, content: bytes) -> bytes | None:
        """As a ``BlockStore``: what is read stands for what lies there, and is looked up when it comes."""
        return content if content in self.disk else None

    def move(self, moves: Plan) -> None:
        """What the arrays' owner does before a step."""
        for block, content in moves.save:
            held = [self.slots[block, slot] for slot in range(self.size)]
            assert all(salt != PRIVATE for salt, _ in held), "it was to be kept nowhere"
            self.disk[content] = held
        for pairs, source, target in (
            (moves.swap_out, self.slots, self.host),
            (moves.copies, self.slots, self.slots),
            (moves.swap_in, self.host, self.slots),
        ):
            for old, new in pairs:
                for slot in range(self.size):
                    target[new, slot] = source.get((old, slot))
        for content, block in moves.load:
            self.slots |= {(block, slot): held for slot, held in enumerate(self.disk[content])}

    def write(self, blocks: Sequence[int], salt: str, tokens: Sequence[int], start: int, end: int) -> None:
        for position in range(start, end):
            held = (salt, tuple(tokens[: position + 1]))
            self.slots[blocks[position // self.size], position % self.size] = held

    def check(
        self, blocks: Sequence[int], salt: str, tokens: Sequence[int], computed: int, window: int = 0
    ) -> None:
        for position in range(max(0, computed + 1 - window) if window else 0, computed):
            held = self.slots[blocks[position // self.size], position % self.size]
            assert held == (salt, tuple(tokens[: position + 1])), f"position {position} was overwritten"
