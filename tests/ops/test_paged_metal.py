"""The kernel of decodes: keys by block table, nothing read that no row sees, bits that are a row's own."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from tiny_llm.data import Pages
from tiny_llm.metalsim.run import watch
from tiny_llm.ops import paged_attention as attention
from tiny_llm.ops.kv_pool import Pool
from tiny_llm.ops.metal import kernel
from tiny_llm.ops.work_lists import UNBOUNDED, WorkLists

pytestmark = [pytest.mark.usefixtures("where"), pytest.mark.chapter("3.2")]

S, H, K, D = 16, 4, 2, 16
NOWHERE = 1 << 20
"""A block that no pool has: it stands in a table where no row is to look."""
Rows = Sequence[tuple[mx.array, mx.array, mx.array]]


def rows(*lens: int, heads: tuple[int, int] = (H, K), dim: int = D) -> Rows:
    """For each sequence its last token's query [1, H, D], and its keys and values [length, K, D]."""
    return [
        tuple(
            mx.random.normal((count, of, dim), key=mx.random.key(9 * b + i))
            for i, (count, of) in enumerate(((1, heads[0]), (end, heads[1]), (end, heads[1])))
        )  # type: ignore[misc]
        for b, end in enumerate(lens)
    ]


def in_pool(
    batch: Rows, *, size: int = S, window: int = 0, turn: int = 5
) -> tuple[mx.array, Pool, WorkLists]:
    """All queries, and a pool whose every other block is a sequence's, ``turn`` blocks from its neighbour.

    What no row sees is NaN, in a block or not; and where no block is to be read, the table says NOWHERE.
    """
    lens = [k.shape[0] for _, k, _ in batch]
    width = max(-(-end // size) for end in lens)
    total = len(batch) * width
    while np.gcd(turn, total) > 1:
        turn += 1
    tables = np.full((len(batch), width), NOWHERE, np.int32)
    shared, dim = batch[0][1].shape[1:]
    keys = np.full((2 * total, shared, dim, size), np.nan, np.float32)
    values = np.full((2 * total, shared, size, dim), np.nan, np.float32)
    for b, (_, k, v) in enumerate(batch):
        gone = max(0, lens[b] - window) if window else 0
        for at in range(gone, lens[b]):
            i, place = divmod(at, size)
            tables[b, i] = block = (b * width + i) * turn % total * 2 + 1
            keys[block, :, :, place], values[block, :, place] = np.array(k[at]), np.array(v[at])
    starts, counts = np.arange(len(batch) + 1), np.zeros(len(batch))
    numbers = (mx.array(one.astype(np.int32)) for one in (counts, tables, starts, np.array(lens)))
    q = mx.concatenate([q for q, _, _ in batch])
    return q, (mx.array(keys), mx.array(values)), WorkLists(Pages(*numbers))


def decoded(batch: Rows, *, window: int = 0, size: int = S, turn: int = 5) -> mx.array:
    q, pool, work = in_pool(batch, size=size, window=window, turn=turn)
    return attention._rows(q, pool, work, q.shape[2] ** -0.5, window or UNBOUNDED)[0]


def check(got: mx.array, batch: Rows, *, window: int = 0) -> None:
    """Against the definition in float64."""
    for b, (q, k, v) in enumerate(batch):
        query, keys, values = (np.array(x, np.float64) for x in (q[0], k[-window:], v[-window:]))
        keys, values = (np.repeat(x, query.shape[0] // x.shape[1], axis=1) for x in (keys, values))
        scores = np.einsum("hd,shd->hs", query, keys) * query.shape[1] ** -0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("hs,shd->hd", weights / weights.sum(-1, keepdims=True), values)
        error = np.abs(np.array(got[b], np.float64) - expected).max(axis=1) / np.abs(expected).max()
        wrong = [h for h, e in enumerate(error) if not e <= 3e-6]
        assert not wrong, (
            f"sequence {b} of {k.shape[0]} tokens, head {wrong[0]}: {got[b, wrong[0], :3].tolist()}, "
            f"not {expected[wrong[0], :3].tolist()}"
        )


def same(got: mx.array, expected: mx.array, what: str) -> None:
    differing = mx.mean(got != expected).item()
    assert differing == 0, f"{what}: {differing:.0%} of the numbers have other bits"


def test_blocks_are_found_wherever_they_lie() -> None:
    batch = rows(1, 16, 17, 40, 128)
    check(decoded(batch), batch)


def test_spans_become_one() -> None:
    batch = rows(129, 40, 300)
    check(decoded(batch), batch)


def test_two_simdgroups_take_turns_as_four_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight query heads of 256 leave no memory for four."""
    monkeypatch.setattr(attention, "_parts", lambda *_: 2)
    batch = rows(100, 49)
    for window in (0, 30, 61):
        check(decoded(batch, window=window), batch, window=window)


@pytest.mark.parametrize("window", [1, 5, 16, 33, 140])
def test_what_lies_before_a_window_is_not_read(window: int) -> None:
    """Blocks that are gone, and what a block holds of the time before."""
    batch = rows(300, 100, 7)
    check(decoded(batch, window=window), batch, window=window)


def test_of_keys_and_values_those_that_a_row_sees_are_read_and_no_others(where: str) -> None:
    if where != "metalsim":
        pytest.skip("a GPU does not say what it reads")
    for window in (0, 20):
        with watch() as seen:
            decoded(rows(1, 17, 40), window=window)
        ((_, traffic),) = seen
        tokens = sum(min(end, window or end) for end in (1, 17, 40))
        for name in ("keys", "values"):
            count = traffic.read[name] / (K * D * 4)
            assert count == tokens, f"{count:g} tokens' {name} are read, of {tokens} that are seen"


@pytest.mark.parametrize("window", [0, 130])
def test_a_row_has_the_bits_that_it_has_alone_and_elsewhere(window: int) -> None:
    batch = rows(20, 128, 131, 300)
    together = decoded(batch, window=window)
    same(decoded(batch, window=window, turn=3), together, "blocks in other places")
    for b, one in enumerate(batch):
        same(decoded([one], window=window)[0], together[b], f"sequence {b}, alone")


def test_a_row_has_the_bits_that_a_tile_gives_it(where: str) -> None:
    """Tiles are the other kernel, that of prompts: whether a token came with many or alone shows nowhere."""
    if where != "metalsim":
        pytest.skip("a GPU's matrix instruction may sum in another order; then tiles are not used")
    batch = rows(100, 500)
    for window in (0, 40, 77, 150):
        q, pool, work = in_pool(batch, window=window)
        tiles = attention._tiles(q, pool, work, D**-0.5, window or UNBOUNDED)[0]
        same(decoded(batch, window=window), tiles, f"a window of {window}")


def test_one_key_that_is_far_ahead_wins_in_whichever_span() -> None:
    """At any level: what a block has behind the last token must not be ahead of all others."""
    ahead = (
        (5, 40.0, -1.0),
        (127, 130.0, 90.0),
        (128, 40.0, -3000.0),
        (200, 130.0, -1.0),
        (299, 200.0, 1000.0),
    )
    for at, lead, level in ahead:
        k = mx.full((300, K, D), level)
        k[at] += lead
        v = mx.broadcast_to(mx.arange(300)[:, None, None].astype(mx.float32), k.shape)
        got = decoded([(mx.ones((1, H, D)) / D**0.5, k, v)])
        assert got[0, 0].tolist() == pytest.approx([at] * D, rel=1e-5), (
            f"token {at} is {lead:g} ahead, at {level:g}"
        )


def merged(
    parts: Sequence[tuple[float, ...]], order: list[int], firsts: list[int], places: int
) -> list[list[float]]:
    """Rows of two heads by the kernel's second half: of head 1 each part's sums and largest score are 1 more.

    A part is its sum of values, its largest score, its sum of weights. The first ``places`` are shared ones.
    """
    array = mx.array([[[sums + h] * 8 + [top + h, weight] for h in (0, 1)] for sums, top, weight in parts])
    (out, _) = kernel("paged_attention_merge", "paged_attention")(
        inputs=[
            array[:places],
            array[places:],
            places,
            *(mx.array((x + [0] * 8)[:9]) for x in (order, firsts)),
            0,
        ],
        template=[("T", mx.float32), ("H", 2), ("D", 8)],
        grid=(32, 2, len(firsts) - 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(len(firsts) - 1, 2, 8), ()],
        output_dtypes=[mx.float32, mx.int32],
    )
    assert mx.array_equal(mx.broadcast_to(out[..., :1], out.shape), out).item(), (
        "some columns have other parts"
    )
    return out[..., 0].tolist()  # type: ignore[return-value]


def test_parts_of_spans_by_hand() -> None:
    """Places 0 and 1 are shared, 2 to 4 the rows' own. A weight of e^-200 is nothing."""
    parts = [(6.0, 1.0, 2.0), (5.0, 201.0, 5.0), (1.0, 1.0, 3.0), (8.0, 1.0, 2.0), (9.0, -199.0, 4.0)]
    got = merged(parts, [0, 2, 1, 3, 4], [0, 2, 4, 5], 2)
    assert got[0] == pytest.approx([(6 + 1) / 5, (7 + 2) / 5]), (
        "row 0 has places 0 and 2, of equal largest scores"
    )
    assert got[1] == pytest.approx([5 / 5, 6 / 5]), "row 1 has places 1 and 3, and the first one is far ahead"
    assert got[2] == pytest.approx([9 / 4, 10 / 4]), "row 2 has place 4 alone"


def test_parts_are_added_in_the_order_that_is_given() -> None:
    """1 is lost beside 2^24, and two of them, added first, are not."""
    big, one = (2.0**24, 0.0, 1.0), (1.0, 0.0, 0.0)
    got = [merged([one, one, big], order, [0, 3], 1)[0][0] for order in ([0, 1, 2], [2, 0, 1])]
    assert got == [2.0**24 + 2, 2.0**24], "two orders of the same parts"


def test_scales_of_int8() -> None:
    """Blocks of 64, of which a lane has two tokens; heads of 20, and three of them to one of keys."""
    (q, k, v), *_ = batch = rows(90, heads=(3, 1), dim=20)
    steps = [(25 * mx.clip(x, -5, 5)).astype(mx.int8).astype(mx.float32) for x in (k, v)]
    units = [
        mx.random.uniform(0.002, 0.03, (90, 1, 1), key=mx.random.key(i)).astype(mx.float16) for i in (3, 4)
    ]
    _, (keys, values), work = in_pool([(q, *steps)], size=64)
    _, (of_keys, of_values), _ = in_pool([(q, *(x.astype(mx.float32) for x in units))], size=64)
    ints = [mx.where(mx.isnan(x), 99, x).astype(mx.int8) for x in (keys, values)]
    scales = [of_keys[:, :, 0].astype(mx.float16), of_values[..., 0].astype(mx.float16)]
    got = attention._rows(q, (*ints, *scales), work, 20**-0.5)[0]
    batch = [(q, *(x * unit.astype(mx.float32) for x, unit in zip(steps, units, strict=True)))]
    check(got, batch)
