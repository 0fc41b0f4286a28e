"""Owns the accounts of the KV pool: which block is whose, shared, cached or free. Integers only.

A pool is blocks of ``block_size`` token slots. A sequence has a table: its i-th block holds
tokens ``i * block_size`` and on. A block may be in several tables (a shared prefix, a fork);
it is written only while it is in one, and a shared one is copied first. A full block is entered
in the prefix cache, and stays there when no table holds it any more, until its memory is
needed: least recently used first. The arrays are another's: what must be moved in them is
noted here and handed over by ``drain``. Where every layer has a window, a table lets go of the
blocks that lie before it. Where some see all, blocks stay: one holds the keys and values of all layers.

Every operation costs O(1) a block; none looks at all blocks or all tables, but for
``usage``, ``shrink`` and ``check_integrity``. Source of the idea: Kwon et al. 2023,
PagedAttention.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from sys import maxsize
from typing import NamedTuple

from tiny_llm.data import Plan
from tiny_llm.errors import ConfigError
from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.disk import BlockStore
from tiny_llm.kv.prefix import PrefixCache, chain, content, encode, root


class Usage(NamedTuple):
    """The pool in blocks: ``capacity = used + cached + free``. ``limit`` is what it may grow to.

    ``wasted_slots`` counts token slots of used blocks that hold no token (internal fragmentation); ``pinned``
    of the used blocks hold contexts.
    """

    capacity: int
    limit: int
    used: int
    cached: int
    free: int
    wasted_slots: int
    host_used: int
    pinned: int


class BlockManager:
    """Hands out blocks. The pool grows by ``slab`` blocks at a time, up to ``max_blocks``: see ``set_limit``.

    ``host_blocks`` is the room for sequences that are swapped out. ``prefix`` is None
    where blocks are not to be found again by their tokens. ``store`` is where those go that leave the pool.
    No row sees more than ``window`` tokens; 0: some see all.
    """

    def __init__(
        self,
        block_size: int,
        max_blocks: int,
        *,
        slab: int | None = None,
        host_blocks: int = 0,
        prefix_cache: bool = True,
        store: BlockStore | None = None,
        window: int = 0,
    ) -> None:
        slab = max_blocks if slab is None else slab
        for name, given in (("block_size", block_size), ("max_blocks", max_blocks), ("slab", slab)):
            if given < 1:
                raise ConfigError(f"{name} is {given}, but must be at least 1.")
        self.block_size = block_size
        self.window = window
        self.allowed_blocks = max_blocks
        self.limit = self.max_blocks = max_blocks  # of these, what memory is there for: see set_limit
        self.prefix = PrefixCache() if prefix_cache else None
        self._slab = slab
        self.store = store if prefix_cache else None
        self._kept_out: set[int] = set()  # registered, but not for the store
        self._refs = array("i")  # in how many tables each block is
        self._free = array("i")
        self._cached: OrderedDict[int, None] = OrderedDict()  # in no table, but registered; oldest first
        self._host_blocks = host_blocks
        self._host_free = list(reversed(range(host_blocks)))
        self._moves = Plan([], 0)

    @property
    def capacity(self) -> int:
        """Blocks that the pool must have now."""
        return len(self._refs)

    @property
    def reference_counts(self) -> Sequence[int]:
        """In how many tables each block is. Read it, never write it."""
        return self._refs

    @property
    def cached_blocks(self) -> Collection[int]:
        """The blocks that no table holds but that can be found again, least recently used first."""
        return self._cached.keys()

    @property
    def available(self) -> int:
        """Blocks that could be handed out: free, cached, or still to grow."""
        return len(self._free) + len(self._cached) + self.max_blocks - len(self._refs)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens."""
        return -(-tokens // self.block_size)

    def most_blocks(self, table: BlockTable, tokens: int, ahead: int) -> int:
        """Blocks that a table of ``tokens`` holds at a time, which gets room for ``ahead`` more at a time."""
        within = self.blocks_for(table.window + ahead) + 1 if table.window else maxsize
        return min(self.blocks_for(tokens), within)

    def table(self, salt: str = "", *, is_kept: bool = True, keeps_all: bool = False) -> BlockTable:
        """A table with no blocks yet; ``keeps_all`` of its tokens, whatever the window is."""
        window = 0 if keeps_all else self.window
        return BlockTable(root(salt) if self.prefix is not None else b"", is_kept=is_kept, window=window)

    def allocate(
        self, table: BlockTable, tokens: Sequence[int], *, spare: int = 0, ahead: int = maxsize
    ) -> int | None:
        """Give an empty table room for ``tokens``; return how many of them are already there.

        With a window, for as many as are there and ``ahead`` more.

        They come from the prefix cache, from the table's host slots, and from the part of a
        cached block that begins alike, which is copied, or taken where it has no more. The last
        token is never taken from the cache, because its logits are needed. None, and no change, if fewer than
        ``spare`` blocks would be left.
        """
        assert not table.blocks
        first, hits, fresh, taken = self._need(table, tokens, ahead)
        if taken + spare > self.available:
            return None
        start = first + len(hits)
        for block in hits:
            self._share(block)
        if table.is_kept and self._kept_out:
            self._kept_out.difference_update(hits)
        source, alike = (-1, 0) if table.host else self._part(table, tokens, start)
        is_whole = self.prefix is not None and alike and alike == self.prefix.tokens_of_part(source)
        if is_whole and not self._refs[source]:  # a text that goes on: its end is ours to fill
            self._forget(source)  # and is the next to be taken
        table.blocks = array("i", [0] * first + hits)
        table.blocks += self._take(fresh)
        table.writable = len(table.blocks) * self.block_size
        known = start * self.block_size
        table.full_at = known + self.block_size if self.prefix is not None else maxsize
        if table.host:
            return self._swap_in(table, start)
        table.gone = first
        if alike and source != table.blocks[start]:  # else it is the source itself
            self._moves.copies.append((source, table.blocks[start]))
        return known + alike

    def would_fit(self, table: BlockTable, tokens: Sequence[int], ahead: int = maxsize) -> bool:
        """Whether ``allocate`` would find room with no block to spare."""
        return self._need(table, tokens, ahead)[3] <= self.available

    def _need(self, table: BlockTable, tokens: Sequence[int], ahead: int) -> tuple[int, list[int], int, int]:
        """What ``hits`` says, the fresh blocks that an empty table needs, and these with hits of no table."""
        first, hits = self.hits(table, tokens)
        start = first + len(hits)
        known = max(start * self.block_size, table.host_tokens if table.host else 0)
        end = self.blocks_for(min(len(tokens), known + ahead) if table.window else len(tokens))
        revived = sum(not self._refs[block] for block in hits)
        return first, hits, end - start, end - start + revived

    def load(
        self, table: BlockTable, tokens: Sequence[int], start: int, computed_ms: float, within_ms: float
    ) -> int:
        """Fill blocks from ``start`` on from the store; return how many tokens are there then.

        Where that is sooner done than to compute a block, in ``computed_ms``, and in ``within_ms`` for all.
        As in ``allocate``, the last token that there is room for is computed whatever is there.
        """
        assert self.store is not None, "there is somewhere to load from"
        first = start // self.block_size
        most = first + self.store.worth_reading(computed_ms, within_ms)
        last = min(most, (min(len(tokens), table.writable) - 1) // self.block_size)
        named = min(first, len(table.names))  # a fork that was swapped out at once has not all names
        for index, held in enumerate(self._contents(table, tokens, named, last), named):
            if index < first:
                continue
            block = table.blocks[index]
            if self._refs[block] > 1 or (data := self.store.read(held)) is None:
                break
            self._moves.load.append((data, block))
            start = (index + 1) * self.block_size
        return start

    def reserve(self, table: BlockTable, start: int, end: int) -> bool:
        """Make positions ``start:end`` writable, after ``start`` held ones. False, no change: no room."""
        blocks, first = table.blocks, start // self.block_size
        shared = first < len(blocks) and self._refs[blocks[first]] > 1
        more = max(0, self.blocks_for(end) - len(blocks))
        if more + shared > self.available:
            return False
        if shared:
            copy = self._take(1)[0]
            self._moves.copies.append((blocks[first], copy))
            self._drop(blocks[first])
            blocks[first] = copy
        blocks += self._take(more)
        table.writable = len(blocks) * self.block_size
        return True

    def register(self, table: BlockTable, tokens: Sequence[int], computed: int) -> None:
        """Enter the blocks that ``tokens[:computed]`` have filled in the prefix cache.

        If another block holds the same already, the table takes that one and gives its own back.
        """
        if table.full_at > computed:
            return
        prefix, first, last = self.prefix, table.full_at // self.block_size - 1, computed // self.block_size
        assert prefix is not None
        for index, held in enumerate(self._contents(table, tokens, first, last), first):
            block, known = table.blocks[index], prefix.find(held)
            if known is None:
                prefix.add(block, held)
                if not table.is_kept:
                    self._kept_out.add(block)
            elif known != block:
                self._share(known)
                self._drop(block)
                table.blocks[index] = known
            if table.is_kept and self._kept_out:
                self._kept_out.discard(table.blocks[index])
        table.full_at = (last + 1) * self.block_size

    def leave_behind(self, table: BlockTable, computed: int) -> None:
        """Let go of the blocks of which no row from position ``computed`` on sees a token."""
        if table.window and table.blocks:
            gone = self._before_window(computed, table.window)
            for index in range(table.gone, gone):
                self._drop(table.blocks[index])
                table.blocks[index] = 0
            table.gone = max(gone, table.gone)

    def _before_window(self, computed: int, window: int) -> int:
        return max(0, computed + 1 - window) // self.block_size

    def fork(self, table: BlockTable, computed: int) -> BlockTable:
        """A second table of the same ``computed`` tokens, which shares every block."""
        child = BlockTable(table.root, is_kept=table.is_kept, window=table.window)
        child.gone = table.gone
        child.blocks = table.blocks[: self.blocks_for(computed)]
        child.names = table.names.copy()
        child.full_at = table.full_at
        for block in child.held:
            self._refs[block] += 1
        table.writable = 0  # the next write asks, and copies what is shared
        return child

    def free(self, table: BlockTable, tokens: Sequence[int] = (), computed: int = 0) -> None:
        """Take everything back. ``tokens[:computed]`` stay in the prefix cache, a partial block included."""
        if table.blocks and self.prefix is not None:
            self.register(table, tokens, computed)
            self._register_part(table, tokens, computed)
        for block in reversed(table.held):  # a prefix outlives what follows it
            self._drop(block)
        table.blocks = array("i")
        table.writable = table.gone = 0
        self._host_free += table.host
        table.host = []

    def swap_out(self, table: BlockTable, computed: int) -> bool:
        """Move ``computed`` tokens to the host and free the blocks. False: no room there, no change."""
        gone, count = table.gone, self.blocks_for(computed) - table.gone
        if count > len(self._host_free):
            return False
        host = [self._host_free.pop() for _ in range(count)]
        self._moves.swap_out.extend(zip(table.held, host, strict=False))
        self.free(table)
        table.host, table.host_tokens, table.gone = host, computed, gone
        return True

    def count(self, hits: int, misses: int) -> None:
        """A request found ``hits`` of its tokens here, and must compute ``misses``."""
        if self.prefix is not None:
            self.prefix.hit_tokens += hits
            self.prefix.miss_tokens += misses

    def set_limit(self, max_blocks: int) -> None:
        """There may be ``max_blocks`` from now on, as memory comes and goes. Those that are there stay."""
        self.limit, self.max_blocks = max_blocks, max(max_blocks, self.capacity)

    def drain(self) -> Plan:
        """What is to be done to the arrays since last asked, before anything else is written: a plan of that.

        Between two drains, what takes blocks from tables comes before ``allocate``: swapping out and in
        at once would otherwise meet in a block or a slot.
        """
        moves, self._moves = replace(self._moves, num_blocks=self.capacity), Plan([], 0)
        return moves

    def grow(self, count: int) -> None:
        """Add ``count`` blocks to the pool, as far as ``max_blocks`` allows."""
        old = len(self._refs)
        new = min(old + count, self.max_blocks)
        self._refs.extend([0] * (new - old))
        self._free[:0] = array("i", reversed(range(old, new)))  # lowest first, so that slabs can go

    def capacity_within(self, limit: int) -> int:
        """What ``shrink`` to ``limit`` would leave: slabs for what is used; one for what is on the host."""
        used = self.capacity - len(self._cached) - len(self._free)
        used = max(used, len(self._host_free) < self._host_blocks)
        return min(-(-max(used, limit) // self._slab) * self._slab, self.capacity)

    def shrink(self, tables: Iterable[BlockTable] = (), limit: int = 0) -> None:
        """Give back slabs at the pool's end, down to ``limit`` blocks or what is used.

        What they cached is forgotten; what is used there moves to the front. ``tables`` are all there are.
        """
        capacity = self.capacity_within(limit)
        for block in [block for block in self._cached if block >= capacity]:
            self._forget(block)
        self._free = array("i", (block for block in self._free if block < capacity))
        moved = {block: self._moved(block) for block in range(capacity, len(self._refs)) if self._refs[block]}
        self._moves.copies.extend(moved.items())
        for table in tables if moved else ():
            table.blocks = array("i", [moved.get(block, block) for block in table.blocks])
        del self._refs[capacity:]

    def _moved(self, block: int) -> int:
        """Where a used block lies from now on: in a free place, or in that of the oldest cached block."""
        if not self._free:
            self._evict(next(iter(self._cached)))
        place = self._free.pop()
        self._refs[place] = self._refs[block]
        if self.prefix is not None and block in self.prefix:
            self.prefix.move(block, place)
        if block in self._kept_out:
            self._kept_out ^= {block, place}
        return place

    def clear(self) -> None:
        """Forget what is cached: the arrays were lost. No table may hold a block."""
        for block in list(self._cached):
            self._forget(block)
        assert len(self._free) == self.capacity, "a table still holds a block"
        self.drain()

    def usage(self, held: Iterable[tuple[BlockTable, int]], pinned: int = 0) -> Usage:
        """The accounts; ``held`` is each table with the number of tokens that it holds."""
        size = self.block_size
        filled: dict[int, int] = {}  # of each block that may not be full
        for table, computed in held:
            for index in range(computed // size, len(table.blocks)):
                block = table.blocks[index]
                filled[block] = max(filled.get(block, 0), computed - index * size)
        return Usage(
            capacity=self.capacity,
            limit=self.max_blocks,
            used=self.capacity - len(self._cached) - len(self._free),
            cached=len(self._cached),
            free=len(self._free),
            wasted_slots=sum(size - max(0, tokens) for tokens in filled.values()),
            host_used=self._host_blocks - len(self._host_free),
            pinned=pinned,
        )

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Assert that the accounts are those of ``tables``, which are all that there are."""
        tables = list(tables)
        counted = Counter(block for table in tables for block in table.held)
        assert counted == Counter({b: n for b, n in enumerate(self._refs) if n}), "reference counts"
        kept = [*counted, *self._cached, *self._free]
        assert sorted(kept) == list(range(self.capacity)), "a block is used, cached or free: one of them"
        host = [slot for table in tables for slot in table.host] + self._host_free
        assert sorted(host) == list(range(self._host_blocks)), "a host slot is lost or doubled"
        registered = {block for block in range(self.capacity) if self.prefix and block in self.prefix}
        assert len(registered) == len(self.prefix or ()), "registered beyond the pool"
        assert set(self._cached) <= registered, "cached, but not to be found"
        assert not registered & set(self._free), "to be found, but free"

    def hits(self, table: BlockTable, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """How many blocks lie before the window, and those found behind it; never the last token's."""
        if table.window:
            return self._hits_in_window(table, tokens)
        found: list[int] = []
        if self.prefix is None:
            return 0, found
        for held in self._contents(table, tokens, 0, (len(tokens) - 1) // self.block_size):
            block = self.prefix.find(held)
            if block is None:
                break
            found.append(block)
        return 0, found

    def _hits_in_window(self, table: BlockTable, tokens: Sequence[int]) -> tuple[int, list[int]]:
        if table.host or self.prefix is None:
            return table.gone, []  # what lies there is all that is needed
        size, run, end = self.block_size, 0, 0
        contents = self._contents(table, tokens, 0, (len(tokens) - 1) // size)
        found = [self.prefix.find(held) for held in contents]
        for index, block in enumerate(found):
            run = 0 if block is None else run + 1
            if run > max(0, index - self._before_window((index + 1) * size, table.window)):
                end = index + 1
        first = self._before_window(end * size, table.window)
        return first, [block for block in found[first:end] if block is not None]

    def _part(self, table: BlockTable, tokens: Sequence[int], index: int) -> tuple[int, int]:
        """A cached block that begins like the table's block ``index``, and how many tokens agree."""
        start = index * self.block_size
        rest = tokens[start : min(start + self.block_size, len(tokens) - 1)]
        if self.prefix is None or not rest:
            return -1, 0
        return self.prefix.find_part(table.before(index), encode(rest))

    def _register_part(self, table: BlockTable, tokens: Sequence[int], computed: int) -> None:
        index = computed // self.block_size
        rest = encode(tokens[index * self.block_size : computed])
        if self.prefix is not None and rest:
            before, block = table.before(index), table.blocks[index]
            known, alike = self.prefix.find_part(before, rest)
            if known != block and alike < computed % self.block_size:
                self.prefix.add(block, content(before, rest))

    def _contents(self, table: BlockTable, tokens: Sequence[int], first: int, last: int) -> Iterator[bytes]:
        """What the table's full blocks ``first:last`` are to hold; each name is computed once."""
        size, names, before = self.block_size, table.names, table.before(first)
        for index in range(first, last):
            own = encode(tokens[index * size : (index + 1) * size])
            if len(names) == index:
                names.append(chain(before, own))
            name = names[index]
            yield content(before, own, name)
            before = name

    def _swap_in(self, table: BlockTable, hits: int) -> int:
        """Bring back what the prefix cache did not have; return how many tokens are there now."""
        back = zip(table.host[hits - table.gone :], table.blocks[hits:], strict=False)
        self._moves.swap_in.extend(back)
        self._host_free += table.host
        table.host = []
        return max(table.host_tokens, hits * self.block_size)

    def _take(self, count: int) -> array[int]:
        """Blocks that nobody holds, for the caller to hold."""
        while (first := len(self._free) - count) < 0:
            if len(self._refs) < self.max_blocks:
                self.grow(self._slab)
            else:
                self._evict(next(iter(self._cached)))
        taken = self._free[first:]
        taken.reverse()
        del self._free[first:]
        for block in taken:
            self._refs[block] = 1
        return taken

    def unsaved(self, first: int = 0) -> list[tuple[int, bytes]]:
        """The cached blocks from ``first`` on that the store is to have and has not, with what they hold."""
        cached = [block for block in self._cached if block >= first]
        return [(block, held) for block in cached if (held := self._to_be_saved(block))]

    def _to_be_saved(self, block: int) -> bytes:
        """What a registered block holds, if that is for the store and not there; else nothing."""
        if self.store is None or self.prefix is None or block in self._kept_out:
            return b""
        held = self.prefix.content(block)
        return b"" if held in self.store else held

    def _evict(self, block: int) -> None:
        if held := self._to_be_saved(block):
            self._moves.save.append((block, held))
        self._forget(block)

    def _forget(self, block: int) -> None:
        assert self.prefix is not None
        del self._cached[block]
        self.prefix.forget(block)
        self._kept_out.discard(block)
        self._free.append(block)

    def _share(self, block: int) -> None:
        if not self._refs[block]:
            del self._cached[block]
        self._refs[block] += 1

    def _drop(self, block: int) -> None:
        self._refs[block] -= 1
        if not self._refs[block]:
            if self.prefix is not None and block in self.prefix:
                self._cached[block] = None
            else:
                self._free.append(block)
