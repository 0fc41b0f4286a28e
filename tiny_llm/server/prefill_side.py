"""Owns role "prefill": prompts that other processes ask for are computed here, and their blocks sent there.

A prompt is a request like any other, of one token. After each step what it has filled is sent, as far as the
other side takes it; what must wait for that lies in the prefix cache, and may be lost there.
"""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from tiny_llm.distributed.handshake import hang_up, limit_waits, shake_hands
from tiny_llm.distributed.wire import Frame, Wire
from tiny_llm.engine.async_llm import AsyncLLM, EngineDeadError
from tiny_llm.engine.handover import Handover
from tiny_llm.errors import ConfigError, PeerError, TinyLLMError
from tiny_llm.kv.prefix import DIGEST
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.settings import MAX_PRIORITY
from tiny_llm.server.peer import ASK, BLOCKS, CANCEL, END, Peer, blocks_of_frame, fingerprint

_COMPUTED = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
_LEVEL_TOKENS = 1024  # by which a longer prompt ranks a level lower: short ones do not wait for it
_MOST_WAITING = 2  # frames of a connection
_LOG = logging.getLogger("tiny_llm.peer")


class PrefillSide:
    """Computes on ``llm`` what is asked for at ``peer.address``; ConfigError if it cannot listen there."""

    def __init__(self, llm: AsyncLLM, peer: Peer) -> None:
        self._llm = llm
        self._peer = peer
        self._fingerprint = fingerprint(llm.llm)
        self._asking: set[_Asking] = set()
        try:
            family = socket.AF_INET6 if ":" in peer.place[0] else socket.AF_INET
            self._listening = socket.create_server(peer.place, family=family)
        except OSError as error:
            raise ConfigError(f"peer (--peer) {peer.address} cannot be listened on: {error}.") from None
        self.port: int = self._listening.getsockname()[1]
        llm.after_step = self._send
        threading.Thread(target=self._accept, name="peer-accept", daemon=True).start()

    def close(self) -> None:
        """Accept no more, and hang up on all."""
        hang_up(self._listening)
        self._listening.close()
        for asking in list(self._asking):
            asking.wire.abort()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                came = self._listening.accept()
                threading.Thread(target=self._answer, args=came, name="peer-reader", daemon=True).start()

    def _answer(self, connection: socket.socket, address: tuple[str, int]) -> None:
        """One connection, from its first byte to its last."""
        try:
            limit_waits(connection, self._peer.timeout_s)
            shake_hands(connection, self._peer.secret, self._fingerprint, accepting=True)
            asking = _Asking(self._llm, Wire(connection, self._peer.timeout_s))
            self._asking.add(asking)
            try:
                asking.read()
            finally:
                self._asking.discard(asking)
                asking.end()
        except (PeerError, OSError, EngineDeadError) as error:
            _LOG.warning("the process at %s is let go: %s", address[0], error)
        finally:
            connection.close()

    def _send(self) -> None:
        for asking in list(self._asking):
            asking.send()


@dataclass(slots=True)
class _Going:
    """A prompt that is computed: its request, and which of its blocks is the next to go."""

    request: int
    handover: Handover
    first: int


class _Asking:
    """One process that asks. What is ``_going`` to it is the engine's thread's."""

    def __init__(self, llm: AsyncLLM, wire: Wire) -> None:
        self.wire = wire
        self._llm = llm
        self._going: dict[int, _Going] = {}
        self._most = blocks_of_frame(llm.llm.engine.cache.format.block_bytes)
        self._body = memoryview(b"")
        wire.sent = self._post_send

    def read(self) -> None:
        """What it asks for, until it hangs up, by PeerError or OSError."""
        while True:
            frame = self.wire.receive(self._place)
            if frame.kind == ASK:
                self._llm.post(partial(self._begin, frame, self._body))
            elif frame.kind == CANCEL:
                self._llm.post(partial(self._cancel, frame.number))

    def end(self) -> None:
        """It is gone: nothing more is computed for it."""
        self.wire.close()
        for number in list(self._going):
            self._llm.post(partial(self._cancel, number))

    def send(self) -> None:
        """What has been computed meanwhile, as far as the queue has place. On the engine's thread."""
        for number, going in list(self._going.items()):
            while self.wire.waiting < _MOST_WAITING and self._send_next(number, going):
                pass

    def _send_next(self, number: int, going: _Going) -> bool:
        """A prompt's next frame, if it is there; at its end, that. Whether more may be there."""
        handover, engine = going.handover, going.handover.engine
        is_lost = engine is not self._llm.llm.engine  # which was made anew
        count, data = (0, []) if is_lost else handover.give(going.first, self._most)
        if count:
            self.wire.put(Frame(BLOCKS, number, going.first, count), data)
            going.first += count
            return True
        if is_lost or engine.scheduler.sequence(going.request) is None:
            if data := [] if is_lost else handover.give_last(going.first):
                self.wire.put(Frame(BLOCKS, number, going.first, 1), data)
            self.wire.put(Frame(END, number))
            del self._going[number]
        return False

    def _post_send(self) -> None:
        if self._going:
            with suppress(EngineDeadError):
                self._llm.post(self.send)

    def _place(self, frame: Frame) -> memoryview:
        longest = DIGEST + 4 * self._llm.llm.max_context
        if frame.kind != ASK or not DIGEST < frame.size <= longest or frame.size % 4:
            raise PeerError(f"It sends {frame.size} bytes (kind {frame.kind}), which is no prompt for us.")
        self._body = memoryview(bytearray(frame.size))
        return self._body

    def _begin(self, frame: Frame, body: memoryview) -> None:
        llm, keep = self._llm.llm, bool(frame.amount)
        salt, tokens = body[:DIGEST].hex(), body[DIGEST:].cast("i").tolist()
        try:
            asked, params = llm.check(tokens[:-1], _COMPUTED)
            rank = -min(len(asked) // _LEVEL_TOKENS, MAX_PRIORITY)
            request = llm.engine.add(asked, params, priority=rank, salt=salt, keep=keep)
        except TinyLLMError as error:
            _LOG.warning("a prompt is not computed here: %s", error)
            self.wire.put(Frame(END, frame.number))
            return
        handover = Handover(llm.engine, tokens, salt, keep=keep)
        self._going[frame.number] = _Going(request, handover, frame.first)

    def _cancel(self, number: int) -> None:
        if going := self._going.pop(number, None):
            going.handover.engine.cancel(going.request)
