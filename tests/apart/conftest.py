"""Two pools that know what each block really holds, and a wire that a test reads and damages: no model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from tiny_llm.data import Plan
from tiny_llm.distributed.wire import Wire
from tiny_llm.engine.handover import Handover
from tiny_llm.kv.blocks import BlockManager

BLOCK_BYTES = 8


def truth(salt: str, tokens: Sequence[int]) -> bytes:
    """What a block holds whose last token is the last of these: it depends on all of them."""
    return hashlib.sha256(f"{salt} {list(tokens)}".encode()).digest()[:BLOCK_BYTES]


class Pool:
    """An engine as a handover sees it: block accounts, and a runner that notes what each block holds."""

    def __init__(self, size: int = 4, room: int = 40, **options: Any) -> None:
        self.size, self.holds = size, dict[int, bytes]()
        self.blocks = BlockManager(size, room, **options)
        self.running: set[int] = set()
        self.scheduler = SimpleNamespace(
            blocks=self.blocks,
            num_running=0,
            sequence=lambda number: number if number in self.running else None,
        )
        self.runner = SimpleNamespace(give=self._give, take=self._take, move=self._move)
        self.settings = SimpleNamespace(block_size=size)
        self.given = 0
        self.written: list[int] = []
        self.breaks = False

    def _give(self, blocks: Sequence[int]) -> list[memoryview]:
        assert blocks, "nothing is asked of the pool where nothing is there"
        self.given += 1
        return [memoryview(self.holds[block]) for block in blocks]

    def _take(self, data: bytes, count: int, pairs: Sequence[tuple[int, int]]) -> None:
        if self.breaks:
            raise MemoryError("by design")
        assert len(data) == count * BLOCK_BYTES, "as they were given"
        for index, block in pairs:
            assert 0 <= index < count
            self.written.append(block)
            self.holds[block] = bytes(data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES])

    def _move(self, plan: Plan) -> None:
        for old, new in plan.copies:
            self.holds[new] = self.holds[old]

    def _end(self, tokens: Sequence[int], index: int) -> int:
        return min((index + 1) * self.size, len(tokens))

    def compute(self, tokens: list[int], salt: str = "", *, keep: bool = True) -> int:
        """As a sequence of these tokens does, all but the last; return how many it found."""
        table = self.blocks.table(salt, is_kept=keep)
        known = self.blocks.allocate(table, tokens)
        assert known is not None
        self._move(self.blocks.drain())
        for index in range(known // self.size, self.blocks.blocks_for(len(tokens) - 1)):
            self.holds[table.blocks[index]] = truth(salt, tokens[: self._end(tokens[:-1], index)])
        self.blocks.free(table, tokens, len(tokens) - 1)
        return known

    def found(self, tokens: list[int], salt: str = "") -> int:
        """How many of these tokens are there, all of them right."""
        table = self.blocks.table(salt)
        known = self.blocks.allocate(table, tokens)
        assert known is not None
        self._move(self.blocks.drain())
        for index in range(known // self.size):
            expected = truth(salt, tokens[: (index + 1) * self.size])
            assert self.holds[table.blocks[index]] == expected, f"block {index} holds something else"
        self.blocks.free(table, tokens, known)
        return known

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.blocks.usage([]).used


def handover(pool: Any, tokens: Sequence[int], salt: str = "", *, keep: bool = True) -> Handover:
    """These tokens' way from or to a pool."""
    return Handover(pool, tokens, salt, keep=keep)


class Line:
    """A connection by hand: what is sent lies in ``data``; at most ``at_once`` bytes a call, either way."""

    def __init__(self, data: bytes = b"", at_once: int = 2**20) -> None:
        self.data, self.at, self.at_once = bytearray(data), 0, at_once
        self.calls: list[list[memoryview]] = []

    def sendmsg(self, buffers: Sequence[memoryview]) -> int:
        if len(buffers) > 1024:
            raise OSError(90, "Message too long")
        if len(self.calls) > 200:
            raise OSError("it is sent without an end")
        self.calls.append([memoryview(one) for one in buffers])
        sent = b"".join(buffers)[: self.at_once]
        self.data += sent
        return len(sent)

    def recv_into(self, buffer: memoryview, size: int = 0, flags: int = 0) -> int:
        part = self.data[self.at : self.at + min(len(buffer), self.at_once)]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)


def wire(line: Line) -> Wire:
    """A wire on it, without the thread that sends."""
    made = Wire.__new__(Wire)
    made._connection = line  # type: ignore[assignment]
    made._head, made._crc = memoryview(bytearray(32)), memoryview(bytearray(4))
    return made


@pytest.fixture
def apart() -> SimpleNamespace:
    """``Pool``, ``handover``, ``Line``, ``wire``, ``truth``."""
    names: dict[str, Callable[..., Any]] = {"Pool": Pool, "handover": handover, "Line": Line, "wire": wire}
    return SimpleNamespace(**names, truth=truth)
