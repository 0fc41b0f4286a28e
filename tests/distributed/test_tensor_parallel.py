"""A model cut by outputs: who has which rows, how parts become one array, and every bit as on one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from tiny_llm.config import ModelConfig
from tiny_llm.data import Batch, QuantizedTensor
from tiny_llm.distributed.group import ALONE, Alone, Group
from tiny_llm.kv.dense import DenseCache
from tiny_llm.layers.embedding import Embedding
from tiny_llm.layers.gathered import GatheredLinear, gathered, share_of
from tiny_llm.layers.linear import Linear
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.ranks import gathered_bytes, head_rows, lacking, layer_lacks, of_rank, rank_parts
from tiny_llm.ops.linear import linear

pytestmark = pytest.mark.chapter("4.5")

OnRanks = Callable[..., list[Any]]
CONFIG = ModelConfig.from_hf(
    {
        "model_type": "qwen2",
        "hidden_size": 40,
        "intermediate_size": 27,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 61,
        "tie_word_embeddings": False,
    }
)


def noise(*shape: int, seed: int = 0) -> mx.array:
    """Numbers whose sum depends on their order."""
    return mx.random.normal(shape, key=mx.random.key(seed))


class Told:
    """A group of ranks of which this is one; the others' parts are known. Notes what it gave."""

    def __init__(self, rank: int, others: list[mx.array]) -> None:
        self.rank, self.size = rank, len(others)
        self.given: list[mx.array] = []
        self._others = others

    def all_gather(self, x: mx.array) -> mx.array:
        """What all have, by rank."""
        self.given.append(x)
        return mx.concatenate([x if rank == self.rank else one for rank, one in enumerate(self._others)])

    send = receive = None


def of(x: mx.array, group: Group, width: int) -> mx.array:
    """A rank's columns of something whole."""
    own = share_of(width, group.rank, group.size)
    return x[:, own.start : own.stop]


def test_each_has_as_many_and_the_last_what_is_left() -> None:
    assert [share_of(12, rank, 3) for rank in range(3)] == [range(0, 4), range(4, 8), range(8, 12)]
    assert [share_of(13, rank, 3) for rank in range(3)] == [range(0, 5), range(5, 10), range(10, 13)]
    assert share_of(7, 0, 1) == range(7) and share_of(61, 5, 6) == range(55, 61)


def test_a_share_may_be_empty() -> None:
    """Of 5 rows over 4 ranks, 2 each: the last one gets none, and no rank goes beyond the end."""
    shares = [share_of(5, rank, 4) for rank in range(4)]
    assert [len(share) for share in shares] == [2, 2, 1, 0] and max(share.stop for share in shares) == 5
    assert [row for share in shares for row in share] == list(range(5))
    assert (shares[3].start, shares[3].stop) == (5, 5), "where rows begin is read from a file, too"


def test_heads_are_divided_and_those_of_keys_perhaps_shared() -> None:
    """Two heads of keys and values for six of queries: on six ranks, three have the same."""
    for size, heads, kv_heads in ((1, 6, 2), (2, 3, 1), (6, 1, 1)):
        own = of_rank(CONFIG, size)
        assert (own.num_heads, own.num_kv_heads) == (heads, kv_heads)
        assert replace(own, num_heads=6, num_kv_heads=2) == CONFIG, "nothing else is another"
    eight = replace(CONFIG, num_heads=8, num_kv_heads=8)
    assert (of_rank(eight, 4).num_heads, of_rank(eight, 4).num_kv_heads) == (2, 2)


