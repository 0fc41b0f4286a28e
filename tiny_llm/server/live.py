"""Owns GET /live: the engine's pictures as events, the same ones for all who watch.

A picture is of one moment, as it is taken on the engine's thread between two steps: numbers only, no text,
no token, and not whose request a sequence is. One is taken when somebody waits for the next, so none while
nobody watches; and so seldom that taking it is at most ``MAX_SHARE`` of the engine's time. Who reads slowly
misses some.
"""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Iterable

from tiny_llm.data import Sequence
from tiny_llm.engine.engine import Engine
from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.server.events import event_of
from tiny_llm.server.problems import Problem
from tiny_llm.server.service import Service, with_first

FREE, CACHED, SHARED, OWNED = range(4)  # what a byte of the block map says; owners are from OWNED to 255
MAX_CELLS = 4096  # cells of the block map; of a larger pool, each stands for several blocks
MAX_ROWS = 64  # sequences that are told one by one, those that run before those that wait


def picture(engine: Engine) -> dict[str, object]:
    """All that a display needs, as JSON holds it. Totals are since the engine began, times in seconds.

    ``cells`` is a byte a cell, as ``block_map`` has them, in base64; a sequence's byte is
    ``owner(its id)``. ``rows``: id, 1 if it runs, prompt tokens, tokens computed, tokens known, the most
    that there may be, tokens of the prompt that were cached, blocks held. ``cost_s``: what it took.
    """
    began = time.perf_counter()
    scheduler, stats = engine.scheduler, engine.stats()
    totals, running = stats.totals, scheduler.running()
    owned = ((table, owner(seq.id)) for seq, table in running)
    cells = block_map(scheduler.blocks, owned, MAX_CELLS)
    rows = [_row(seq, len(table.blocks)) for seq, table in running[:MAX_ROWS]]
    rows += [_row(seq, 0) for seq in scheduler.waiting(MAX_ROWS - len(rows))]
    return {
        "now": began,
        "block_size": scheduler.blocks.block_size,
        "blocks": stats.blocks._asdict(),
        "cells": b64encode(cells).decode(),
        "rows": rows,
        "running": stats.running,
        "waiting": stats.waiting,
        "steps": totals.steps,
        "prompt_tokens": totals.prompt_tokens,
        "decodes": totals.decodes,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "generation_tokens": totals.generation_tokens,
        "first_tokens": sum(totals.ttft_s.counts),
        "ttft_s": totals.ttft_s.total,
        "hit_tokens": stats.prefix_hit_tokens,
        "miss_tokens": stats.prefix_miss_tokens,
        "preempted": sum(stats.preempted.values()),
        "cost_s": time.perf_counter() - began,
    }


def block_map(blocks: BlockManager, owned: Iterable[tuple[BlockTable, int]], most: int) -> bytearray:
    """The pool in at most ``most`` cells of equally many blocks, a byte a cell.

    ``owned`` is each table with its owner's byte. A cell of several blocks shows a used one, if any.
    """
    each = max(1, -(-blocks.capacity // most))
    cells = bytearray(-(-blocks.capacity // each))
    counts = blocks.reference_counts
    for block in blocks.cached_blocks:
        cells[block // each] = CACHED
    for table, byte in owned:
        for block in table.blocks:
            cells[block // each] = byte if counts[block] == 1 else SHARED
    return cells


def owner(seq_id: int) -> int:
    """A sequence's byte in the block map: different for those that come one after the other."""
    return OWNED + seq_id % (256 - OWNED)


def _row(seq: Sequence, blocks: int) -> list[int]:
    """As ``picture`` says."""
    who = [seq.id, int(seq.status == "running")]
    so_far = [seq.prompt_len, seq.num_computed_tokens, len(seq.tokens)]
    return [*who, *so_far, seq.prompt_len + seq.params.max_tokens, seq.cached_tokens, blocks]


PERIOD_S = 0.25
MAX_SHARE = 0.005
MAX_WATCHERS = 16


class Live:
    """The pictures of one service's engine."""

    def __init__(self, service: Service) -> None:
        self.watchers = 0
        self._service = service
        self._next: asyncio.Task[bytes] | None = None
        self._due = 0.0

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """Events until the watcher leaves or the server drains. Raises Problem if too many watch."""
        events = self._events()
        return with_first(await anext(events), events)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        if self.watchers >= MAX_WATCHERS:
            what = f"{MAX_WATCHERS} watch the engine already, which is the most."
            raise Problem(429, what, code="too_many_watchers")
        self.watchers += 1
        try:
            while not self._service.draining:
                if self._next is None or self._next.done():
                    self._next = asyncio.ensure_future(self._take())
                yield await asyncio.shield(self._next)
        finally:
            self.watchers -= 1
            if not self.watchers and self._next is not None:
                self._next.cancel()

    async def _take(self) -> bytes:
        """The next picture, when its time has come."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._due - loop.time())
        taken = await self._service.engine.call(lambda llm: picture(llm.engine))
        cost = taken["cost_s"]
        assert isinstance(cost, float)
        self._due = loop.time() + max(PERIOD_S, cost / MAX_SHARE)
        return event_of(taken)
