"""Owns which block holds which tokens after which prefix; refuses to know whether a block is in use.

A block's keys and values depend on every token before it, so its name is a chain: SHA-256 of
(the name of the block before, its own tokens), and the first link is the salt. Two prompts share
a block exactly if they agree from the very beginning.

What a block holds is written as one bytes object, its *content*: its name, the name of the block
before, its tokens. All of it is compared when a block is found, so that equal names of unequal
blocks could not mix two requests. (Python's garbage collector does not look into bytes. As tuples,
the contents of 750,000 blocks would hold up a step for 0.26 s now and then.)
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

DIGEST = hashlib.sha256().digest_size  # bytes of a name
_NAMELESS = bytes(DIGEST)  # of a block that is not full, which nothing continues
_ITEM = array("i").itemsize
_FIRST = slice(DIGEST, 2 * DIGEST + _ITEM)  # of a content: the block before, and the first token


def encode(tokens: Sequence[int]) -> bytes:
    """Token ids as bytes, a fixed number for each."""
    return (tokens if isinstance(tokens, array) else array("i", tokens)).tobytes()


def root(salt: str) -> bytes:
    """The name before a prompt's first block. Prompts of different salts share nothing."""
    return hashlib.sha256(salt.encode()).digest()


def chain(before: bytes, tokens: bytes) -> bytes:
    """The name of the full block that holds ``tokens`` after the block named ``before``."""
    return hashlib.sha256(before + tokens).digest()


def content(before: bytes, tokens: bytes, name: bytes = _NAMELESS) -> bytes:
    """What a block holds: ``tokens`` after the block ``before``; one without a ``name`` is not full."""
    return name + before + tokens


class PrefixCache:
    """Blocks by content. ``hit_tokens`` and ``miss_tokens`` count what was asked of it."""

    def __init__(self) -> None:
        self.hit_tokens = 0
        self.miss_tokens = 0
        self._contents: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}  # full blocks by name
        self._newest: dict[bytes, int] = {}  # by the block before and the first token

    def __contains__(self, block: int) -> bool:
        return block in self._contents

    def __len__(self) -> int:
        return len(self._contents)

    def find(self, content: bytes) -> int | None:
        """The full block that holds exactly ``content``."""
        block = self._named.get(content[:DIGEST])
        return block if block is not None and self._contents[block] == content else None

    def find_part(self, before: bytes, tokens: bytes) -> tuple[int, int]:
        """A block after ``before`` that begins like ``tokens``: (block, number of tokens alike), or (-1, 0).

        Only the newest block with the same first token is looked at, which bounds the work.
        """
        block = self._newest.get(before + tokens[:_ITEM], -1)
        if block < 0:
            return -1, 0
        return block, _alike(self._contents[block][2 * DIGEST :], tokens)

    def add(self, block: int, content: bytes) -> None:
        """``block`` now holds ``content``, which must not be here yet; what it held is forgotten."""
        if block in self._contents:
            self.forget(block)
        self._contents[block] = content
        self._newest[content[_FIRST]] = block
        name = content[:DIGEST]
        if name != _NAMELESS:
            assert name not in self._named
            self._named[name] = block

    def content(self, block: int) -> bytes:
        """What the full ``block`` holds; nothing where it is not full."""
        held = self._contents[block]
        return b"" if held.startswith(_NAMELESS) else held

    def tokens_of_part(self, block: int) -> int:
        """How many tokens a block that is not full holds; 0 for one that is full."""
        held = self._contents[block]
        return (len(held) - 2 * DIGEST) // _ITEM if held.startswith(_NAMELESS) else 0

    def move(self, block: int, place: int) -> None:
        """What ``block`` holds lies in ``place`` now."""
        content = self._contents[block]
        self.forget(block)
        self.add(place, content)

    def forget(self, block: int) -> None:
        """``block`` is about to hold something else."""
        content = self._contents.pop(block)
        name, first = content[:DIGEST], content[_FIRST]
        if name != _NAMELESS:
            del self._named[name]
        if self._newest.get(first) == block:
            del self._newest[first]


def _alike(a: bytes, b: bytes) -> int:
    """How many first tokens are the same."""
    pairs = zip(memoryview(a).cast("i"), memoryview(b).cast("i"), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)) // _ITEM)
