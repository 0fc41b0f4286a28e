"""Owns role "decode": another process computes long prompts, and their blocks come here before they begin.

What comes enters the prefix cache, between two steps and a little at a time, so running answers go on, and
the request then finds it as it would find anything else. If the other is not there, refuses, is too slow or
falls silent, what is missing is computed here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

import mlx.core as mx

from tiny_llm.distributed.handshake import limit_waits, shake_hands
from tiny_llm.distributed.wire import Frame, Wire
from tiny_llm.engine.async_llm import AsyncLLM, EngineDeadError
from tiny_llm.engine.handover import Handover
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import PeerError
from tiny_llm.kv.prefix import encode, root
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.server.peer import ASK, BLOCKS, CANCEL, END, Peer, blocks_of_frame, fingerprint

_BUFFERS = 4  # frames that may be on their way to the pool
_AGAIN_S = 1.0
_LOG = logging.getLogger("tiny_llm.peer")


@dataclass(slots=True, eq=False)
class _Coming:
    """A prompt whose blocks come: ``moved_s`` is when some last did, ``is_over`` whether these were all."""

    handover: Handover
    first: int
    is_over: bool = False
    began_s: float = field(default_factory=time.monotonic)
    moved_s: float = field(default_factory=time.monotonic)
    done: Future[None] = field(default_factory=Future)

    def end(self, *, is_over: bool = False) -> None:
        """Nothing more comes."""
        self.is_over |= is_over
        if not self.done.done():
            self.done.set_result(None)


class DecodeSide:
    """Has prompts of ``llm`` computed by ``peer``, for as long as it is there. ``counts`` what came of it."""

    def __init__(self, llm: AsyncLLM, peer: Peer) -> None:
        self.counts = dict.fromkeys(("asked", "blocks", "bytes", "in_vain"), 0)
        self._llm = llm
        self._peer = peer
        self._fingerprint = fingerprint(llm.llm)
        block_bytes = llm.llm.engine.cache.format.block_bytes
        self._most = blocks_of_frame(block_bytes)
        self._block_bytes = block_bytes
        self._numbers = count(1)
        self._wire: Wire | None = None
        self._closed = threading.Event()
        self._coming: dict[int, _Coming] = {}
        self._beginnings: dict[tuple[str, bytes], _Coming] = {}
        self._free: SimpleQueue[mx.array] = SimpleQueue()
        self._read: mx.array | None = None  # where the frame goes that is being read
        self._used: list[mx.array] = []
        self._written: list[mx.array] = []  # a step ago, so nobody reads them any more
        self._said = ""
        for _ in range(_BUFFERS):
            self._free.put(mx.array(bytearray(self._most * block_bytes)))  # type: ignore[arg-type]
        llm.supply, llm.after_step = self.supply, self._free_written
        self._thread = threading.Thread(target=self._stay_connected, name="peer-reader", daemon=True)
        self._thread.start()

    @property
    def is_connected(self) -> bool:
        """Whether the other process is there."""
        return self._wire is not None

    def close(self) -> None:
        """Ask no more: everything is computed here."""
        self._closed.set()
        if (wire := self._wire) is not None:
            wire.abort()
        self._thread.join()

    async def supply(self, ids: list[int], params: SamplingParams, options: Mapping[str, Any]) -> None:
        """Return when the other has computed what is missing of a prompt here, or will not."""
        joining, salt = options.get("joining"), options.get("salt", "")
        wire, is_own = self._wire, params.reads_prompt or (joining is not None and joining.names)
        if wire is None or is_own or len(ids) <= self._peer.least_tokens:
            return
        size, keep = self._llm.llm.engine.settings.block_size, options.get("keep", True)
        while coming := await self._llm.call(partial(self._begin, ids, salt, keep)):
            beginning = salt, encode(ids[: (coming.first + 1) * size])
            if (other := self._beginnings.get(beginning)) is None:
                break
            await asyncio.wait([asyncio.wrap_future(other.done)])
            if not other.is_over:  # else it has brought what we lack too, or some of it
                return
        if coming is None:
            return
        number = next(self._numbers)
        self._beginnings[beginning] = self._coming[number] = coming
        self.counts["asked"] += 1
        try:
            wire.put(Frame(ASK, number, coming.first, int(keep)), [root(salt), encode(ids)])
            if self._wire is wire:  # else it was lost meanwhile
                await self._wait(coming, len(ids) - coming.first * size)
        finally:
            del self._beginnings[beginning], self._coming[number]
            coming.end()
            if not coming.is_over:
                self.counts["in_vain"] += 1
                wire.put(Frame(CANCEL, number))

    def _begin(self, ids: list[int], salt: str, keep: bool, llm: LLM) -> _Coming | None:
        """None where too little is missing, or nothing is kept. On the engine's thread."""
        blocks, handover = llm.engine.scheduler.blocks, Handover(llm.engine, ids, salt, keep=keep)
        if blocks.prefix is None:
            return None
        first = handover.there()
        missing = len(ids) - 1 - first * blocks.block_size
        return _Coming(handover, first) if missing >= self._peer.least_tokens else None

    async def _wait(self, coming: _Coming, tokens: int) -> None:
        timeout_s, done = self._peer.timeout_s, asyncio.wrap_future(coming.done)
        while not done.done():
            end = min(coming.moved_s + timeout_s, coming.began_s + timeout_s * (1 + tokens / 1024))
            left = end - time.monotonic()
            if left <= 0:
                return
            await asyncio.wait([done], timeout=left)

    def _stay_connected(self) -> None:
        while not self._closed.is_set():
            try:
                self._connect()
            except (PeerError, OSError) as error:
                self._say(f"prompts are computed here, as {self._peer.address} does not: {error}")
            except EngineDeadError:
                return
            self._closed.wait(_AGAIN_S)

    def _connect(self) -> None:
        """Connect, and read until that ends, by PeerError or OSError."""
        timeout_s = self._peer.timeout_s
        connection = socket.create_connection(self._peer.place, timeout=timeout_s)
        wire = None
        try:
            limit_waits(connection, timeout_s)
            shake_hands(connection, self._peer.secret, self._fingerprint, accepting=False)
            self._wire = wire = Wire(connection, timeout_s)
            self._say(f"prompts are computed by {self._peer.address}")
            while not self._closed.is_set():
                self._take_frame(wire.receive(self._place))
        finally:
            self._wire = None
            for coming in list(self._coming.values()):
                coming.end()
            if self._read is not None:
                self._free.put(self._read)
                self._read = None
            if wire is not None:
                wire.close()
            else:
                connection.close()

    def _say(self, what: str) -> None:
        if what != self._said and not self._closed.is_set():
            _LOG.log(logging.WARNING if self._said or not self.is_connected else logging.INFO, what)
            self._said = what

    def _place(self, frame: Frame) -> memoryview:
        """Where the body of a frame goes: waits for a place, so that the other must wait too."""
        is_right = frame.kind == BLOCKS and frame.size == frame.amount * self._block_bytes
        if not is_right or frame.amount > self._most:
            raise PeerError(f"It sends {frame.size} bytes (kind {frame.kind}, {frame.amount} blocks).")
        try:
            self._read = self._free.get(timeout=self._peer.timeout_s)
        except Empty:
            raise PeerError(f"No step has ended here for {self._peer.timeout_s:g} s.") from None
        return memoryview(self._read)[: frame.size]  # type: ignore[arg-type]  # MLX's stubs lack it

    def _take_frame(self, frame: Frame) -> None:
        coming = self._coming.get(frame.number)
        if coming is not None:
            coming.moved_s = time.monotonic()
        if frame.kind == BLOCKS:
            assert self._read is not None
            data, self._read = self._read, None
            self._llm.post(partial(self._write, coming, frame, data))
        elif frame.kind == END and coming is not None:
            self._llm.post(partial(coming.end, is_over=True))  # behind its blocks

    def _write(self, coming: _Coming | None, frame: Frame, data: mx.array) -> None:
        """Blocks have come. On the engine's thread."""
        engine = self._llm.llm.engine
        if coming is not None and not coming.done.done() and coming.handover.engine is engine:
            try:
                took = coming.handover.take(frame.first, frame.amount, data[: frame.size])
            except Exception as error:  # whoever waits is not to pay for it
                _LOG.warning("blocks could not be taken: %s: %s", type(error).__name__, error)
                took = False
            self.counts["blocks"] += frame.amount * took
            self.counts["bytes"] += frame.size * took
            if not took:
                coming.end()
        self._used.append(data)
        if not len(engine):  # no step will come to free it
            mx.eval(engine.cache.arrays())
            self._free_written()
            self._free_written()

    def _free_written(self) -> None:
        """After a step: what was written before the one before is written."""
        for data in self._written:
            self._free.put(data)
        self._written, self._used = self._used, []
