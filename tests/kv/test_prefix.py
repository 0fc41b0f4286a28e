"""Blocks are found again by what they hold, after what they follow, and by nothing less."""

from __future__ import annotations

import hashlib
from typing import NoReturn

import pytest

from tiny_llm.kv.prefix import PrefixCache, chain, content, encode, root

pytestmark = pytest.mark.chapter("4.1")


def full(before: bytes, tokens: list[int]) -> bytes:
    return content(before, encode(tokens), chain(before, encode(tokens)))


def test_a_name_depends_on_salt_tokens_and_all_that_went_before() -> None:
    names = {
        chain(chain(root(salt), encode(first)), encode(second))
        for salt in ("", "key")
        for first in ([1, 2], [1, 3])
        for second in ([4, 5], [5, 4])
    }
    assert len(names) == 8
    assert chain(root(""), encode([1, 2])) == chain(root(""), encode([1, 2])), "same content, same name"


def test_names_are_the_same_in_every_process() -> None:
    salt = hashlib.sha256(b"salt").digest()
    assert chain(root("salt"), b"tokens") == hashlib.sha256(salt + b"tokens").digest()
    own = encode(range(32))
    for before in (salt, bytes(32), salt[:31] + b"\0"):
        assert chain(before, own) == hashlib.sha256(before + own).digest(), "all of both"


def test_a_block_is_found_until_it_is_forgotten() -> None:
    cache = PrefixCache()
    held = full(root(""), [1, 2, 3])
    assert cache.find(held) is None
    cache.add(7, held)
    assert cache.find(held) == 7 and 7 in cache and len(cache) == 1
    cache.forget(7)
    assert cache.find(held) is None and 7 not in cache and len(cache) == 0


def test_equal_names_of_unequal_blocks_do_not_mix() -> None:
    cache = PrefixCache()
    before, name = root(""), b"n" * 32
    cache.add(7, content(before, encode([1, 2, 3]), name))
    assert cache.find(content(before, encode([1, 2, 3]), name)) == 7
    assert cache.find(content(before, encode([1, 2, 4]), name)) is None, "tokens are compared"
    assert cache.find(content(root("other"), encode([1, 2, 3]), name)) is None, "and what they follow"
    assert cache.find(content(before, encode([1, 2]), name)) is None, "a part of it is not it"
    assert cache.find(content(before, encode([1, 2, 3, 4]), name)) is None, "nor is more"
    assert cache.find(content(before, encode([1, 2, 3]), name)) == 7, "to ask for another changes nothing"
    long = list(range(32))
    cache.add(8, content(before, encode(long), zeros := bytes(4) + b"n" * 28))
    assert cache.find(content(before, encode([*long[:-1], 0]), zeros)) is None, "to the last token"
    assert cache.find(content(before, encode(long), zeros)) == 8, "only 32 zeros are no name"


class _NotGoneThrough(dict[int, bytes]):
    """What may be looked up, and not searched."""

    def _searched(self) -> NoReturn:
        raise AssertionError("whoever looks at all blocks takes longer the more there are")

    __iter__ = items = values = keys = _searched  # type: ignore[assignment]


def test_to_find_a_block_no_other_is_looked_at() -> None:
    cache = PrefixCache()
    cache._contents = _NotGoneThrough()
    cache.add(3, full(root(""), [1, 2]))
    cache.add(4, full(root(""), [1, 3]))
    assert cache.find(full(root(""), [1, 3])) == 4 and cache.find(full(root(""), [1, 2])) == 3, (
        "both are here, though they begin alike"
    )
    assert cache.find_part(root(""), encode([1])) == (4, 1), "to be found makes no block newer"


def test_the_part_that_begins_alike_is_found() -> None:
    cache = PrefixCache()
    start = root("")
    cache.add(7, full(start, [1, 2, 3, 4]))
    assert cache.find_part(start, encode([1, 2, 9])) == (7, 2)
    assert cache.find_part(start, encode([1, 2, 3, 4, 5])) == (7, 4)
    assert cache.find_part(start, encode([2, 2])) == (-1, 0)
    assert cache.find_part(root("other"), encode([1, 2])) == (-1, 0)
    cache.add(8, content(start, encode([1, 2, 9])))
    assert cache.find_part(start, encode([1, 2, 9])) == (8, 3), "the newest that begins so"
    cache.forget(8)
    assert cache.find_part(start, encode([1, 2, 9])) == (-1, 0)


def test_a_block_that_fills_up_replaces_what_it_was_found_by() -> None:
    cache = PrefixCache()
    start = root("")
    cache.add(7, content(start, encode([1, 2])))
    held = full(start, [1, 2, 3])
    assert cache.find(held) is None
    cache.add(7, held)
    assert cache.find(held) == 7 and len(cache) == 1
    assert cache.find_part(start, encode([1, 2, 3])) == (7, 3)
