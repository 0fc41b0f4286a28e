"""The block manager against a naive model that knows what every slot of the pool really holds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tiny_llm.errors import ConfigError
from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.blocks import BlockManager, Moves

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

    def move(self, moves: Moves) -> None:
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


class Held:
    """The model's view of one sequence."""

    def __init__(self, table: BlockTable, salt: str, tokens: list[int]) -> None:
        self.table, self.salt, self.tokens, self.computed = table, salt, tokens, 0

    @property
    def here(self) -> bool:
        return bool(self.table.blocks)

    @property
    def kept(self) -> dict[int, int]:
        """Its own blocks by their place."""
        return dict(enumerate(self.table.held, self.table.gone))


class AnyOrder(RuleBasedStateMachine):
    """Allocate, append, fork, free, cache, evict, swap, grow and shrink, in any order."""

    steps = loaded = left = 0

    @initialize(
        limit=strategies.integers(4, 16),
        slab=strategies.integers(1, 8),
        host=strategies.sampled_from([0, 3, 12]),
        caching=strategies.sampled_from([True, True, True, False]),
        before=strategies.lists(strategies.integers(9, 30), max_size=5),
        window=strategies.sampled_from([0, 0, 2, 5, 8, 13]),
        ahead=strategies.sampled_from([1, 6, 40]),
    )
    def start(
        self, limit: int, slab: int, host: int, caching: bool, before: list[int], window: int, ahead: int
    ) -> None:
        self.pool = Pool()
        self.manager = BlockManager(
            SIZE, limit, slab=slab, host_blocks=host, prefix_cache=caching, store=self.pool, window=window
        )
        self.limit, self.slab, self.window, self.ahead = limit, slab, window, ahead
        self.held: list[Held] = []
        self.unused_since: dict[int, int] = {}  # cached blocks that no table holds
        self.full: dict[int, tuple[str, list[int]]] = {}  # cached blocks that are full: salt, all tokens
        self.clock = 0
        for odd, length in enumerate(before):  # so that something is cached, and soon must go
            self.held.append(Held(self.manager.table(), "", [int(i == odd) for i in range(length)]))
            self.allocate(0, 0, 0)
            self._forget_evicted()
            self.compute(0, length)
            self.free(0, keep=True)

    @rule(
        salt=strategies.sampled_from(["", "", "", "key", PRIVATE]),
        length=strategies.integers(1, 30),
        odd=strategies.integers(0, 29),
    )
    def arrive(self, salt: str, length: int, odd: int) -> None:
        tokens = [int(i == odd) for i in range(length)]  # many prompts begin alike
        table = self.manager.table(salt, is_kept=salt != PRIVATE)
        self.held.append(Held(table, salt, tokens))

    @precondition(lambda self: self.pool.disk)
    @rule(pick=strategies.integers(0, 99))
    def arrive_again(self, pick: int) -> None:
        """With a prompt of which the beginning lies on disk, and begin at once."""
        salt, tokens = list(self.pool.disk.values())[pick % len(self.pool.disk)][-1]
        self.held.append(Held(self.manager.table(salt), salt, [*tokens, 1]))
        self.allocate(-1, 0, 9)  # the last one

    @rule(
        pick=strategies.integers(0, 99),
        spare=strategies.integers(0, 3),
        most=strategies.sampled_from([0, 1, 9]),
    )
    def allocate(self, pick: int, spare: int, most: int) -> None:
        if (one := self._pick(pick, here=False)) is None:
            return
        before, on_host = self.manager.available, len(one.table.host)
        expected = self._full_hits(one.salt, one.tokens)
        gone = self._before_window(expected * SIZE)
        if self.window and on_host:
            expected = gone = one.table.gone
        there = max(expected * SIZE, one.computed if on_host else 0)
        known = self.manager.allocate(one.table, one.tokens, spare=spare, ahead=self.ahead)
        reach = min(len(one.tokens), there + self.ahead) if self.window else len(one.tokens)
        needed = -(-reach // SIZE)
        if known is None:
            assert before < needed - gone + spare
            assert (len(one.table.blocks), len(one.table.host)) == (0, on_host)
            return
        assert self.manager.available >= spare and len(one.table.blocks) == needed
        assert one.table.gone == gone, "what lies before the window is not taken"
        assert known < len(one.tokens) and known >= one.computed, "more is there than was swapped out"
        assert on_host or known // SIZE == expected
        one.computed = known
        if self.manager.store is not None:
            one.computed = self.manager.load(one.table, one.tokens, known, 0, most)
        assert known <= one.computed < len(one.tokens)
        assert one.computed == known or not one.computed % SIZE, "whole blocks come from disk"
        AnyOrder.loaded += one.computed - known

    @rule(pick=strategies.integers(0, 99), count=strategies.integers(1, 9))
    def compute(self, pick: int, count: int) -> None:
        if (one := self._pick(pick, here=True)) is None:
            return
        end = min(one.computed + count, len(one.tokens))
        if end > one.table.writable and not self.manager.reserve(one.table, one.computed, end):
            return
        self.pool.move(self.manager.drain())
        for index in range(one.computed // SIZE, -(-end // SIZE)):
            block = one.table.blocks[index]
            users = [other for other in self.held if block in other.table.held]
            assert users == [one], f"block {block} is written while {len(users)} tables hold it"
        self.pool.write(one.table.blocks, one.salt, one.tokens, one.computed, end)
        one.computed = end
        self.manager.register(one.table, one.tokens, end)
        self._note_full(one, one.kept)
        self.manager.leave_behind(one.table, end)
        AnyOrder.left += one.table.gone
        most = self.manager.most_blocks(one.table, len(one.tokens), max(self.ahead, 9))
        assert len(one.table.held) <= most, "more is held than admission counts on"

    @rule(pick=strategies.integers(0, 99), token=strategies.integers(0, 1))
    def generate(self, pick: int, token: int) -> None:
        one = self._pick(pick, here=True)
        if one is not None and one.computed == len(one.tokens):
            one.tokens.append(token)

    @rule(pick=strategies.integers(0, 99), token=strategies.integers(0, 1))
    def fork(self, pick: int, token: int) -> None:
        one = self._pick(pick, here=True)
        if one is not None and one.computed == len(one.tokens):
            before = self.manager.available
            child = Held(self.manager.fork(one.table, one.computed), one.salt, [*one.tokens, token])
            child.computed = one.computed
            self.held.append(child)
            assert self.manager.available == before, "a fork takes no block"

    @rule(pick=strategies.integers(0, 99), keep=strategies.booleans())
    def free(self, pick: int, keep: bool) -> None:
        if self.held:
            one = self.held.pop(pick % len(self.held))
            if keep and one.here:
                blocks = one.kept
                self.manager.free(one.table, one.tokens, one.computed)
                self._note_full(one, blocks)
                self._note_use(blocks)
            else:
                self.manager.free(one.table)

    @rule(pick=strategies.integers(0, 99))
    def recompute(self, pick: int) -> None:
        if (one := self._pick(pick, here=True)) is not None:
            blocks = one.kept
            self.manager.free(one.table, one.tokens, one.computed)
            self._note_full(one, blocks)  # those from disk had not been entered
            self._note_use(blocks)
            one.computed = 0

    @rule(pick=strategies.integers(0, 99))
    def swap_out(self, pick: int) -> None:
        one = self._pick(pick, here=True)
        if one is not None and 0 < one.computed < len(one.tokens):  # else it has ended
            assert self.manager.swap_out(one.table, one.computed) == (not one.here)

    @precondition(lambda self: self.manager.prefix is not None)
    @rule(length=strategies.integers(1, 30))
    def look(self, length: int) -> None:
        """What is cached is found: asking is allocating and freeing."""
        table = self.manager.table()
        tokens = [0] * length
        expected = self._full_hits("", tokens)
        known = self.manager.allocate(table, tokens)
        if known is not None:
            assert known // SIZE == expected
            self.pool.move(self.manager.drain())
            self.pool.check(table.blocks, "", tokens, known, self.window)
            blocks = Held(table, "", tokens).kept
            self.manager.free(table, tokens, known)
            self._note_use(blocks)

    @rule(count=strategies.integers(1, 9))
    def grow(self, count: int) -> None:
        self.manager.grow(count)

    @rule(most=strategies.integers(0, 30))
    def set_limit(self, most: int) -> None:
        """Memory comes and goes; what is there stays."""
        self.manager.set_limit(most := min(most, self.manager.allowed_blocks))
        self.limit = max(most, self.manager.capacity)

    @rule(limit=strategies.integers(0, 16))
    def shrink(self, limit: int) -> None:
        before, capacity = self.manager.available, self.manager.capacity
        self.manager.shrink((one.table for one in self.held), limit)
        assert self.manager.available == before, "what was given back can be had again"
        used = len({block for one in self.held for block in one.table.held})
        least = max(limit, used, any(one.table.host for one in self.held))
        assert self.manager.capacity == min(capacity, -(-least // self.slab) * self.slab)
        for old, new in self.manager._moves.copies:
            if old in self.full:
                self.full[new] = self.full.pop(old)
        self.unused_since = {b: t for b, t in self.unused_since.items() if b < self.manager.capacity}

    def _pick(self, pick: int, *, here: bool) -> Held | None:
        able = [one for one in self.held if one.here == here]
        return able[pick % len(able)] if able else None

    def _note_full(self, one: Held, blocks: dict[int, int]) -> None:
        for index, block in blocks.items():
            if index < one.computed // SIZE and self.manager.prefix and block in self.manager.prefix:
                self.full[block] = (one.salt, one.tokens[: (index + 1) * SIZE])

    def _note_use(self, blocks: dict[int, int]) -> None:
        """They were used until now, some of them within one operation, which no invariant has seen."""
        for block in blocks.values():
            self.unused_since.pop(block, None)

    def _before_window(self, computed: int) -> int:
        return max(0, computed + 1 - self.window) // SIZE if self.window else 0

    def _full_hits(self, salt: str, tokens: list[int]) -> int:
        contents = list(self.full.values())
        found = [(salt, tokens[: (i + 1) * SIZE]) in contents for i in range((len(tokens) - 1) // SIZE)]
        ends = (
            n for n in range(len(found), 0, -1) if all(found[min(n - 1, self._before_window(n * SIZE)) : n])
        )
        return next(ends, 0)

    @invariant()
    def accounts_are_right(self) -> None:
        AnyOrder.steps += 1
        manager = self.manager
        self.pool.move(manager.drain())
        for one in self.held:
            if one.here:
                self.pool.check(one.table.blocks, one.salt, one.tokens, one.computed, self.window)
        manager.check_integrity(one.table for one in self.held)
        used = {block for one in self.held for block in one.table.held}
        cached = {b for b in range(manager.capacity) if manager.prefix and b in manager.prefix} - used
        usage = manager.usage((one.table, one.computed) for one in self.held)
        assert (usage.used, usage.cached) == (len(used), len(cached))
        assert usage.free == usage.capacity - len(used | cached)
        assert manager.available == self.limit - len(used)
        slots = {
            (one.table.blocks[position // SIZE], position % SIZE)
            for one in self.held
            if one.here
            for position in range(one.table.gone * SIZE, one.computed)
        }
        assert usage.wasted_slots == len(used) * SIZE - len(slots)
        assert usage.host_used == sum(len(one.table.host) for one in self.held)
        self._forget_evicted()
        self._oldest_went_first(cached, used)

    def _forget_evicted(self) -> None:
        prefix = self.manager.prefix
        self.full = {b: held for b, held in self.full.items() if prefix and b in prefix and prefix.content(b)}

    def _oldest_went_first(self, cached: set[int], used: set[int]) -> None:
        self.clock += 1
        evicted = [since for block, since in self.unused_since.items() if block not in cached | used]
        kept = [since for block, since in self.unused_since.items() if block in cached]
        assert max(evicted, default=0) <= min(kept, default=self.clock), (
            "a younger block went before an older"
        )
        self.unused_since = {block: self.unused_since.get(block, self.clock) for block in cached}


@pytest.mark.slow
def test_any_order_of_operations_keeps_the_accounts() -> None:
    AnyOrder.steps = AnyOrder.loaded = AnyOrder.left = 0
    runs = settings(max_examples=230, stateful_step_count=60)
    AnyOrder.TestCase.settings = runs
    AnyOrder.TestCase("runTest").runTest()
    assert AnyOrder.steps >= 10_000, f"only {AnyOrder.steps} steps were tried"
    assert AnyOrder.loaded > 10, "hardly anything came from disk"
    assert AnyOrder.left > 100, "hardly a block was left behind"
