"""Blocks are found again by what they hold, after what they follow, and by nothing less."""

from __future__ import annotations

import hashlib

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
