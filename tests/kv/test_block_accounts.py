"""Blocks are taken, given back, written, forked and freed: each by hand, then in any order."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.blocks import BlockManager

pytestmark = pytest.mark.chapter("3.1")

SIZE = 4


def plain(blocks: int = 8, **given: int) -> BlockManager:
    """A manager that remembers nothing of what was freed."""
    return BlockManager(SIZE, blocks, prefix_cache=False, **given)


def with_room(manager: BlockManager, tokens: int) -> BlockTable:
    """A table of so many tokens."""
    table = manager.table()
    assert manager.reserve(table, 0, tokens), "there was room"
    return table


def computed(manager: BlockManager, tokens: list[int]) -> BlockTable:
    """A table whose tokens are computed, and its full blocks registered."""
    table = manager.table()
    assert manager.allocate(table, tokens) == 0, "nothing like it was there"
    manager.register(table, tokens, len(tokens))
    return table


def state(manager: BlockManager, table: BlockTable) -> list[object]:
    """All that a refused call must leave as it was."""
    counts = [*manager.reference_counts], [*manager.cached_blocks], manager.available, manager.capacity
    return [*counts, [*table.blocks], table.writable, [*manager._moves.copies]]


def test_taken_blocks_come_lowest_first_and_are_held_once() -> None:
    manager = plain()
    taken = manager._take(3)
    assert taken.tolist() == [0, 1, 2], "from the stack's end, and the top one first"
    assert [*manager.reference_counts[:4]] == [1, 1, 1, 0], "who takes them holds them"
    assert manager._take(2).tolist() == [3, 4] and manager.available == 3, "a block was handed out twice"


def test_to_take_none_takes_none() -> None:
    manager = plain()
    manager._drop(manager._take(1)[0])
    assert manager._take(0).tolist() == [] and manager.available == 8, "a slice to -0 is all of it"


def test_the_last_one_back_is_the_first_one_out() -> None:
    manager = plain()
    manager._take(4)
    for block in range(4):
        manager._drop(block)
    assert manager._take(1).tolist() == [3], "block 3 came back last"
    assert manager._take(2).tolist() == [2, 1], "of several, the one that lay on top comes first"


def test_the_pool_grows_by_slabs_as_often_as_needed() -> None:
    manager = plain(10, slab=3)
    manager._take(1)
    assert manager.capacity == 3, "one slab, whatever is asked for"
    manager._take(7)
    assert manager.capacity == 9, "two more slabs"
    assert sorted(manager._take(2)) == [8, 9] and manager.capacity == 10, "the last slab is a short one"


def test_a_dropped_block_that_is_shared_is_still_held() -> None:
    manager = plain()
    (block,) = manager._take(1)
    manager._share(block)
    manager._drop(block)
    assert manager.reference_counts[block] == 1 and manager.available == 7, "the other one still reads it"
    manager._drop(block)
    assert manager.reference_counts[block] == 0 and manager.available == 8


def test_a_dropped_block_that_can_be_found_is_cached_as_the_newest() -> None:
    manager = BlockManager(SIZE, 8)
    tables = [computed(manager, [n] * SIZE) for n in range(3)]
    unnamed = computed(manager, [3, 3])
    blocks = [table.blocks[0] for table in tables]
    for block in (blocks[1], blocks[0], blocks[2], unnamed.blocks[0]):
        manager._drop(block)
    assert [*manager.cached_blocks] == [blocks[1], blocks[0], blocks[2]], (
        "oldest first, and only what has a name"
    )
    assert manager.usage([]).free == 5


def test_as_many_are_cached_as_there_is_memory_for() -> None:
    manager = BlockManager(SIZE, 40)
    tables = [computed(manager, [n] * SIZE) for n in range(20)]
    cached = manager.cached_blocks
    for table in tables:
        manager._drop(table.blocks[0])
    assert [*cached] == [table.blocks[0] for table in tables], "what there is room for stays, in one list"


def test_who_goes_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, gone = BlockManager(SIZE, 2), list[int]()
    for n in range(2):
        manager.free(computed(manager, [n] * SIZE), [n] * SIZE, SIZE)
    evict, old = manager._evict, [*manager.cached_blocks]

    def watched(block: int) -> None:
        gone.append(block)
        evict(block)

    monkeypatch.setattr(manager, "_evict", watched)
    manager._take(2)
    assert gone == old, "`_evict` may have to keep it elsewhere, the oldest first"


def test_free_blocks_go_first_then_the_pool_grows_then_the_oldest_cached_go() -> None:
    manager = BlockManager(SIZE, 6, slab=2)
    texts = [[n] * SIZE for n in range(3)]
    for table, text in [(computed(manager, text), text) for text in texts]:
        manager.free(table, text, SIZE)
    old, middle, new = manager.cached_blocks
    assert manager.capacity == 4 and manager.usage([]).free == 1
    manager._take(1)
    assert manager.capacity == 4 and len(manager.cached_blocks) == 3, "there was a free one"
    manager._take(2)
    assert manager.capacity == 6 and len(manager.cached_blocks) == 3, "the pool could still grow"
    assert [*manager._take(2)] in ([old, middle], [middle, old]) and [*manager.cached_blocks] == [new]
    assert manager.prefix is not None and len(manager.prefix) == 1, (
        "an evicted block is not to be found again"
    )


@pytest.mark.parametrize("call", ["take", "drop"])
def test_what_a_block_costs_does_not_depend_on_the_pool(call: str) -> None:
    manager = plain(1_000_000)
    (block,) = manager._take(1)
    tracemalloc.start()
    try:
        if call == "take":
            manager._take(1)
        else:
            manager._drop(block)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000, f"the free blocks were copied: {peak:,} bytes"


def test_a_table_gets_blocks_as_it_grows_and_can_write_to_the_end_of_the_last() -> None:
    manager = plain()
    table = with_room(manager, 5)
    first = table.blocks.tolist()
    assert len(first) == 2 and table.writable == 8, "two blocks, written up to their end"
    assert manager.reserve(table, 5, 8) and table.blocks.tolist() == first, "they have room for three more"
    assert manager.reserve(table, 8, 9) and len(table.blocks) == 3 and table.writable == 12
    assert manager.reserve(table, 9, 21) and len(table.blocks) == 6 and table.blocks[:2].tolist() == first
    assert manager.drain().copies == [], "nothing is shared"
    manager.check_integrity([table])


def test_the_last_block_can_be_had_and_no_more() -> None:
    manager = plain(2)
    table = with_room(manager, 4)
    before = state(manager, table)
    assert manager.reserve(table, 4, 9) is False and state(manager, table) == before, (
        "a refusal changes nothing"
    )
    assert manager.reserve(table, 4, 8) is True and manager.available == 0


def test_a_fork_shares_all_and_copies_nothing_until_it_writes() -> None:
    manager = plain()
    parent = with_room(manager, 10)
    child = manager.fork(parent, 10)
    assert child.blocks == parent.blocks and child.blocks is not parent.blocks
    assert [manager.reference_counts[block] for block in child.blocks] == [2, 2, 2] and manager.available == 5
    assert manager.drain().copies == []
    assert parent.writable == 0 and child.writable == 0, "both must ask before they write"
    manager.check_integrity([parent, child])


def test_who_writes_first_gets_a_copy_and_the_last_one_writes_in_place() -> None:
    manager = plain()
    parent = with_room(manager, 10)
    *full, begun = parent.blocks
    children = [manager.fork(parent, 10) for _ in range(2)]
    for child in children:
        assert manager.reserve(child, 10, 11)
    copies = [(begun, child.blocks[2]) for child in children]
    assert manager.drain().copies == copies, "(from, to), and the full blocks are left alone"
    assert all(child.blocks[:2].tolist() == full for child in children)
    assert len({begun, *(child.blocks[2] for child in children)}) == 3, "each has a block of its own"
    assert manager.reserve(parent, 10, 11) and manager.drain().copies == [], "the last one is alone with it"
    assert parent.blocks.tolist() == [*full, begun] and parent.writable == 12
    manager.check_integrity([parent, *children])


def test_at_a_blocks_border_nothing_shared_is_written() -> None:
    manager = plain()
    parent = with_room(manager, 8)
    child = manager.fork(parent, 8)
    assert manager.reserve(child, 8, 9) and manager.drain().copies == [], "position 8 begins a new block"
    assert child.blocks[:2] == parent.blocks and len(child.blocks) == 3 and len(parent.blocks) == 2


def test_the_block_that_is_written_need_not_be_the_last_one() -> None:
    manager = plain()
    parent = with_room(manager, 12)
    full, begun, ahead = parent.blocks
    child = manager.fork(parent, 6)
    assert manager.reserve(parent, 6, 7), "its second block is shared, its third is its own"
    assert parent.blocks.tolist() == [full, copy := parent.blocks[1], ahead]
    assert manager.drain().copies == [(begun, copy)] and copy not in (full, begun, ahead)
    assert parent.writable == 12, "up to the end of its last block, though that was not asked for"
    manager.check_integrity([parent, child])


def test_a_shared_block_may_be_written_from_its_beginning() -> None:
    manager = plain()
    parent = with_room(manager, 12)
    full, second, begun = parent.blocks
    child = manager.fork(parent, 10)  # and then the parent takes its last two tokens back
    assert manager.reserve(parent, 8, 9) and manager.drain().copies == [(begun, parent.blocks[2])]
    assert child.blocks.tolist() == [full, second, begun] != parent.blocks.tolist()
    manager.check_integrity([parent, child])


def test_a_copy_and_new_blocks_are_given_both_or_neither() -> None:
    manager = plain(4)
    parent = with_room(manager, 6)
    child = manager.fork(parent, 6)
    before = state(manager, child)
    assert not manager.reserve(child, 6, 13), "two more and a copy are three, and there are two"
    assert state(manager, child) == before, "a refusal changes nothing"
    assert manager.reserve(child, 6, 12) and manager.available == 0, "one more and a copy"
    assert manager.drain().copies == [(parent.blocks[1], child.blocks[1])]
    assert child.blocks[0] == parent.blocks[0]


def test_more_room_than_is_asked_for_does_not_pay_for_a_copy() -> None:
    manager = plain(3)
    parent = with_room(manager, 12)
    child = manager.fork(parent, 6)
    before = state(manager, parent)
    assert not manager.reserve(parent, 6, 7), "no block is left for the copy"
    assert state(manager, parent) == before
    manager.free(child)
    assert manager.reserve(parent, 6, 7) and not manager.drain().copies


def test_a_fork_of_less_shares_less() -> None:
    manager = plain()
    parent = with_room(manager, 16)
    assert manager.fork(parent, 9).blocks == parent.blocks[:3], "two full blocks and the one that is begun"
    assert manager.fork(parent, 8).blocks == parent.blocks[:2], "two full blocks"
    assert [manager.reference_counts[block] for block in parent.blocks] == [3, 3, 2, 1]


def test_a_fork_goes_on_under_names_of_its_own() -> None:
    manager = BlockManager(SIZE, 16)
    text = [*range(10)]
    parent = manager.table("key", is_kept=False)
    assert manager.allocate(parent, text) == 0
    manager.register(parent, text, 10)
    child = manager.fork(parent, 10)
    assert (child.root, child.is_kept, child.full_at) == (parent.root, False, parent.full_at)
    assert child.names == parent.names and child.names is not parent.names
    for table, token in ((child, 70), (parent, 80)):
        assert manager.reserve(table, 10, 16)
        manager.register(table, [*text, *[token] * 6], 16)
    assert child.names != parent.names, "each goes on with names of its own"
    assert len(child.names) == len(parent.names), "and has those of its beginning"
    for token in (70, 80):
        found = manager.table("key")
        assert manager.allocate(found, [*text, *[token] * 6, 1]) == 16, "both ends are found by their tokens"
        manager.free(found)
    manager.check_integrity([parent, child])
    assert manager.allocate(manager.table(), [*text, 1]) == 0, "without the key nothing is"


def test_what_was_full_before_the_fork_can_still_be_registered() -> None:
    manager, text = BlockManager(SIZE, 8), [*range(10)]
    parent = manager.table()
    assert manager.allocate(parent, text) == 0
    child = manager.fork(parent, 10)
    manager.register(child, text, 10)
    assert manager.allocate(manager.table(), [*text, 1]) == 8, "both of its full blocks are found"
    manager = plain()
    manager.register(manager.fork(with_room(manager, 10), 10), text, 10)  # which there is nobody to tell


def test_what_lies_before_the_window_is_not_its_own() -> None:
    manager = plain(8, window=4)
    other = with_room(manager, 3)
    table = with_room(manager, 16)
    manager.leave_behind(table, 14)
    assert table.gone == 2 and 0 in other.blocks and table.blocks[0] == 0, "block 0 stands in their place"
    child = manager.fork(table, 14)
    assert (child.gone, child.window, child.blocks) == (2, 4, table.blocks)
    manager.check_integrity([other, table, child])
    manager.free(table)
    assert table.gone == 0, "it may be given blocks anew"
    manager.check_integrity([other, table, child])
    manager.free(child)
    manager.check_integrity([other])


def test_what_is_freed_is_all_there_again() -> None:
    manager = plain()
    table, other = with_room(manager, 10), with_room(manager, 3)
    before = table.blocks.tolist()
    manager.free(table)
    assert manager.available == 7 and table.blocks.tolist() == [] and table.writable == 0
    manager.check_integrity([table, other])
    assert manager.reserve(table, 0, 10) and table.blocks.tolist() == before, "in the order that they had"
    manager.free(manager.table())


def test_a_fork_outlives_its_parent() -> None:
    manager = plain()
    parent = with_room(manager, 10)
    child = manager.fork(parent, 10)
    manager.free(parent)
    assert [manager.reference_counts[block] for block in child.blocks] == [1, 1, 1], "the fork holds them"
    assert manager.reserve(child, 10, 11) and manager.drain().copies == [], "it is the only reader now"


def test_what_was_computed_is_found_again_and_nothing_else() -> None:
    manager, text = BlockManager(SIZE, 8), [*range(11)]
    table = manager.table()
    assert manager.allocate(table, text) == 0
    manager.free(table, text, 10)
    assert manager.usage([]).cached == 3, "two full blocks, and the one that is begun"
    assert manager.allocate(manager.table(), [*text, 99]) == 10, "token 10 was made, but not computed"


def test_a_block_whose_last_slot_is_empty_is_not_full() -> None:
    manager, text = BlockManager(SIZE, 8), [*range(8)]
    table = manager.table()
    assert manager.allocate(table, text) == 0
    manager.free(table, text, 7)
    assert manager.allocate(manager.table(), [*text, 99]) == 7, "the last token was never computed"


def test_the_end_of_a_text_is_forgotten_before_its_beginning() -> None:
    manager, text = BlockManager(SIZE, 3), [*range(12)]
    manager.free(computed(manager, text), text, 12)
    manager._take(1)
    assert len(manager.hits(manager.table(), [*text, 99])[1]) == 2, "the first two blocks are still there"


def test_slots_of_the_host_are_given_back_once() -> None:
    manager = BlockManager(SIZE, 8, host_blocks=3)
    table, text = with_room(manager, 10), [*range(10)]
    assert manager.swap_out(table, 10) and manager.usage([]).host_used == 3
    manager.free(table, text, 10)
    assert manager.usage([]).host_used == 0 and table.host == []
    manager.free(table)
    manager.check_integrity([table])


@pytest.mark.parametrize("seed", range(3))
def test_in_any_order_everybody_reads_what_he_wrote(seed: int) -> None:
    """Tables grow, fork, and go; each slot holds the text up to its token, as keys and values do."""
    chance, manager, slots = random.Random(seed), plain(12, slab=5), dict[tuple[int, int], tuple[int, ...]]()
    held: list[tuple[BlockTable, list[int]]] = []
    for step in range(250):
        kind = chance.random()
        if not held or kind < 0.1:
            held.append((manager.table(), []))
        elif kind < 0.2:
            table, text = chance.choice(held)
            held.append((manager.fork(table, len(text)), text.copy()))
        elif kind < 0.35:
            manager.free(held.pop(chance.randrange(len(held)))[0])
        else:
            table, text = chance.choice(held)
            end, before = len(text) + chance.randint(1, 6), state(manager, table)
            if end > table.writable and not manager.reserve(table, len(text), end):
                assert state(manager, table) == before, f"step {step}: a refusal changes nothing"
                continue
            for old, new in manager.drain().copies:
                slots.update({(new, slot): slots.get((old, slot), ()) for slot in range(SIZE)})
            for position in range(len(text), end):
                text.append(step)
                slots[table.blocks[position // SIZE], position % SIZE] = tuple(text)
        manager.check_integrity([table for table, _ in held])
        for table, text in held:
            for position in range(len(text)):
                here = slots[table.blocks[position // SIZE], position % SIZE]
                assert here == tuple(text[: position + 1]), (
                    f"step {step}: position {position} was overwritten"
                )
