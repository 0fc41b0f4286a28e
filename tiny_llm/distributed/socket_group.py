"""A group over plain sockets, one between each two ranks: for Linux and CI, and where a peer may be lost.

Whatever is waited for has a time-out. An array is evaluated when it is sent, so that collectives happen in
the order in which they are called; each is numbered, and two ranks that are not at the same one hear of it.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Mapping
from math import prod

import mlx.core as mx

from tiny_llm.distributed.handshake import hang_up
from tiny_llm.errors import GroupError

_HEAD = struct.Struct("<IQ")  # which message this is between the two, and how many bytes follow


class _Parcel:
    """Bytes on their way to or from one rank, head and content, as far as they have not come yet."""

    def __init__(self, rank: int, head: bytes | bytearray, content: memoryview) -> None:
        self.rank = rank
        self.head = head
        self.left = [memoryview(head), content]

    def passed(self, count: int) -> None:
        """So many bytes more are through."""
        while self.left and count >= len(self.left[0]):
            count -= len(self.left.pop(0))
        if self.left:
            self.left[0] = self.left[0][count:]


class SocketGroup:
    """``sockets`` lead to the other ranks, by rank. Nothing is waited for longer than ``timeout_s``.

    Every call raises GroupError for a rank that is gone, slow, or somewhere else, and after ``abort``.
    """

    def __init__(self, rank: int, sockets: Mapping[int, socket.socket], timeout_s: float) -> None:
        self.rank = rank
        self.size = len(sockets) + 1
        self._sockets = dict(sockets)
        self._timeout_s = timeout_s
        self._sent = dict.fromkeys(sockets, 0)
        self._received = dict.fromkeys(sockets, 0)
        self._fault: str | None = None
        for one in sockets.values():
            one.setblocking(False)
            if one.family in (socket.AF_INET, socket.AF_INET6):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def all_gather(self, x: mx.array) -> mx.array:
        """What all have, by rank: x [n, ...] to [size * n, ...]. Of nothing, nothing is sent."""
        if not x.size:
            return mx.concatenate([x] * self.size)
        own = _bytes_of(x)
        came = bytearray(self.size * len(own))
        places = memoryview(came)
        parts = [places[rank * len(own) : (rank + 1) * len(own)] for rank in range(self.size)]
        parts[self.rank][:] = own
        self._exchange(dict.fromkeys(self._sockets, own), {rank: parts[rank] for rank in self._sockets})
        return _array_of(came, (self.size * x.shape[0], *x.shape[1:]), x.dtype)

    def send(self, x: mx.array, to: int) -> mx.array:
        """Give ``x`` to rank ``to``: it is on its way when this returns."""
        self._exchange({to: _bytes_of(x)}, {})
        return x

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype, source: int) -> mx.array:
        """What rank ``source`` sends."""
        came = bytearray(prod(shape) * dtype.size)
        self._exchange({}, {source: memoryview(came)})
        return _array_of(came, shape, dtype)

    def abort(self, why: str) -> None:
        """Let whoever waits, and whoever calls from now on, hear of ``why``. For any thread."""
        self._fault = self._fault or why
        for one in self._sockets.values():
            hang_up(one)

    def close(self) -> None:
        """Hang up."""
        for one in self._sockets.values():
            one.close()

    def _exchange(self, give: Mapping[int, memoryview], take: Mapping[int, memoryview]) -> None:
        """Send and receive at once: two ranks that both send much first would wait for each other."""
        if self._fault:
            raise GroupError(self._fault)
        outgoing = [_Parcel(rank, self._next_head(rank, len(part)), part) for rank, part in give.items()]
        incoming = [_Parcel(rank, bytearray(_HEAD.size), part) for rank, part in take.items()]
        end = time.monotonic() + self._timeout_s
        while outgoing or incoming:
            moved = [self._push(parcel) for parcel in outgoing] + [self._pull(parcel) for parcel in incoming]
            outgoing = [parcel for parcel in outgoing if parcel.left]
            incoming = [parcel for parcel in incoming if parcel.left]
            if not any(moved):
                self._wait(outgoing, incoming, end)

    def _next_head(self, rank: int, size: int) -> bytes:
        self._sent[rank] += 1
        return _HEAD.pack(self._sent[rank], size)

    def _push(self, parcel: _Parcel) -> bool:
        """Send what the socket takes now; whether it took any."""
        try:
            parcel.passed(self._sockets[parcel.rank].sendmsg(parcel.left))
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._lost(parcel.rank, error.strerror) from None
        return True

    def _pull(self, parcel: _Parcel) -> bool:
        """Receive what is there now; whether there was any."""
        in_head = len(parcel.left) == 2
        try:
            count = self._sockets[parcel.rank].recv_into(parcel.left[0])
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._lost(parcel.rank, error.strerror) from None
        if not count:
            raise self._lost(parcel.rank, None)
        content = parcel.left[-1]
        parcel.passed(count)
        if in_head and len(parcel.left) < 2:
            self._check_head(parcel, len(content))
        return True

    def _check_head(self, parcel: _Parcel, expected: int) -> None:
        self._received[parcel.rank] += 1
        told, here = _HEAD.unpack(parcel.head), (self._received[parcel.rank], expected)
        if told != here:
            self.abort(
                f"Rank {parcel.rank} is at message {told[0]} of {told[1]} bytes where rank {self.rank} is at "
                f"{here[0]} of {here[1]}: they do not compute the same."
            )
            raise GroupError(self._fault)

    def _wait(self, outgoing: list[_Parcel], incoming: list[_Parcel], end: float) -> None:
        """Until something can be sent or received. Raises GroupError when the time is over."""
        poll, left = select.poll(), end - time.monotonic()
        wanted = dict.fromkeys((parcel.rank for parcel in [*outgoing, *incoming]), 0)
        for parcel in outgoing:
            wanted[parcel.rank] |= select.POLLOUT
        for parcel in incoming:
            wanted[parcel.rank] |= select.POLLIN
        for rank, events in wanted.items():
            poll.register(self._sockets[rank], events)
        if left <= 0 or not poll.poll(1e3 * left):
            late = sorted(wanted)
            ranks = f"Rank {late[0]}" if len(late) == 1 else f"Ranks {', '.join(map(str, late))}"
            self.abort(f"{ranks} did not answer within {self._timeout_s:g} s (--rank-timeout).")
            raise GroupError(self._fault)

    def _lost(self, rank: int, why: str | None) -> GroupError:
        self._fault = self._fault or f"Rank {rank} is gone ({why or 'it hung up'})."
        return GroupError(self._fault)


def _bytes_of(x: mx.array) -> memoryview:
    """An array's bytes where they lie, once it is computed."""
    flat = x.reshape(-1).view(mx.uint8)
    mx.eval(flat)
    return memoryview(flat)  # type: ignore[arg-type]  # MLX's stubs do not know that it is a buffer


def _array_of(data: bytearray, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(memoryview(data)).view(dtype).reshape(shape)  # type: ignore[arg-type]  # as above
