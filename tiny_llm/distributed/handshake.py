"""Owns who is at the other end of a socket: the same version, the same model, somebody who knows the secret.

Both say what they are, and prove by an HMAC over what both have said, fresh numbers included, that they know
the secret: it never travels, and nothing that was said once can be said again. What comes afterwards is
neither encrypted nor signed.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
from contextlib import suppress

from tiny_llm.errors import PeerError
from tiny_llm.version import __version__

_MAGIC = b"tiny_llm peers 1"
_HELLO = struct.Struct("<16s16s32s1s31s")  # magic, version, fingerprint, which end, a number of its own
_PROOF_BYTES = 32


def limit_waits(connection: socket.socket, seconds: float) -> None:
    """Let the system end what waits longer: so a read of much is one call, and an idle one ends in time."""
    connection.settimeout(None)
    whole, part = divmod(int(seconds * 1e6), 10**6)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", whole, part))


def shake_hands(connection: socket.socket, secret: str, fingerprint: bytes, *, accepting: bool) -> None:
    """Raises PeerError for another end than ``fingerprint``'s with ``secret``, OSError as sockets do."""
    end = b"a" if accepting else b"c"  # so that nobody proves it with our own words
    own = _HELLO.pack(_MAGIC, __version__.encode(), fingerprint, end, os.urandom(31))
    connection.sendall(own)
    hello = read_exactly(connection, memoryview(bytearray(_HELLO.size)))
    magic, version, model, other_end, _ = _HELLO.unpack(hello)
    if magic != _MAGIC or other_end == end:
        raise PeerError("It does not speak as another tiny_llm does; is the address right?")
    key = secret.encode()
    connection.sendall(hmac.digest(key, own + bytes(hello), "sha256"))
    proof = read_exactly(connection, memoryview(bytearray(_PROOF_BYTES)))
    if not hmac.compare_digest(proof, hmac.digest(key, bytes(hello) + own, "sha256")):
        raise PeerError("It has another secret.")
    if (told := version.rstrip(b"\0").decode(errors="replace")) != __version__:
        raise PeerError(f"It is tiny_llm {told}, and this is {__version__}; run the same on both.")
    if model != fingerprint:
        raise PeerError(
            "Its keys and values are not ours: give both the same model, backend, --dtype, --quantize, "
            "--activations and --kv-dtype, on processors with the same instructions."
        )


def read_exactly(connection: socket.socket, buffer: memoryview) -> memoryview:
    """Fill ``buffer``, and return it. Raises PeerError for a silent or closed end, OSError as sockets do."""
    left = buffer
    while left:
        try:
            count = connection.recv_into(left, 0, socket.MSG_WAITALL)
        except BlockingIOError:
            raise PeerError("It says nothing.") from None
        if not count:
            raise PeerError("It has hung up.")
        left = left[count:]
    return buffer


def hang_up(connection: socket.socket) -> None:
    """Let whoever waits at either end hear of it. The descriptor stays its owner's to close."""
    with suppress(OSError):  # it is so already
        connection.shutdown(socket.SHUT_RDWR)
