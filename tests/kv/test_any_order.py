"""The block manager in any order of operations, against a naive model that knows what every slot holds."""

from __future__ import annotations

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.kv.slots import PRIVATE, SIZE, Pool
from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.blocks import BlockManager


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
