"""Owns frames between two processes: what is sent lies where it was made, what comes where it is wanted.

A frame is a head of fixed size, a body, and a CRC-32 of both. How large a body may be is asked before a byte
of it is read, of whoever has the place for it. Sending has a thread of its own, which also says every now and
then that we are still here.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import NamedTuple
from zlib import crc32

from tiny_llm.distributed.handshake import hang_up, limit_waits, read_exactly
from tiny_llm.errors import PeerError

BEAT = 0  # the kind of a frame that says nothing
_HEAD = struct.Struct("<4sIQIIQ")
_MAGIC = b"tlkv"
_CRC_BYTES = 4
_BEAT_S = 0.25
_MOST_PARTS = 512  # that the system takes at once


class Frame(NamedTuple):
    """What a frame is about; its body has ``size`` bytes. The other numbers are for the two ends to know."""

    kind: int
    number: int = 0
    first: int = 0
    amount: int = 0
    size: int = 0


class Wire:
    """Frames on a ``connection`` whose ends know each other; no wait is longer than ``timeout_s``.

    ``sent`` is called by the sending thread after each frame. Who reads closes it.
    """

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        limit_waits(connection, timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self.sent: Callable[[], None] | None = None
        self._head = memoryview(bytearray(_HEAD.size))
        self._crc = memoryview(bytearray(_CRC_BYTES))
        self._queue: SimpleQueue[tuple[Frame, Sequence[memoryview | bytes]] | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="peer-sender", daemon=True)
        self._sender.start()

    @property
    def waiting(self) -> int:
        """Frames that wait to be sent."""
        return self._queue.qsize()

    def put(self, frame: Frame, parts: Sequence[memoryview | bytes] = ()) -> None:
        """Send a frame soon, with a body of ``parts``, bytes each: they stay where they are until then."""
        self._queue.put((frame._replace(size=sum(map(len, parts))), parts))

    def receive(self, place: Callable[[Frame], memoryview]) -> Frame:
        """The next frame, its body in what ``place`` has for it, which may raise PeerError first.

        Raises PeerError for silence, the end, and what is damaged; OSError as sockets do.
        """
        magic, *numbers = _HEAD.unpack(read_exactly(self._connection, self._head))
        frame = Frame(*numbers)
        if magic != _MAGIC:
            raise PeerError("What it sends is damaged: no frame begins so.")
        body = place(frame) if frame.size else memoryview(b"")
        assert len(body) == frame.size
        read_exactly(self._connection, body)
        read_exactly(self._connection, self._crc)
        if crc32(body, crc32(self._head)).to_bytes(_CRC_BYTES, "little") != self._crc:
            raise PeerError("What it sends is damaged: a frame has another digest.")
        return frame

    def close(self) -> None:
        """Hang up, and wait for the thread that sends."""
        self.abort()
        self._queue.put(None)
        self._sender.join()
        self._connection.close()

    def abort(self) -> None:
        """Let whoever reads hear that it is over. For any thread."""
        hang_up(self._connection)

    def _send_all(self) -> None:
        try:
            while True:
                try:
                    item = self._queue.get(timeout=_BEAT_S)
                except Empty:
                    item = Frame(BEAT), ()
                if item is None:
                    return
                self._send(*item)
                if self.sent is not None and item[0].kind != BEAT:
                    self.sent()
        except OSError:  # it is gone, or takes nothing: who reads says so
            self.abort()

    def _send(self, frame: Frame, parts: Sequence[memoryview | bytes]) -> None:
        head = _HEAD.pack(_MAGIC, *frame)
        crc = crc32(head)
        for part in parts:
            crc = crc32(part, crc)
        left = [memoryview(part) for part in (head, *parts, crc.to_bytes(_CRC_BYTES, "little"))]
        first = 0
        while first < len(left):
            count = self._connection.sendmsg(left[first : first + _MOST_PARTS])
            while first < len(left) and count >= len(left[first]):
                count -= len(left[first])
                first += 1
            if count:
                left[first] = left[first][count:]
