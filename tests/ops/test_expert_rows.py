"""Rows find their experts, lie by expert, and come back; what a step reads of the experts. Each by hand."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from tiny_llm.config import ModelConfig, Quantization
from tiny_llm.data import QuantizedTensor
from tiny_llm.models.footprint import read_bytes, weights_bytes
from tiny_llm.ops import experts as module
from tiny_llm.ops.experts import Routing, _weighed, by_expert, in_groups, route_ref
from tiny_llm.ops.linear import linear_ref
from tiny_llm.ops.quantized_matmul import quantized_matmul_ref
from tiny_llm.ops.swiglu import swiglu_ref
from tiny_llm.weights.names import config_of

pytestmark = pytest.mark.chapter("3.3")

N, E, F = 5, 32, 64
SHARES = [[0.125, 0.25, 0.5, 0.125], [0.5, 0.125, 0.125, 0.25]]


def logits_of(shares: list[list[float]]) -> mx.array:
    """Logits whose softmax is ``shares``."""
    return mx.log(mx.array(shares)) + 3.0


def test_the_best_k_and_their_shares_of_all() -> None:
    chosen, weights = route_ref(logits_of(SHARES), Routing(3, normalised=False))
    assert chosen.tolist() == [[2, 1, 0], [0, 3, 1]], "the best first, of equals the lower index"
    assert weights.dtype == mx.float32
    assert weights.flatten().tolist() == pytest.approx([0.5, 0.25, 0.125] * 2), "of a softmax over all"


def test_normalised_weights_add_up_to_one_in_each_row() -> None:
    chosen, weights = route_ref(logits_of([SHARES[0], [0.97, 0.01, 0.01, 0.01]]), Routing(2, normalised=True))
    assert chosen.tolist() == [[2, 1], [0, 1]]
    assert weights.flatten().tolist() == pytest.approx([2 / 3, 1 / 3, 0.97 / 0.98, 0.01 / 0.98])
    _, alone = route_ref(logits_of(SHARES), Routing(1, normalised=True))
    assert alone.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("normalised", [False, True])
def test_a_correction_chooses_and_does_not_weigh(normalised: bool) -> None:
    correction = mx.array([0.0, 0.0, -1.0, 1.0])
    chosen, weights = route_ref(logits_of(SHARES), Routing(2, normalised, correction))
    assert chosen.tolist() == [[3, 1], [3, 0]], "the best by share and correction, the best first"
    whole = 0.375 if normalised else 1.0, 0.75 if normalised else 1.0
    expected = [0.125 / whole[0], 0.25 / whole[0], 0.25 / whole[1], 0.5 / whole[1]]
    assert weights.flatten().tolist() == pytest.approx(expected), "shares without the correction"


def test_of_equals_the_lower_index_is_better() -> None:
    chosen, _ = route_ref(mx.zeros((2, 40)), Routing(8, normalised=False))
    assert chosen.tolist() == [list(range(8))] * 2


def test_shares_of_nothing_weigh_nothing() -> None:
    correction = mx.array([2.0, 2.0, 0.0])
    _, weights = route_ref(mx.array([[0.0, 0.0, 500.0]]), Routing(2, True, correction))
    assert weights.tolist() == [[0.0, 0.0]], "0 / 0 is not a number, and would be all that follows"
    _, weights = route_ref(mx.array([[0.0, 0.0, 20.0]]), Routing(2, True, correction))
    assert weights.flatten().tolist() == pytest.approx([0.5, 0.5]), "what is small, but there, is normalised"


def test_shares_are_made_in_float32() -> None:
    logits = mx.array([[300.0, 301.0, 302.0, 1.0]]).astype(mx.bfloat16)
    _, weights = route_ref(logits, Routing(4, normalised=False))
    exact = mx.softmax(logits.astype(mx.float32), axis=-1)[0, :3].tolist()
    assert weights.dtype == mx.float32
    assert sorted(weights[0, :3].tolist()) == pytest.approx(sorted(exact), rel=1e-5), "bfloat16 rounds them"


def test_rows_by_expert_by_hand() -> None:
    x = mx.array([[10.0], [20.0], [30.0]])
    rows, experts, places = by_expert(x, mx.array([[2, 0], [0, 1], [2, 1]]))
    assert experts.tolist() == [0, 0, 1, 1, 2, 2], "sorted by expert"
    assert rows.tolist() == [[10], [20], [20], [30], [10], [30]], "row by row whose each pair is"
    assert places.tolist() == [[4, 0], [1, 2], [5, 3]], "where each token finds its answers"


@pytest.mark.parametrize(("T", "k"), [(1, 1), (1, 4), (6, 1), (7, 3), (3, 4)])
def test_every_row_comes_back(T: int, k: int) -> None:
    x = mx.random.normal((T, 4), key=mx.random.key(1)).astype(mx.bfloat16)
    chosen = mx.argsort(mx.random.normal((T, 6), key=mx.random.key(2)), axis=-1)[:, :k]
    rows, experts, places = by_expert(x, chosen)
    assert (rows.shape, experts.shape, places.shape) == ((T * k, 4), (T * k,), (T, k))
    assert rows.dtype == mx.bfloat16, "rows are copied as they are"
    assert experts.tolist() == sorted(chosen.flatten().tolist())
    assert mx.array_equal(experts[places], chosen).item(), "a pair's place is one of its expert"
    assert mx.array_equal(rows[places], mx.repeat(x[:, None], k, axis=1)).item(), "and of its token"


def test_all_may_have_one_expert() -> None:
    x = mx.arange(3.0)[:, None]
    rows, experts, places = by_expert(x, mx.full((3, 1), 4, dtype=mx.uint32))
    assert rows.tolist() == x.tolist() and experts.tolist() == [4, 4, 4]
    assert places.tolist() == [[0], [1], [2]], "those of one expert stay in their order"


def stacks(format: str) -> list[Any]:
    """Gate, up and down of N experts."""
    made = list[Any]()
    for seed, shape in enumerate([(N, F, E), (N, F, E), (N, E, F)]):
        weight = mx.random.normal(shape, key=mx.random.key(seed)) * shape[-1] ** -0.5
        packed = QuantizedTensor(*mx.quantize(weight, 32, 4), 32, 4)
        made.append(packed if format == "4 bits" else weight)
    return made


def one(weight: Any, expert: int, x: mx.array) -> mx.array:
    """x by one matrix of a stack."""
    if isinstance(weight, mx.array):
        return linear_ref(x, weight[expert])
    parts = (a[expert] for a in (weight.packed, weight.scales, weight.biases))
    return quantized_matmul_ref(x, QuantizedTensor(*parts, weight.group_size, weight.bits))


@pytest.mark.parametrize("format", ["float32", "4 bits"])
def test_each_pair_has_its_own_experts_answer(format: str) -> None:
    x = mx.random.normal((6, E), key=mx.random.key(7))
    chosen = mx.argsort(mx.random.normal((6, N), key=mx.random.key(8)), axis=-1)[:, :3]
    gate, up, down = stacks(format)
    y = in_groups(x, chosen, gate, up, down)
    assert y.shape == (6, 3, 1, E)
    for t in range(6):
        for r, expert in enumerate(chosen[t].tolist()):
            row = x[t : t + 1]
            expected = one(down, expert, swiglu_ref(one(gate, expert, row), one(up, expert, row)))
            apart = mx.max(mx.abs(y[t, r] - expected)).item()
            assert apart < 2e-5, f"token {t}, its expert {expert}: {apart} apart"


def test_products_are_told_that_rows_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, product = list[tuple[int, list[int], bool]](), module._product

    def watched(x: mx.array, weight: Any, chosen: mx.array, is_sorted: bool = False) -> mx.array:
        seen.append((x.size // x.shape[-1], chosen.flatten().tolist(), is_sorted))
        return product(x, weight, chosen, is_sorted)

    monkeypatch.setattr(module, "_product", watched)
    chosen = mx.array([[3, 0], [0, 4], [4, 3]])
    mx.eval(in_groups(mx.ones((3, E)), chosen, *stacks("float32")))
    assert seen == [(6, [0, 0, 3, 3, 4, 4], True)] * 3, "gate, up and down: a row a pair, expert by expert"


def test_outputs_are_weighed_and_added_up() -> None:
    y = mx.array([[[[1.0, 2.0]], [[10.0, 20.0]]], [[[3.0, 4.0]], [[30.0, 40.0]]]])
    weights = mx.array([[0.75, 0.25], [0.5, 0.125]])
    got = _weighed(y, weights, mx.float32)
    assert got.tolist() == [[3.25, 6.5], [5.25, 7.0]], (
        "each row by its own weights, which need not add up to 1"
    )


def test_the_sum_is_made_in_float32() -> None:
    y = mx.array([[[[256.0]], [[1.0]], [[1.0]]]]).astype(mx.bfloat16)
    got = _weighed(y, mx.ones((1, 3)), mx.bfloat16)
    assert got.tolist() == [[258.0]] and got.dtype == mx.bfloat16, "in bfloat16 256 + 1 is 256"
    apart = mx.array([[[[256.0]], [[-256.0]]]]).astype(mx.bfloat16)
    got = _weighed(apart, mx.array([[1.0 + 2.0**-9, 1.0]]), mx.bfloat16)
    assert got.tolist() == [[0.5]], "neither weights nor products are rounded before they are added"
    got = _weighed(mx.array([[[[257.0]], [[-256.0]]]]), mx.ones((1, 2)), mx.bfloat16)
    assert got.tolist() == [[1.0]] and got.dtype == mx.bfloat16, "to the dtype that is asked for, in the end"


def model(name: str) -> ModelConfig:
    """A published model's facts."""
    return ModelConfig.from_hf(config_of(name))


