"""The block manager finds what it holds, takes it, and enters it: each by hand, then with many at a time."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import pytest

from tiny_llm.kv import blocks as in_blocks
from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.kv.prefix import PrefixCache, chain, content, encode, root

pytestmark = pytest.mark.chapter("4.1")

SIZE = 4


def computed(manager: BlockManager, tokens: list[int], salt: str = "", *, is_kept: bool = True) -> BlockTable:
    """A table whose tokens are computed and registered."""
    table = manager.table(salt, is_kept=is_kept)
    assert manager.allocate(table, tokens) is not None, "there was room"
    manager.register(table, tokens, len(tokens))
    return table


def freed(manager: BlockManager, tokens: list[int], salt: str = "") -> None:
    """These tokens were computed, and then their table ended."""
    manager.free(computed(manager, tokens, salt), tokens, len(tokens))


def found(manager: BlockManager, tokens: list[int], salt: str = "") -> list[int]:
    """The blocks that a new table would find."""
    first, blocks = manager.hits(manager.table(salt), tokens)
    assert first == 0, "without a window nothing is left out"
    return blocks


def contents(table: BlockTable, tokens: list[int], first: int, last: int) -> list[bytes]:
    """What blocks of two tokens are to hold."""
    return [*BlockManager(2, 8)._contents(table, tokens, first, last)]


def test_a_tables_blocks_are_named_in_a_chain() -> None:
    table, tokens = BlockTable(root("salt")), [5, 6, 7, 8, 9]
    first = hashlib.sha256(root("salt") + encode([5, 6])).digest()
    second = hashlib.sha256(first + encode([7, 8])).digest()
    expected = [content(root("salt"), encode([5, 6]), first), content(first, encode([7, 8]), second)]
    assert contents(table, tokens, 0, 2) == expected, "its own tokens, after what the one before is named"
    assert table.names == [first, second]
    assert contents(table, tokens, 1, 2) == expected[1:] and contents(table, tokens, 1, 1) == []
    again = BlockTable(root("salt"))
    assert contents(again, tokens, 0, 1) + contents(again, tokens, 1, 2) == expected, "a block at a time"
    tokens, first = list(range(32)), chain(root(""), encode(range(16)))
    whole = [*BlockManager(16, 8)._contents(BlockTable(root("")), tokens, 0, 2)]
    assert whole[1] == content(first, encode(tokens[16:]), chain(first, encode(tokens[16:]))), "all of them"


class _Watched(Sequence[int]):
    """Tokens that count how many of them were looked at."""

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, at: Any) -> Any:
        found = range(self.length)[at]
        self.seen += len(found) if isinstance(found, range) else 1
        return list(found) if isinstance(found, range) else found


def test_of_a_long_text_only_the_blocks_that_are_asked_for_are_looked_at() -> None:
    tokens = _Watched(400)
    assert len([*BlockManager(2, 8)._contents(BlockTable(root("")), tokens, 0, 100)]) == 100
    assert tokens.seen <= 200, "each block looks at its own tokens"


def test_a_name_is_made_once_and_not_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def watched(before: bytes, tokens: bytes) -> bytes:
        made.append(tokens)
        return chain(before, tokens)

    monkeypatch.setattr(in_blocks, "chain", watched)
    table, tokens = BlockTable(root("")), list(range(8))
    next(iter(BlockManager(2, 8)._contents(table, tokens, 0, 4)))
    assert len(made) <= 1, "who stops after the first needs no second name"
    whole = contents(table, tokens, 0, 4)
    assert contents(table, tokens, 0, 4) == whole and len(made) == 4, "asked twice, hashed once"
    assert contents(table, tokens, 2, 4) == whole[2:] and len(made) == len(table.names) == 4


def test_block_0_is_found_like_any_other() -> None:
    cache = PrefixCache()
    held = content(root(""), encode([1]), chain(root(""), encode([1])))
    cache.add(0, held)
    assert cache.find(held) == 0, "0 is a block, and no block is None"


def test_of_two_blocks_that_are_not_full_each_goes_by_itself() -> None:
    cache = PrefixCache()
    for block, token in ((3, 1), (4, 2)):
        cache.add(block, content(root(""), encode([token])))
        assert cache.find(content(root(""), encode([token]))) is None, "only what is full has a name"
    cache.forget(3)
    assert cache.find_part(root(""), encode([2])) == (4, 1) and 3 not in cache and 4 in cache
    cache.forget(4)
    assert len(cache) == 0


def test_a_block_that_holds_something_else_is_found_by_nothing_that_it_held() -> None:
    cache = PrefixCache()
    old, new = (content(root(""), encode([n]), chain(root(""), encode([n]))) for n in (1, 2))
    cache.add(5, old)
    cache.add(5, new)
    assert cache.find(old) is None and cache.find(new) == 5
    assert cache.find_part(root(""), encode([1])) == (-1, 0) and len(cache) == 1


def test_a_part_or_block_0_that_holds_something_else_is_forgotten_too() -> None:
    cache = PrefixCache()
    for block in (0, 5):
        cache.add(block, content(root(""), encode([1, block])))
        cache.add(block, content(root(""), encode([2, block])))
        assert cache.find_part(root(""), encode([1])) == (-1, 0), "it holds that no more"
    cache.add(9, content(root(""), encode([3])))
    cache.add(4, content(root(""), encode([3, 3])))
    assert cache.find_part(root(""), encode([3])) == (4, 1), "the one that came last, whatever its number"
    cache.add(9, content(root(""), encode([8])))
    assert cache.find_part(root(""), encode([3])) == (4, 1), "the newer one stays when the older one goes"


def test_the_newest_of_those_that_begin_alike_is_looked_at_full_or_not() -> None:
    cache = PrefixCache()
    part = content(root(""), encode([1, 2]))
    full = content(root(""), encode([1, 3, 4]), chain(root(""), encode([1, 3, 4])))
    cache.add(1, part)
    cache.add(2, full)
    assert cache.find_part(root(""), encode([1, 3, 4])) == (2, 3)
    cache.add(3, content(root(""), encode([1, 2, 5])))
    assert cache.find_part(root(""), encode([1, 2, 5])) == (3, 3)


def test_full_blocks_are_found_and_all_but_the_last_token() -> None:
    manager = BlockManager(SIZE, 10)
    table = computed(manager, list(range(13)))
    blocks = table.blocks.tolist()
    assert found(manager, list(range(13))) == blocks[:3]
    assert found(manager, list(range(12))) == blocks[:2], "the last token's logits are needed"
    assert found(manager, list(range(11))) == blocks[:2] and found(manager, list(range(5))) == blocks[:1]
    assert found(manager, list(range(4))) == found(manager, [0]) == found(manager, []) == []
    assert found(manager, [*range(8), 99, 9, 10, 11, 12]) == blocks[:2], "as far as they agree"
    assert found(manager, [99, *range(1, 13)]) == [], "from the very beginning"
    manager = BlockManager(SIZE, 50)
    table = computed(manager, list(range(160)), is_kept=False)
    assert found(manager, list(range(160))) == table.blocks[:39].tolist(), "however many there are"


def test_what_was_evicted_in_the_middle_ends_what_is_found() -> None:
    manager = BlockManager(SIZE, 10)
    tokens = list(range(17))
    freed(manager, tokens)
    blocks = found(manager, tokens)
    manager._forget(blocks[1])
    assert found(manager, tokens) == blocks[:1], "block 2 is still there, and of no use"
    manager._forget(blocks[0])
    assert found(manager, tokens) == []


def test_to_ask_takes_nothing() -> None:
    manager = BlockManager(SIZE, 10)
    running, ended = list(range(9)), list(range(20, 29))
    table = computed(manager, running)
    freed(manager, ended)
    assert manager.prefix is not None
    before = [*manager.reference_counts], [*manager.cached_blocks]
    assert len(found(manager, running)) == len(found(manager, ended)) == 2
    assert ([*manager.reference_counts], [*manager.cached_blocks]) == before, "hits only looks"
    manager.check_integrity([table])
    asks = manager.table()
    for _ in range(2):
        assert len(manager.hits(asks, running)[1]) == 2
    assert not asks.blocks and asks.full_at == manager.table().full_at and asks.names == table.names
    assert manager.prefix.hit_tokens == manager.prefix.miss_tokens == 0, "what is used is counted later"


def test_who_asks_again_hashes_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, made = BlockManager(SIZE, 10), list[bytes]()
    freed(manager, list(range(9)))

    def watched(before: bytes, tokens: bytes) -> bytes:
        made.append(tokens)
        return chain(before, tokens)

    monkeypatch.setattr(in_blocks, "chain", watched)
    table = manager.table()
    assert [len(manager.hits(table, list(range(9)))[1]) for _ in range(3)] == [2, 2, 2]
    assert len(made) == 2, "a name is computed once, and then the table has it"


def test_names_are_made_as_far_as_blocks_are_found() -> None:
    manager = BlockManager(SIZE, 100)
    freed(manager, list(range(300, 309)))
    table = manager.table()
    assert manager.hits(table, list(range(300))) == (0, []) and len(table.names) <= 1, (
        "where the first block is not there, the others' names are of no use"
    )


def test_without_a_prefix_cache_nothing_is_found() -> None:
    manager = BlockManager(SIZE, 10, prefix_cache=False)
    freed(manager, list(range(9)))
    assert manager.hits(manager.table(), list(range(9))) == (0, [])


def test_with_a_window_the_beginning_need_not_be_there() -> None:
    manager = BlockManager(SIZE, 20, window=SIZE)
    tokens = list(range(33))
    freed(manager, tokens)
    blocks = manager.hits(manager.table(), tokens)
    assert blocks[0] > 0 and blocks[1], "a window of four needs the last blocks alone"
    first, whole = manager.hits(manager.table(keeps_all=True), tokens)
    assert (first, len(whole)) == (0, 8), "a table without a window is answered like one"
    for block in whole[:3]:
        manager._forget(block)
    assert manager.hits(manager.table(), tokens) == blocks, "what lies before the window was evicted"


def test_a_shared_block_leaves_the_list_of_those_that_may_go() -> None:
    manager = BlockManager(SIZE, 10)
    freed(manager, list(range(9)))
    old, *_ = manager.cached_blocks
    block = found(manager, list(range(9)))[0]
    assert block != old, "the end goes first"
    manager._kept_out.add(block)
    evictable = manager.cached_blocks
    manager._share(block)
    assert block not in manager.cached_blocks and old in manager.cached_blocks
    assert block not in evictable and old in evictable, "the list itself, no copy"
    assert found(manager, list(range(9)))[0] == block, "it is found by others as before"
    assert manager._kept_out == {block}, "who reads it says nothing of the disk"
    manager._share(block)
    manager._share(block)
    assert manager.reference_counts[block] == 3, "one for each table"


def test_what_was_found_is_not_given_to_others() -> None:
    manager = BlockManager(SIZE, 4)
    freed(manager, list(range(9)))
    table = manager.table()
    assert manager.allocate(table, list(range(9))) == 8
    other = manager.table()
    assert manager.allocate(other, list(range(50, 54))) == 0 and manager.available == 0
    assert not set(other.blocks) & set(table.blocks), "a block was evicted while it is read"
    assert manager.allocate(manager.table(), list(range(60, 62))) is None, "no room"
    manager.check_integrity([table, other])


def test_a_prompt_of_one_pass_enters_all_of_its_full_blocks() -> None:
    manager = BlockManager(SIZE, 10)
    table = manager.table()
    tokens = list(range(15))
    assert manager.allocate(table, tokens) == 0
    manager.register(table, tokens, 12)
    assert found(manager, tokens) == table.blocks[:3].tolist() and table.full_at == 16
    assert len(manager.prefix or ()) == 3, "the fourth is not full"


def test_a_block_is_entered_when_its_last_token_is_computed() -> None:
    manager = BlockManager(SIZE, 10)
    table, tokens = manager.table(), list(range(12))
    assert manager.allocate(table, tokens) == 0
    seen = []
    for end in (3, 4, 5, 7, 8, 11):
        manager.register(table, tokens, end)
        seen.append(len(found(manager, tokens)))
    assert seen == [0, 1, 1, 1, 2, 2], "what is asked for is not yet computed"
    assert table.full_at == 12, "whatever a pass brings, blocks are full at their ends"
    manager.register(table, tokens, 12)
    assert found(manager, [*tokens, 1]) == table.blocks.tolist()
    other, tokens = manager.table(), list(range(50, 62))
    assert manager.allocate(other, tokens) == 0
    manager.register(other, tokens, 5)
    manager.register(other, tokens, 8)
    assert len(found(manager, tokens)) == 2 and other.full_at == 12, "full at 8, though 5 came before"


def test_each_full_block_is_entered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, asked = BlockManager(SIZE, 10), list[bytes]()
    table, tokens = manager.table(), list(range(20))
    assert manager.allocate(table, tokens) == 0 and manager.prefix is not None
    assert len([*manager._contents(table, tokens, 0, 5)]) == 5, "somebody asked for all of its names"
    find = manager.prefix.find
    monkeypatch.setattr(manager.prefix, "find", lambda content: asked.append(content) or find(content))
    counts = []
    for end in (3, 5, 13, 14, 20):
        manager.register(table, tokens, end)
        counts.append((len(asked), table.full_at))
    assert counts == [(0, 4), (1, 8), (3, 16), (3, 16), (5, 24)], "those that became full, and no others"


def test_who_forked_and_computed_what_was_cached_takes_the_first_ones_block() -> None:
    manager = BlockManager(SIZE, 10)
    tokens = list(range(8))
    one, other = manager.table(), manager.table(is_kept=False)
    assert manager.allocate(one, tokens) == manager.allocate(other, tokens) == 0
    child = manager.fork(other, 8)
    own = one.blocks.tolist()
    manager.free(one, tokens, 8)
    assert [*manager.cached_blocks] == own[::-1], "no table holds them"
    manager.register(other, tokens, 8)
    assert other.blocks.tolist() == own, "what is only cached is taken, too"
    manager.check_integrity([other, child])
    manager.register(child, tokens, 8)
    assert child.blocks.tolist() == own and [manager.reference_counts[block] for block in own] == [2, 2]
    manager.check_integrity([other, child])


def test_what_goes_to_disk_is_told_block_by_block() -> None:
    manager = BlockManager(SIZE, 20)
    computed(manager, list(range(8)))
    second = computed(manager, list(range(50, 58)), is_kept=False)
    assert manager._kept_out == set(second.blocks), "by its number in the pool"
    computed(manager, list(range(80, 88)))
    assert manager._kept_out == set(second.blocks), "another's text changes nothing"
    third = manager.table(is_kept=False)
    assert manager.allocate(third, list(range(90, 98))) == 0
    manager.fork(third, 8)
    manager.register(third, list(range(90, 98)), 8)
    assert manager._kept_out == {*second.blocks, *third.blocks}, "a block of two tables of which none is kept"


def test_who_computed_the_same_takes_the_first_ones_block() -> None:
    manager = BlockManager(SIZE, 10)
    tokens = list(range(8))
    tables = [manager.table() for _ in range(3)]
    for table in tables:
        assert manager.allocate(table, tokens) == 0, "all begin before one is done"
    own = tables[0].blocks.tolist()
    for table in tables:
        manager.register(table, tokens, 8)
        assert table.blocks.tolist() == own and table.full_at == 12
    assert manager.usage([]).used == 2 and [manager.reference_counts[block] for block in own] == [3, 3]
    manager.check_integrity(tables)
    for table in tables:
        manager.free(table, tokens, 8)
    assert manager.usage([]).cached == 2 and manager.usage([]).free == 8
    manager.check_integrity([])


def test_what_is_registered_is_not_registered_again() -> None:
    manager = BlockManager(SIZE, 10)
    tokens = list(range(9))
    table = computed(manager, tokens)
    blocks = table.blocks.tolist()
    manager.register(table, tokens, 9)
    table.full_at = SIZE
    manager.register(table, tokens, 9)
    assert table.blocks.tolist() == blocks and [*manager.reference_counts[:3]] == [1, 1, 1]


@pytest.mark.parametrize("kept", [(True,), (False,), (False, False), (False, True), (True, False)])
def test_only_what_somebody_keeps_may_go_to_disk(kept: Sequence[bool]) -> None:
    manager = BlockManager(SIZE, 10)
    tokens = list(range(8))
    tables = [manager.table(is_kept=one) for one in kept]
    for table in tables:
        assert manager.allocate(table, tokens) == 0
    for table in tables:
        manager.register(table, tokens, 8)
    assert manager._kept_out == (set() if any(kept) else set(tables[0].blocks)), (
        "registered, and of tables alone that are not kept"
    )


def test_many_at_a_time_find_what_is_there_and_read_what_was_written() -> None:
    """A naive model knows what every slot holds, and which texts were registered."""
    chance, manager = random.Random(5), BlockManager(SIZE, 40)
    slots: dict[tuple[int, int], tuple[object, ...]] = {}
    running: list[tuple[BlockTable, str, list[int], int]] = []
    texts: dict[tuple[str, int], list[int]] = {
        (salt, n): [7, 7, 7, 7, n] for salt in ("", "s") for n in (1, 2, 3)
    }
    hits = 0
    for _ in range(150):
        if len(running) == 3:
            table, _, tokens, done = running.pop(chance.randrange(3))
            manager.free(table, tokens, done)
        salt, n = chance.choice([*texts])
        texts[salt, n] += [chance.randrange(2) for _ in range(chance.randint(0, 4))]
        tokens = texts[salt, n] = texts[salt, n][:20]
        table = manager.table(salt)
        known = manager.allocate(table, tokens)
        assert known is not None and known < len(tokens)
        for old, new in manager.drain().copies:
            slots |= {(new, slot): slots.get((old, slot), ()) for slot in range(SIZE)}
        hits += known
        done = chance.randint(known, len(tokens))
        for at in range(known, done):
            slots[table.blocks[at // SIZE], at % SIZE] = (salt, *tokens[: at + 1])
        manager.register(table, tokens, done)
        running.append((table, salt, tokens.copy(), done))
        for held, whose, said, end in running:
            read = [slots.get((held.blocks[at // SIZE], at % SIZE)) for at in range(end)]
            assert read == [(whose, *said[: at + 1]) for at in range(end)], "somebody else's keys were read"
        manager.check_integrity([one[0] for one in running])
    assert hits > 500, "most of what is asked was there"
