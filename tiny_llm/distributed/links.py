"""One connection between two ranks that know the same secret: frames of bytes, each behind its length.

What travels after the handshake is neither hidden nor signed: ranks are in one machine, or on a network of
their own.
"""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress

from tiny_llm.distributed.handshake import hang_up, read_exactly, shake_hands
from tiny_llm.errors import ConfigError, GroupError, PeerError

MAX_FRAME = 2**26
"""Bytes of what is read at once: a length beyond it is no message of ours, and nothing is read."""
_RANKS = b"ranks of one model".ljust(32, b"\0")  # what both are, in place of a fingerprint
_PATIENCE_S = 5.0  # for a stranger to say who it is
_RETRY_S = 0.1
_LENGTH = struct.Struct("<I")


class Link:
    """``socket``'s other side is ``who``. Raises GroupError where that is gone, and after ``abort``."""

    def __init__(self, sock: socket.socket, who: str) -> None:
        self.socket = sock
        self.who = who
        self.fault: str | None = None
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        """Send a frame."""
        try:
            self.socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise self._lost(error) from None

    def receive(self) -> bytearray:
        """The next frame, within the socket's time-out."""
        (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if size > MAX_FRAME:
            raise GroupError(f"{self.who} announces {size:,} bytes, but at most {MAX_FRAME:,} are read.")
        return self._exactly(size)

    def abort(self, why: str) -> None:
        """Whoever waits here, and whoever comes, hears of ``why``. For any thread."""
        self.fault = self.fault or why
        hang_up(self.socket)

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        try:
            read_exactly(self.socket, memoryview(data))
        except OSError as error:
            raise self._lost(error) from None
        except PeerError:
            raise self._lost(None) from None
        return data

    def _lost(self, error: OSError | None) -> GroupError:
        if isinstance(error, TimeoutError):
            return GroupError(self.fault or f"{self.who} did not answer in time (--rank-timeout).")
        why = error.strerror if error is not None else "it hung up"
        return GroupError(self.fault or f"{self.who} is gone ({why}).")


def address_of(text: str, name: str) -> tuple[str, int]:
    """(host, port) of "HOST:PORT". Raises ConfigError, which says that ``name`` is wrong."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise ConfigError(f"{name} is {text!r}, expected HOST:PORT, such as 192.168.1.2:7000.")
    return host.strip("[]"), int(port)


def listen(address: tuple[str, int], name: str) -> socket.socket:
    """A socket that others can connect to. Raises ConfigError where the address cannot be had."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(place)
            listening.listen()
        except OSError:
            listening.close()
            raise
    except OSError as error:
        where = f"{address[0]}:{address[1]}"
        raise ConfigError(
            f"{name}: ranks cannot meet at {where}: {error.strerror}. Another group may be there; choose "
            "another port."
        ) from None
    return listening


def connect(address: tuple[str, int], secret: bytes, until: float) -> socket.socket:
    """A socket to who listens at ``address``, as soon as somebody does. Raises GroupError for nobody."""
    while True:
        left = until - time.monotonic()
        try:
            sock = socket.create_connection(address, timeout=max(_RETRY_S, left))
            break
        except OSError as error:
            if left < _RETRY_S:
                why = f"{address[0]}:{address[1]}, where ranks are to meet, cannot be reached"
                raise GroupError(
                    f"{why}: {error.strerror or error}. Was rank 0 started, and there?"
                ) from None
            time.sleep(_RETRY_S)
    sock.settimeout(max(_RETRY_S, until - time.monotonic()))
    return _known(sock, secret, accepting=False)


def accept(listening: socket.socket, secret: bytes, until: float) -> socket.socket:
    """A socket to the next one who comes and knows the secret; others are hung up on.

    Raises GroupError for one who says what only another version says, TimeoutError if nobody comes.
    """
    while True:
        listening.settimeout(max(0.001, until - time.monotonic()))
        sock, _ = listening.accept()
        sock.settimeout(min(_PATIENCE_S, max(_RETRY_S, until - time.monotonic())))
        with suppress(GroupError):
            return _known(sock, secret, accepting=True)


def _known(sock: socket.socket, secret: bytes, *, accepting: bool) -> socket.socket:
    """``sock``, once each side knows that the other one has the secret. Raises GroupError if it has not."""
    try:
        shake_hands(sock, secret.decode(), _RANKS, accepting=accepting)
    except (PeerError, OSError) as error:
        sock.close()
        raise GroupError(
            f"Ranks cannot meet: {error} Give all the same TINY_LLM_RANK_SECRET and tiny_llm."
        ) from None
    return sock
