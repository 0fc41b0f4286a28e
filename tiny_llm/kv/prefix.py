"""Owns which block holds which tokens after which prefix; refuses to know whether a block is in use.

A block's keys and values depend on every token before it, so its name is a chain:
SHA-256 of (the name of the block before, its own tokens), and the first link is the salt.
Two prompts share a block exactly if they agree from the very beginning. What is found is
compared token by token, so that equal names of unequal blocks could not mix two requests.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple

_ITEM = array("i").itemsize


class Content(NamedTuple):
    """What a block holds: its ``tokens`` (encoded), after the block named ``parent``.

    ``digest`` is its own name; b"" marks a block that is not full, which nothing continues.
    """

    digest: bytes
    parent: bytes
    tokens: bytes


def encode(tokens: Sequence[int]) -> bytes:
    """Token ids as bytes, a fixed number for each."""
    return array("i", tokens).tobytes()


def root(salt: str) -> bytes:
    """The name before a prompt's first block. Prompts of different salts share nothing."""
    return hashlib.sha256(salt.encode()).digest()


def chain(parent: bytes, tokens: bytes) -> bytes:
    """The name of the full block that holds ``tokens`` after the block ``parent``."""
    return hashlib.sha256(parent + tokens).digest()


class PrefixCache:
    """Blocks by content. ``hit_tokens`` and ``miss_tokens`` count what was asked of it."""

    def __init__(self) -> None:
        self.hit_tokens = 0
        self.miss_tokens = 0
        self._contents: dict[int, Content] = {}
        self._blocks: dict[bytes, int] = {}  # digest -> the block of that name
        self._newest: dict[bytes, int] = {}  # parent and first token -> the newest such block

    def __contains__(self, block: int) -> bool:
        return block in self._contents

    def __len__(self) -> int:
        return len(self._contents)

    def find(self, content: Content) -> int | None:
        """The block that holds exactly ``content``, which is full."""
        block = self._blocks.get(content.digest)
        return block if block is not None and self._contents[block] == content else None

    def find_part(self, parent: bytes, tokens: bytes) -> tuple[int, int]:
        """A block after ``parent`` that begins like ``tokens``: (block, number of tokens alike), or (-1, 0).

        Only the newest block with the same first token is looked at, which bounds the work.
        """
        block = self._newest.get(parent + tokens[:_ITEM], -1)
        if block < 0:
            return -1, 0
        return block, _alike(self._contents[block].tokens, tokens)

    def add(self, block: int, content: Content) -> None:
        """``block`` now holds ``content``, which must not be here yet; what it held is forgotten."""
        if block in self._contents:
            self.forget(block)
        self._contents[block] = content
        self._newest[content.parent + content.tokens[:_ITEM]] = block
        if content.digest:
            assert content.digest not in self._blocks
            self._blocks[content.digest] = block

    def forget(self, block: int) -> None:
        """``block`` is about to hold something else."""
        content = self._contents.pop(block)
        if content.digest:
            del self._blocks[content.digest]
        key = content.parent + content.tokens[:_ITEM]
        if self._newest.get(key) == block:
            del self._newest[key]


def _alike(a: bytes, b: bytes) -> int:
    """How many first tokens are the same."""
    pairs = zip(memoryview(a).cast("i"), memoryview(b).cast("i"), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)) // _ITEM)
