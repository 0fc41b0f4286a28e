"""Frames between two processes, and who may send any: what is damaged, silent or a stranger's is refused."""

from __future__ import annotations

import hmac
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tiny_llm.distributed import handshake
from tiny_llm.distributed.handshake import limit_waits, shake_hands
from tiny_llm.distributed.wire import BEAT, Frame, Wire
from tiny_llm.errors import PeerError

MODEL, OTHER_MODEL = bytes(32), bytes([1] * 32)


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        other, _ = listening.accept()
    with one, other:
        for end in (one, other):
            limit_waits(end, 20.0)
        yield one, other


def ended(wire: Wire, kind: int) -> Frame:
    """The next frame of that kind, which has no body."""
    while (frame := wire.receive(lambda frame: memoryview(bytearray(frame.size)))).kind != kind:
        assert frame.kind == BEAT
    return frame


def test_what_is_sent_comes_whole_into_its_place() -> None:
    parts = [
        bytes([number % 251]) * (number * 7) for number in range(700)
    ]  # more than the system takes at once
    place = bytearray(sum(map(len, parts)))
    with pair() as (one, other):
        sender, receiver = Wire(one, 20.0), Wire(other, 20.0)
        sender.put(Frame(1, 2**40, 3, 4), parts)
        sender.put(Frame(2, 5))
        assert receiver.receive(lambda frame: memoryview(place)) == Frame(1, 2**40, 3, 4, len(place))
        assert place == b"".join(parts)
        assert ended(receiver, 2) == Frame(2, 5)
        sender.close()
        with pytest.raises(PeerError, match="hung up"):
            receiver.receive(lambda frame: memoryview(b""))
        receiver.close()


@pytest.mark.parametrize("place", [0, 3, 7, 30, 40, 59])  # of a frame of 32 + 24 + 4 bytes
def test_a_damaged_frame_is_refused(place: int) -> None:
    with pair() as (one, other), pair() as (into, outof):
        sender, receiver = Wire(one, 20.0), Wire(outof, 20.0)
        sender.put(Frame(1, 1, 1, 1), [b"x" * 24])
        data = bytearray(60)
        other.recv_into(data, 60, socket.MSG_WAITALL)
        data[place] ^= 1
        into.sendall(data)
        into.shutdown(socket.SHUT_WR)  # a size that was damaged is waited for

        def space(frame: Frame) -> memoryview:
            if frame.size > 2**20:
                raise PeerError("more than there is place for")
            return memoryview(bytearray(frame.size))

        with pytest.raises(PeerError, match=r"damaged|hung up|place"):
            receiver.receive(space)
        sender.close()
        receiver.close()


def test_a_size_is_refused_before_it_is_read() -> None:
    with pair() as (one, other):
        receiver = Wire(other, 20.0)
        one.sendall(b"tlkv" + Frame(1).kind.to_bytes(4, "little") + bytes(16) + (2**60).to_bytes(8, "little"))

        def refuse(frame: Frame) -> memoryview:
            raise PeerError(f"{frame.size} is too much")

        with pytest.raises(PeerError, match=f"{2**60} is too much"):
            receiver.receive(refuse)
        receiver.close()


def test_silence_ends_and_beats_do_not() -> None:
    with pair() as (one, other):
        receiver = Wire(other, 1.0)
        with pytest.raises(PeerError, match="says nothing"):
            receiver.receive(lambda frame: memoryview(b""))
        beating = Wire(one, 1.0)
        assert [receiver.receive(lambda frame: memoryview(b"")).kind for _ in range(3)] == [BEAT] * 3
        beating.close()
        receiver.close()


def greeted(one: tuple[str, bytes], other: tuple[str, bytes]) -> list[str]:
    """What two ends with (secret, model) say of each other; nothing where they agree."""

    def say(end: socket.socket, accepting: bool, secret: str, model: bytes) -> str:
        try:
            shake_hands(end, secret, model, accepting=accepting)
        except PeerError as error:
            return str(error)
        return ""

    with pair() as (a, b), ThreadPoolExecutor(2) as threads:
        both = [threads.submit(say, a, True, *one), threads.submit(say, b, False, *other)]
        return [said.result() for said in both]


def test_both_ends_see_another_secret_or_model() -> None:
    assert greeted(("s", MODEL), ("s", MODEL)) == ["", ""]
    assert greeted(("s", MODEL), ("t", MODEL)) == ["It has another secret."] * 2
    assert all(
        "not ours: give both the same model" in said for said in greeted(("s", MODEL), ("s", OTHER_MODEL))
    )
    assert greeted(("t", MODEL), ("s", OTHER_MODEL)) == ["It has another secret."] * 2, (
        "a stranger learns no more"
    )


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pair() as (one, other):
        monkeypatch.setattr(handshake, "__version__", "0.0.9")
        said = handshake._HELLO.pack(handshake._MAGIC, b"9.9", MODEL, b"c", bytes(31))
        other.sendall(said)
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(shake_hands, one, "s", MODEL, accepting=True)
            own = other.recv(len(said), socket.MSG_WAITALL)
            other.sendall(hmac.digest(b"s", said + own, "sha256"))
            with pytest.raises(PeerError, match=r"It is tiny_llm 9.9, and this is 0.0.9"):
                answer.result()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: here\r\n" + b"x" * 90, "ours"])
def test_strangers_and_our_own_words_are_refused(said: bytes | str) -> None:
    """Who sends back what we say knows no secret, but would have the right proof."""
    with pair() as (one, other), ThreadPoolExecutor(1) as threads:
        answer = threads.submit(shake_hands, one, "s", MODEL, accepting=True)
        own = other.recv(handshake._HELLO.size, socket.MSG_WAITALL)
        other.sendall(own if isinstance(said, str) else said)
        with pytest.raises(PeerError, match="does not speak as"):
            answer.result()