@pytest.mark.parametrize(
    ("name", "stack_bytes"),
    [
        ("qwen3-30b-a3b", 48 * 128 * 3 * 2048 * 768 * 2),
        ("qwen1.5-moe-a2.7b", 24 * 60 * 3 * 2048 * 1408 * 2),
    ],
)
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_a_step_reads_the_experts_that_it_meets_by_chance(name: str, stack_bytes: int, tokens: int) -> None:
    config = model(name)
    assert config.experts is not None
    N, k = config.experts.count, config.experts.per_token
    missed = 1.0
    for _ in range(tokens):
        missed *= (N - k) / N  # a token passes by an expert: its k are all different
    table = 2 * config.vocab_size * config.hidden_size
    expected = weights_bytes(config, 2, 2) - table - missed * stack_bytes
    read = read_bytes(config, 2, 2, tokens=tokens)
    assert isinstance(read, int) and read == pytest.approx(expected, abs=2)


def test_what_is_not_an_expert_is_read_whole() -> None:
    config = model("qwen1.5-moe-a2.7b")  # routers, shared experts and their gates are in each layer
    stacks, table = 24 * 60 * 3 * 2048 * 1408 * 2, 2 * 151_936 * 2048
    rest = read_bytes(config, 2, 2, tokens=1) - stacks * 4 // 60
    assert rest == weights_bytes(config, 2, 2) - table - stacks
    dense = model("qwen3-0.6b")
    assert read_bytes(dense, 2, 2, tokens=1) == weights_bytes(dense, 2, 2), "its table is its head"
    assert read_bytes(dense, 2, 4, tokens=1) == weights_bytes(dense, 2, 4), (
        "vectors may have a size of their own"
    )


def test_quantized_experts_are_smaller_by_as_much() -> None:
    config, four = model("qwen3-30b-a3b"), Quantization(4, 64)
    assert config.experts is not None
    stacks = 48 * 128 * 3 * 2048 * 768 * (4.5 / 8)
    once = read_bytes(config, 2, 2, four, tokens=1)
    twice = read_bytes(config, 2, 2, four, tokens=2)
    assert twice - once == pytest.approx(stacks * (8 / 128) * (120 / 128), rel=1e-6)
    many = read_bytes(config, 2, 2, four, tokens=10_000)
    assert many - once == pytest.approx(stacks * 120 / 128, rel=1e-6), "all of them, and never more"
