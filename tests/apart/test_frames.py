"""A frame by hand: its bytes, what is sent in pieces, and what is damaged or too large."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from zlib import crc32

import pytest

from tiny_llm.distributed.wire import Frame
from tiny_llm.errors import PeerError

pytestmark = pytest.mark.chapter("3.4")

BODY = [b"keys of two", b"", b"values"]
SIZE = sum(map(len, BODY))


def framed(frame: Frame, body: bytes = b"") -> bytes:
    head = struct.pack("<4sIQIIQ", b"tlkv", *frame)
    return head + body + struct.pack("<I", crc32(head + body))


def test_a_frame_is_its_head_its_body_and_a_digest_of_both(apart: SimpleNamespace) -> None:
    line = apart.Line()
    apart.wire(line)._send(Frame(2, 2**40, 3, 4, SIZE), BODY)
    assert bytes(line.data) == framed(Frame(2, 2**40, 3, 4, SIZE), b"".join(BODY))
    line = apart.Line()
    apart.wire(line)._send(Frame(3, 7), [])
    assert bytes(line.data) == framed(Frame(3, 7)), "one without a body, too"


@pytest.mark.parametrize("at_once", [1, 3, 11, 32, 43])
def test_what_the_system_takes_in_pieces_is_sent_whole(apart: SimpleNamespace, at_once: int) -> None:
    """11 and 43 end where a part does, 32 with the head: what comes next begins anew."""
    line = apart.Line(at_once=at_once)
    apart.wire(line)._send(Frame(2, 1, size=SIZE), BODY)
    assert bytes(line.data) == framed(Frame(2, 1, size=SIZE), b"".join(BODY))


def test_many_parts_are_more_than_one_call_and_none_is_copied(apart: SimpleNamespace) -> None:
    parts = [bytes([number % 251]) * 3 for number in range(1300)]
    line = apart.Line()
    apart.wire(line)._send(Frame(2, size=3900), [memoryview(part) for part in parts])
    assert bytes(line.data) == framed(Frame(2, size=3900), b"".join(parts))
    assert max(map(len, line.calls)) <= 512, "the system takes 1,024 at a time, or fewer"
    lies = {id(part) for part in parts}
    assert sum(id(one.obj) in lies for call in line.calls for one in call) >= 1300, (
        "a part lies where it was made"
    )


def test_what_is_received_lies_where_it_is_wanted(apart: SimpleNamespace) -> None:
    asked, place = [], bytearray(SIZE)
    two = framed(Frame(2, 5, 6, 7, SIZE), b"".join(BODY)) + framed(Frame(3, 8))

    def space(frame: Frame) -> memoryview:
        asked.append((frame, line.at))
        return memoryview(place)

    for at_once in (1000, 5):
        line = apart.Line(two, at_once)
        wire = apart.wire(line)
        asked.clear()
        assert wire.receive(space) == Frame(2, 5, 6, 7, SIZE)
        assert bytes(place) == b"".join(BODY)
        assert asked == [(Frame(2, 5, 6, 7, SIZE), 32)], "it is asked before a byte of the body is read"
        assert wire.receive(space) == Frame(3, 8) and len(asked) == 1, "without a body no place is needed"
        assert line.at == len(two), "and not a byte of what comes next is taken"


def test_what_has_no_place_is_not_read(apart: SimpleNamespace) -> None:
    line = apart.Line(framed(Frame(2, size=2**50)))

    def refuse(frame: Frame) -> memoryview:
        raise PeerError(f"{frame.size} is too much")

    with pytest.raises(PeerError, match="too much"):
        apart.wire(line).receive(refuse)
    assert line.at == 32


def test_what_does_not_begin_as_a_frame_is_refused_before_anything_else(apart: SimpleNamespace) -> None:
    line = apart.Line(b"HTTP" + framed(Frame(2, size=SIZE), b"".join(BODY))[4:])
    with pytest.raises(PeerError):
        apart.wire(line).receive(lambda frame: pytest.fail("its size means nothing"))


@pytest.mark.parametrize("at", [5, 9, 20, 40, 32 + SIZE])
def test_a_flipped_bit_is_seen(apart: SimpleNamespace, at: int) -> None:
    """In the kind, the number, the head's end, the body, the digest."""
    data = bytearray(framed(Frame(2, 5, 6, 7, SIZE), b"".join(BODY)))
    data[at] ^= 4
    with pytest.raises(PeerError):
        apart.wire(apart.Line(data)).receive(lambda frame: memoryview(bytearray(SIZE)))


def test_an_end_in_mid_frame_is_no_frame(apart: SimpleNamespace) -> None:
    data = framed(Frame(2, size=SIZE), b"".join(BODY))
    for end in (0, 10, 40, len(data) - 1):
        with pytest.raises(PeerError, match="hung up"):
            apart.wire(apart.Line(data[:end])).receive(lambda frame: memoryview(bytearray(SIZE)))


def test_what_is_sent_is_what_is_received(apart: SimpleNamespace) -> None:
    line, place = apart.Line(at_once=7), bytearray(SIZE)
    apart.wire(line)._send(Frame(2, 5, 6, 7, SIZE), BODY)
    apart.wire(line)._send(Frame(3, 5), [])
    wire = apart.wire(line)
    assert wire.receive(lambda frame: memoryview(place)) == Frame(2, 5, 6, 7, SIZE) and place == b"".join(
        BODY
    )
    assert wire.receive(lambda frame: memoryview(b"")) == Frame(3, 5)
