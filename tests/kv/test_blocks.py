"""The block manager, beside what every slot of the pool really holds."""

from __future__ import annotations

import pytest

from tests.kv.slots import SIZE, Pool
from tiny_llm.errors import ConfigError
from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.blocks import BlockManager


def filled(manager: BlockManager, pool: Pool, tokens: list[int], salt: str = "") -> BlockTable:
    """A table with all of ``tokens`` computed and registered."""
    table = manager.table(salt)
    known = manager.allocate(table, tokens)
    assert known is not None
    pool.move(manager.drain())
    pool.check(table.blocks, salt, tokens, known)
    pool.write(table.blocks, salt, tokens, known, len(tokens))
    manager.register(table, tokens, len(tokens))
    return table


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_blocks is 0, but must be at least 1"):
        BlockManager(16, 0)


def test_the_pool_grows_by_slabs_and_gives_them_back() -> None:
    manager, pool = BlockManager(SIZE, 10, slab=4), Pool()
    assert (manager.capacity, manager.available) == (0, 10)
    first = filled(manager, pool, [1] * 3)
    assert (manager.capacity, manager.available) == (4, 9)
    second = filled(manager, pool, list(range(2, 30)))
    assert (manager.capacity, manager.available) == (8, 2)
    third = filled(manager, pool, list(range(40, 48)))
    assert (manager.capacity, manager.available) == (10, 0)
    assert manager.allocate(manager.table(), [1]) is None, "there is no more"
    manager.free(third)
    manager.free(second)
    manager.shrink()
    assert (manager.capacity, manager.available) == (4, 9), "one block is still used"
    manager.free(first)
    manager.shrink()
    assert (manager.capacity, manager.available) == (0, 10)
    manager.check_integrity([])


def test_a_used_block_at_the_end_moves_to_the_front_and_all_who_hold_it_know() -> None:
    manager, pool = BlockManager(SIZE, 12, slab=2), Pool()
    first = filled(manager, pool, [1] * 30)
    last = list(range(2, 12))
    table = filled(manager, pool, last)
    child = manager.fork(table, 10)
    manager.free(first)
    assert manager.capacity == 12 and min(table.blocks) == 8
    manager.shrink([table, child])
    assert manager.capacity == 4 and child.blocks == table.blocks
    pool.move(manager.drain())
    for one in (table, child):
        pool.check(one.blocks, "", last, 10)
    manager.check_integrity([table, child])
    manager.free(table, last, 10)
    again = manager.table()
    assert manager.allocate(again, [*last, 1]) == 10, "it is found where it lies now"


def test_running_requests_share_a_prefix_and_the_last_token_is_always_computed() -> None:
    manager, pool = BlockManager(SIZE, 10), Pool()
    prompt = list(range(2 * SIZE))
    first = filled(manager, pool, prompt)
    second = manager.table()
    assert manager.allocate(second, prompt) == len(prompt) - 1, "all but the last, by copying part of a block"
    assert second.blocks[0] == first.blocks[0] and second.blocks[1] != first.blocks[1]
    assert manager.drain().copies == [(first.blocks[1], second.blocks[1])]
    manager.register(second, prompt, len(prompt))
    assert second.blocks == first.blocks, "the copy turned out to be the same, so it is shared instead"
    usage = manager.usage([(first, len(prompt)), (second, len(prompt))])
    assert (usage.used, usage.wasted_slots, usage.free) == (2, 0, 8)


def test_another_salt_shares_nothing() -> None:
    manager, pool = BlockManager(SIZE, 10), Pool()
    filled(manager, pool, list(range(9)), "one")
    other = manager.table("two")
    assert manager.allocate(other, list(range(9))) == 0


