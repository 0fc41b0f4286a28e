"""Blocks leave one pool and enter another: what is missing is asked for, sent in order, and found as ever."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tiny_llm.distributed.wire import Frame
from tiny_llm.server.decode_side import DecodeSide, _Coming
from tiny_llm.server.peer import BLOCKS, END
from tiny_llm.server.prefill_side import _Asking, _Going

pytestmark = pytest.mark.chapter("3.4")

TOKENS = list(
    range(100, 118)
)  # of blocks of 4: four full ones, and one of the 17th; the last one is not sent


def data_of(apart: SimpleNamespace, tokens: list[int], first: int, count: int, salt: str = "") -> bytes:
    """What blocks of a prompt hold, as they come."""
    ends = [min(4 * (index + 1), len(tokens) - 1) for index in range(first, first + count)]
    return b"".join(apart.truth(salt, tokens[:end]) for end in ends)


def test_full_blocks_are_given_from_the_first_one_wanted(apart: SimpleNamespace) -> None:
    pool = apart.Pool()
    pool.compute(TOKENS)
    over = apart.handover(pool, TOKENS)
    for first, most, count in ((0, 9, 4), (0, 4, 4), (1, 2, 2), (3, 9, 1), (2, 1, 1)):
        given, data = over.give(first, most)
        assert given == count and b"".join(data) == data_of(apart, TOKENS, first, count), (first, most)
    asked = pool.given
    assert over.give(4, 9) == (0, []) and pool.given == asked, "the rest of it is not full"
    assert apart.handover(pool, TOKENS[:17]).give(0, 9)[0] == 4, "16 tokens to be sent are four full blocks"
    assert apart.handover(apart.Pool(), TOKENS).give(0, 9) == (0, []), "nothing is computed yet"
    assert apart.handover(pool, TOKENS, "salt").give(0, 9) == (0, []), "nor for somebody else's"
    assert pool.used == 0, "who gives holds nothing"


def test_what_is_taken_is_found_as_if_it_had_been_computed(apart: SimpleNamespace) -> None:
    pool = apart.Pool()
    over = apart.handover(pool, TOKENS)
    assert over.take(0, 4, data_of(apart, TOKENS, 0, 4)) is True
    assert pool.found(TOKENS) == 16 and pool.used == 0, "and nobody holds it"
    assert over.take(4, 1, data_of(apart, TOKENS, 4, 1)) is True, "the last one need not be full"
    assert pool.found(TOKENS) == 17 == len(TOKENS) - 1
    assert len(pool.blocks.prefix._named) == 4, "but only full ones have names"
    pool.blocks.check_integrity([])


def test_blocks_come_bit_by_bit(apart: SimpleNamespace) -> None:
    pool = apart.Pool()
    over = apart.handover(pool, TOKENS, "salt")
    for first, count in ((0, 1), (1, 2), (3, 2)):
        assert over.take(first, count, data_of(apart, TOKENS, first, count, "salt"))
        assert pool.used == 0
    assert pool.found(TOKENS, "salt") == 17 and pool.found(TOKENS) == 0


def test_what_is_there_already_stays(apart: SimpleNamespace) -> None:
    """Somebody else has computed some of it meanwhile: theirs is as good, and lies in memory once."""
    pool = apart.Pool()
    pool.compute(TOKENS[:10])
    table = pool.blocks.table()
    assert pool.blocks.allocate(table, TOKENS[:9]) == 8, "a sequence that runs reads two of them"
    assert apart.handover(pool, TOKENS).take(0, 4, data_of(apart, TOKENS, 0, 4))
    assert len(pool.written) == 2 and not set(pool.written) & set(table.blocks), "nobody's block is written"
    pool.blocks.free(table, TOKENS[:9], 8)
    assert pool.found(TOKENS) == 16 and pool.used == 0
    assert apart.handover(pool, TOKENS).take(0, 4, data_of(apart, TOKENS, 0, 4)), "all of it is there"
    assert pool.found(TOKENS) == 16 and pool.used == 0
    pool.blocks.check_integrity([])


def test_what_follows_nothing_is_not_taken(apart: SimpleNamespace) -> None:
    """What stood before it has been evicted, or never came."""
    pool = apart.Pool()
    assert apart.handover(pool, TOKENS).take(1, 2, data_of(apart, TOKENS, 1, 2)) is False
    assert pool.found(TOKENS) == 0 and pool.used == 0 and not pool.holds
    pool.compute(TOKENS[:9])
    assert apart.handover(pool, TOKENS).take(3, 1, data_of(apart, TOKENS, 3, 1)) is False
    assert pool.found(TOKENS) == 8 and pool.used == 0, "what is there is still found"
    assert apart.handover(pool, TOKENS).take(2, 2, data_of(apart, TOKENS, 2, 2)) is True


def test_more_than_the_prompt_has_is_not_taken(apart: SimpleNamespace) -> None:
    pool = apart.Pool()
    assert apart.handover(pool, TOKENS).take(0, 6, b"x" * 48) is False
    assert pool.used == 0 and not pool.holds
    exact = TOKENS[:17]  # sixteen tokens to be sent: the fourth block is full, and the last
    assert apart.handover(pool, exact).take(0, 5, b"x" * 40) is False
    assert apart.handover(pool, exact).take(0, 4, data_of(apart, exact, 0, 4)) is True
    assert pool.found(exact) == 16


def test_where_there_is_no_room_nothing_changes(apart: SimpleNamespace) -> None:
    pool = apart.Pool(room=3)
    assert apart.handover(pool, TOKENS).take(0, 4, data_of(apart, TOKENS, 0, 4)) is False
    assert pool.used == 0 and not pool.holds
    pool = apart.Pool(room=4)
    pool.scheduler.num_running = 1
    assert apart.handover(pool, TOKENS).take(0, 4, data_of(apart, TOKENS, 0, 4)) is False, (
        "who runs needs a block"
    )


def test_a_fault_leaves_no_block_in_use_and_nothing_to_be_found(apart: SimpleNamespace) -> None:
    pool = apart.Pool()
    pool.compute(TOKENS[:5])
    pool.breaks = True
    with pytest.raises(MemoryError):
        apart.handover(pool, TOKENS).take(0, 4, data_of(apart, TOKENS, 0, 4))
    assert pool.used == 0
    pool.breaks = False
    assert pool.found(TOKENS) == 4, "what has not been written has no name"
    pool.blocks.check_integrity([])


def begin(pool: Any, ids: list[int], least: int = 8, salt: str = "", keep: bool = True) -> _Coming | None:
    side = DecodeSide.__new__(DecodeSide)
    side._peer = SimpleNamespace(least_tokens=least)  # type: ignore[assignment]
    return side._begin(ids, salt, keep, SimpleNamespace(engine=pool))  # type: ignore[arg-type]


def test_what_is_missing_is_asked_for(apart: SimpleNamespace) -> None:
    pool = apart.Pool()
    coming = begin(pool, TOKENS)
    assert coming is not None and coming.first == 0
    pool.compute(TOKENS[:9])
    coming = begin(pool, TOKENS)
    assert coming is not None and coming.first == 2, "two blocks of it are here"
    other = begin(pool, TOKENS, salt="salt")
    assert other is not None and other.first == 0, "somebody else's are not"
    assert pool.used == 0, "who looks holds nothing"
    assert coming.handover.take(2, 2, data_of(apart, TOKENS, 2, 2)), "what comes is entered where it belongs"
    assert coming.handover.take(4, 1, data_of(apart, TOKENS, 4, 1)) and pool.found(TOKENS) == 17


def test_too_little_is_computed_at_home(apart: SimpleNamespace) -> None:
    """Of what is missing, without the last token: that is computed here in any case."""
    pool = apart.Pool()
    assert begin(pool, TOKENS, least=17) is not None and begin(pool, TOKENS, least=18) is None
    pool.compute(TOKENS[:9])
    assert begin(pool, TOKENS, least=9) is not None and begin(pool, TOKENS, least=10) is None
    assert begin(apart.Pool(prefix_cache=False), TOKENS) is None, "where nothing is kept, nothing is found"


def test_what_is_to_be_kept_nowhere_is_entered_so(apart: SimpleNamespace) -> None:
    pool = apart.Pool()
    coming = begin(pool, TOKENS, keep=False)
    assert coming is not None and coming.handover.take(0, 4, data_of(apart, TOKENS, 0, 4))
    assert len(pool.blocks._kept_out) == 4


class Sent:
    """A wire that keeps what is put on it."""

    def __init__(self) -> None:
        self.frames: list[tuple[Frame, bytes]] = []

    def put(self, frame: Frame, parts: Any = ()) -> None:
        self.frames.append((frame, b"".join(parts)))


def going(apart: SimpleNamespace, pool: Any, first: int = 0, most: int = 2) -> tuple[_Asking, _Going]:
    """A prompt that is being computed, as request 5 of ``pool``, for prompt 9 of who asks."""
    asking = _Asking.__new__(_Asking)
    asking.wire, asking._most = Sent(), most  # type: ignore[assignment]
    asking._llm = SimpleNamespace(llm=SimpleNamespace(engine=pool))  # type: ignore[assignment]
    one = _Going(5, apart.handover(pool, TOKENS), first)
    asking._going = {9: one}
    pool.running.add(5)
    return asking, one


def test_blocks_go_as_they_fill_and_in_order(apart: SimpleNamespace) -> None:
    pool = apart.Pool()
    asking, one = going(apart, pool)
    assert asking._send_next(9, one) is False and not asking.wire.frames, "nothing is full yet"
    pool.compute(TOKENS[:13])
    assert asking._send_next(9, one) is True, "there may be more"
    assert asking._send_next(9, one) is True
    assert asking._send_next(9, one) is False, "the prompt goes on: no end is said"
    expected = [(Frame(BLOCKS, 9, 0, 2), data_of(apart, TOKENS, 0, 2))]
    expected.append((Frame(BLOCKS, 9, 2, 1), data_of(apart, TOKENS, 2, 1)))
    assert asking.wire.frames == expected and one.first == 3 and 9 in asking._going


def test_the_end_follows_the_last_block_which_need_not_be_full(apart: SimpleNamespace) -> None:
    pool = apart.Pool()
    asking, one = going(apart, pool, first=3)
    pool.compute(TOKENS)
    pool.running.clear()
    assert asking._send_next(9, one) is True and asking._send_next(9, one) is False
    expected = [(Frame(BLOCKS, 9, index, 1), data_of(apart, TOKENS, index, 1)) for index in (3, 4)]
    assert asking.wire.frames == [*expected, (Frame(END, 9), b"")] and not asking._going
    assert pool.used == 0


def test_who_is_still_computed_gets_no_end_though_all_full_blocks_are_there(apart: SimpleNamespace) -> None:
    pool = apart.Pool()
    asking, one = going(apart, pool, first=4)
    pool.compute(TOKENS)
    assert asking._send_next(9, one) is False and not asking.wire.frames and asking._going


def test_what_ended_without_its_blocks_has_an_end(apart: SimpleNamespace) -> None:
    """Cancelled, or evicted: the other side computes the rest."""
    pool = apart.Pool()
    asking, one = going(apart, pool)
    pool.running.clear()
    assert asking._send_next(9, one) is False
    assert asking.wire.frames == [(Frame(END, 9), b"")] and not asking._going


def test_an_engine_made_anew_has_nothing_to_give(apart: SimpleNamespace) -> None:
    pool = apart.Pool()
    asking, one = going(apart, pool)
    pool.compute(TOKENS)
    asking._llm = SimpleNamespace(llm=SimpleNamespace(engine=apart.Pool()))  # type: ignore[assignment]
    assert asking._send_next(9, one) is False
    assert asking.wire.frames == [(Frame(END, 9), b"")] and not asking._going and not pool.given