def test_a_rank_has_the_keys_that_its_queries_read() -> None:
    """Query head h reads head h // (H / K) of keys and values."""
    cases = (6, 2, 4, (1, 2, 6)), (8, 4, 5, (1, 2, 4, 8)), (8, 1, 3, (2, 4)), (12, 3, 1, (3, 6))
    for heads, kv_heads, D, sizes in cases:
        config = replace(CONFIG, num_heads=heads, num_kv_heads=kv_heads, head_dim=D)
        for size in sizes:
            queries, keys = zip(*(head_rows(config, rank, size) for rank in range(size)), strict=True)
            assert [row for rows in queries for row in rows] == list(range(heads * D)), "each once, in order"
            for own, read in zip(queries, keys, strict=True):
                wanted = {row // D // (heads // kv_heads) for row in own}
                assert {row // D for row in read} == wanted and len(read) == D * len(wanted), f"{size} ranks"
    assert head_rows(CONFIG, 4, 6) == (range(32, 40), range(8, 16))


@pytest.mark.parametrize(("width", "size"), [(6, 2), (6, 3), (7, 2), (7, 3), (5, 4)])
def test_parts_become_one_array_again(on_ranks: OnRanks, width: int, size: int) -> None:
    """By one gather, in which all give as much as the first one has."""
    whole = mx.arange(4 * width).reshape(4, width).astype(mx.float32)
    mx.eval(whole)

    def run(group: Any) -> tuple[list[list[float]], int, int]:
        found = gathered(of(whole, group, width), group, width)
        return found.tolist(), group.gathers, group.received

    each = len(share_of(width, 0, size))
    assert on_ranks(size, "ref", run) == [(whole.tolist(), 1, 4 * 4 * each * (size - 1))] * size


def test_what_is_there_is_not_gathered() -> None:
    class Silent(Alone):
        def all_gather(self, x: mx.array) -> mx.array:
            raise AssertionError("nothing to gather")

    x = noise(3, 5)
    assert gathered(x, Silent(), 5) is x


def test_a_row_or_none_can_be_gathered(on_ranks: OnRanks) -> None:
    for rows in (1, 0):
        found = on_ranks(2, "ref", lambda group, rows=rows: gathered(noise(rows, 3), group, 6).shape)
        assert found == [(rows, 6)] * 2


def test_bits_travel_and_nothing_else(on_ranks: OnRanks) -> None:
    odd = mx.array([[-0.0, mx.nan, -mx.inf, 1e-40, 0.1]])
    half = noise(2, 5).astype(mx.bfloat16)
    mx.eval(odd, half)

    def run(group: Group) -> tuple[Any, ...]:
        bits, short = (gathered(of(x, group, 5), group, 5) for x in (odd, half))
        return bits.view(mx.uint32).tolist(), short.dtype, mx.array_equal(short, half).item()

    assert on_ranks(2, "ref", run) == [(odd.view(mx.uint32).tolist(), mx.bfloat16, True)] * 2


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_map_s_outputs_are_all_there_bit_for_bit(on_ranks: OnRanks, size: int, bias: bool) -> None:
    weight, x = noise(11, 300), noise(4, 300, seed=1)
    added = noise(11, seed=2) if bias else None
    alone = linear(x, weight, added)
    mx.eval(alone, weight, x)

    def run(group: Group) -> list[bool]:
        own = share_of(11, group.rank, size)
        part = weight[own.start : own.stop]
        map_ = GatheredLinear(part, None if added is None else added[own.start : own.stop], group, 11)
        return [mx.array_equal(map_(given), alone).item() for given in (x, of(x, group, 300))]

    assert on_ranks(size, "ref", run) == [[True, True]] * size, "from a whole input, and from a part of it"


def quantized(weight: mx.array) -> QuantizedTensor:
    """In 8 bits, with a scale for 32 numbers."""
    return QuantizedTensor(*mx.quantize(weight, group_size=32, bits=8), 32, 8)


@pytest.mark.parametrize("make", [lambda weight: weight.astype(mx.bfloat16), quantized])
def test_a_map_of_few_bits_gives_the_same_bits(on_ranks: OnRanks, make: Callable[[mx.array], Any]) -> None:
    weight, x = noise(10, 64), noise(3, 64, seed=1).astype(mx.bfloat16)
    alone = linear(x, make(weight))
    mx.eval(alone, weight, x)

    def run(group: Group) -> bool:
        own = share_of(10, group.rank, 2)
        given = GatheredLinear(make(weight[own.start : own.stop]), None, group, 10)(of(x, group, 64))
        return given.dtype == alone.dtype and bool(mx.array_equal(given, alone).item())

    assert on_ranks(2, "ref", run) == [True, True]


def test_a_step_may_want_no_logits(on_ranks: OnRanks) -> None:
    def run(group: Group) -> tuple[int, ...]:
        return GatheredLinear(noise(3, 8), None, group, 6)(noise(0, 8)).shape

    assert on_ranks(2, "ref", run) == [(0, 6), (0, 6)], "in the middle of a prompt"


def test_a_map_takes_heads(on_ranks: OnRanks) -> None:
    """Attention's output [T, H, D]: a rank has some of the heads."""
    weight, heads = noise(10, 6 * 8), noise(3, 6, 8, seed=1)
    alone = linear(heads.reshape(3, 48), weight)
    mx.eval(alone, weight, heads)

    def run(group: Group) -> bool:
        own = share_of(10, group.rank, 2)
        map_ = GatheredLinear(weight[own.start : own.stop], None, group, 10)
        return bool(mx.array_equal(map_(heads[:, 3 * group.rank : 3 * group.rank + 3]), alone).item())

    assert on_ranks(2, "ref", run) == [True, True]


def test_a_whole_input_is_not_gathered_again(on_ranks: OnRanks) -> None:
    def run(group: Any) -> int:
        GatheredLinear(noise(3, 8), None, group, 6)(noise(2, 8))
        return int(group.gathers)

    assert on_ranks(2, "ref", run) == [1, 1], "outputs only"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_token_s_vector_comes_from_who_has_it(on_ranks: OnRanks, size: int) -> None:
    table = noise(13, 6).astype(mx.bfloat16)
    tokens = mx.array([0, 12, 4, 3, 6, 7, 4, 9, 10, 1])
    wanted = table[tokens]
    mx.eval(wanted, table)

    def run(group: Any) -> tuple[bool, int]:
        own = share_of(13, group.rank, size)
        found = Embedding(table[own.start : own.stop], vocab_size=13, group=group)(tokens)
        return found.dtype == wanted.dtype and bool(mx.array_equal(found, wanted).item()), group.gathers

    assert on_ranks(size, "ref", run) == [(True, int(size > 1))] * size


def test_a_quantized_table_is_cut_as_well(on_ranks: OnRanks) -> None:
    table, tokens = noise(13, 64), mx.array([0, 12, 6, 7])
    wanted = Embedding(quantized(table))(tokens)
    mx.eval(table, tokens, wanted)

    def run(group: Group) -> bool:
        own = share_of(13, group.rank, 2)
        part = quantized(table[own.start : own.stop])
        return bool(mx.array_equal(Embedding(part, vocab_size=13, group=group)(tokens), wanted).item())

    assert on_ranks(2, "ref", run) == [True, True]


def test_no_rank_looks_beyond_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there is somebody else's, or nobody's."""
    asked: list[list[int]] = []
    module = "tiny_llm.layers.embedding.embedding"
    monkeypatch.setattr(module, lambda ids, table: asked.append(ids.tolist()) or table[ids])
    tokens, table = mx.array([0, 12, 6, 7]), noise(13, 6)
    for rank in (0, 1):
        own = share_of(13, rank, 2)
        group = Told(rank, [mx.zeros((4, 6))] * 2)
        Embedding(table[own.start : own.stop], vocab_size=13, group=group)(tokens)
        assert group.given[0].shape == (4, 6)
    assert all(0 <= one < rows for ids, rows in zip(asked, (7, 6), strict=True) for one in ids), asked


def test_what_a_rank_lacks_is_all_that_others_have() -> None:
    assert lacking(12, 3) == 8 and lacking(13, 3) == 10 and lacking(12, 1) == 0
    assert layer_lacks(CONFIG, 27, 1) == 0
    assert layer_lacks(CONFIG, 27, 2) == 24 + 20 + 14 + 20
    assert layer_lacks(CONFIG, 27, 6) == 5 * (8 + 7 + 5 + 7), "each gives as much as the first one has"
    assert layer_lacks(replace(CONFIG, num_layers=9), 27, 2) == layer_lacks(CONFIG, 27, 2), "of one layer"
    assert layer_lacks(CONFIG, 100, 2) == 24 + 20 + 50 + 20, "the middle is as wide as is said"


def weights_of(config: ModelConfig) -> dict[str, mx.array]:
    """Noise in the place of a checkpoint."""
    shapes = Decoder.shapes(config)
    return {name: noise(*shape, seed=n) / shape[-1] ** 0.5 for n, (name, shape) in enumerate(shapes.items())}


def steps(config: ModelConfig, group: Group = ALONE) -> list[mx.array]:
    """Logits of a prompt, and of two tokens behind it, on one rank of a group."""
    parts = rank_parts(config, Decoder.shapes(config), group.rank, group.size) if group.size > 1 else {}
    own = {
        name: whole[parts[name].start : parts[name].stop] if name in parts else whole
        for name, whole in weights_of(config).items()
    }
    model, cache, logits = Decoder.take(config, own, group), DenseCache(config.num_layers), list[mx.array]()
    for new in ([3, 60, 15, 9, 26], [35], [0]):
        at = mx.arange(cache.length, cache.length + len(new))
        logits.append(model(Batch(mx.array(new), at, (0, len(new)), mx.array([len(new) - 1])), cache))
        mx.eval(logits[-1])
    return logits


@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_one_rank(on_ranks: OnRanks, size: int, tied: bool) -> None:
    config = replace(CONFIG, tie_word_embeddings=tied)
    (alone,) = on_ranks(1, "ref", lambda group: steps(config))
    for rank, own in enumerate(on_ranks(size, "ref", lambda group: steps(config, group))):
        same = [mx.array_equal(got, want).item() for got, want in zip(own, alone, strict=True)]
        assert same == [True] * 3, f"rank {rank} of {size}"


@pytest.mark.parametrize("size", [2, 6])
def test_as_many_bytes_travel_as_the_formula_says(on_ranks: OnRanks, size: int) -> None:
    def run(group: Any) -> tuple[int, int]:
        steps(CONFIG, group)
        return group.received, group.gathers

    told = gathered_bytes(CONFIG, size)
    assert on_ranks(size, "ref", run) == [(told.token * 7 + told.logits * 3, told.gathers * 3)] * size


def test_a_sum_that_is_cut_has_other_bits() -> None:
    """Which is why none is: what the halves add up to is rounded once more."""
    weight, x = noise(64, 300), noise(4, 300, seed=1)
    halves = linear(x[:, :150], weight[:, :150]) + linear(x[:, 150:], weight[:, 150:])
    whole = Linear(weight)(x)
    assert not mx.array_equal(halves, whole).item() and mx.allclose(halves, whole, atol=1e-4).item()