def test_a_conversations_next_turn_finds_the_answer_too() -> None:
    manager, pool = BlockManager(SIZE, 10), Pool()
    turn = list(range(6))
    table = filled(manager, pool, turn)
    answer = [*turn, 6, 7, 8, 9, 10]
    assert manager.reserve(table, 6, 11)
    pool.write(table.blocks, "", answer, 6, 10)  # the last token was made, not computed
    manager.register(table, answer, 10)
    manager.free(table, answer, 10)
    other = manager.table()
    assert manager.allocate(other, [*answer[:9], 50, 51]) == 9, "two full blocks and a token of the third"
    moves = manager.drain()
    assert moves.copies == [(2, other.blocks[2])], "what else the third holds is kept"
    pool.move(moves)
    manager.free(other)
    again = manager.table()
    assert manager.allocate(again, [*answer, 20, 21, 22]) == 10, "two full blocks and all of the third"
    assert manager.drain().copies == [] and again.blocks.tolist() == [0, 1, 2, 3], (
        "it is not read as one range"
    )
    pool.check(again.blocks, "", answer, 10)
    manager.free(again, [*answer, 20, 21, 22], 13)
    assert manager.allocate(manager.table(), [*answer, 20, 21]) == 12, "what it began with is found again"


def test_a_fork_copies_only_what_it_writes() -> None:
    manager, pool = BlockManager(SIZE, 10), Pool()
    tokens = list(range(6))
    parent = filled(manager, pool, tokens)
    child = manager.fork(parent, 6)
    assert child.blocks == parent.blocks and manager.usage([]).used == 2
    assert manager.reserve(child, 6, 7)
    assert child.blocks[0] == parent.blocks[0] and child.blocks[1] != parent.blocks[1]
    assert manager.drain().copies == [(parent.blocks[1], child.blocks[1])]
    assert manager.reserve(parent, 6, 7) and not manager.drain().copies, "it is the parent's own again"
    assert manager.usage([(parent, 6), (child, 6)]).wasted_slots == 4


def test_what_a_table_has_ahead_is_not_shared_with_its_fork() -> None:
    manager, pool = BlockManager(SIZE, 10), Pool()
    parent = filled(manager, pool, list(range(6)))
    assert manager.reserve(parent, 6, 12)
    child = manager.fork(parent, 6)
    assert manager.reserve(child, 6, 12) and manager.reserve(parent, 6, 12)
    assert child.blocks[0] == parent.blocks[0] and not set(child.blocks[1:]) & set(parent.blocks[1:])
    assert len(manager.drain().copies) == 1


def test_the_least_recently_used_block_goes_first_and_a_prefix_outlives_its_end() -> None:
    manager, pool = BlockManager(SIZE, 6), Pool()
    old, new = list(range(12)), list(range(20, 32))
    manager.free(filled(manager, pool, old), old, 12)
    manager.free(filled(manager, pool, new), new, 12)
    manager.free(filled(manager, pool, [*old[:4], 99]), [*old[:4], 99], 5)  # evicts old's last block
    assert manager.usage([]).cached == 6
    table = manager.table()
    assert manager.allocate(table, [*old, 1], spare=3) is None and not table.blocks
    assert manager.allocate(table, [*old, 1]) == 8, "its end was given up, its beginning was not"
    assert manager.allocate(manager.table(), [*new[:4], 1]) == 4, "the next to go was new's end"


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    manager, pool = BlockManager(SIZE, 4, prefix_cache=False), Pool()
    tokens = list(range(9))
    manager.free(filled(manager, pool, tokens), tokens, 9)
    assert manager.usage([]).free == 4
    assert manager.allocate(manager.table(), tokens) == 0


def test_a_full_host_refuses_and_nothing_changes() -> None:
    manager, pool = BlockManager(SIZE, 6, host_blocks=2), Pool()
    table = filled(manager, pool, list(range(9)))
    assert not manager.swap_out(table, 9) and len(table.blocks) == 3
    assert manager.swap_out(table, 8) and not table.blocks
    assert manager.usage([]).host_used == 2
    manager.free(table)
    assert manager.usage([]).host_used == 0
