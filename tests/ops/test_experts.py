"""Mixtures of experts: who is chosen, by which weight; the sum expert by expert; every format and backend."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.metalsim.build import why_not
from tiny_llm.metalsim.run import watch
from tiny_llm.metrics import fallbacks
from tiny_llm.ops.backend import use, works
from tiny_llm.ops.experts import Routing, experts, route_ref
from tiny_llm.ops.linear import linear_ref, pack
from tiny_llm.ops.quantized_matmul import quantized_matmul_ref
from tiny_llm.ops.swiglu import swiglu_ref

N, K, E, F = 7, 3, 64, 96
FORMATS = ["float32", "bfloat16", "4 bits", "8 bits"]


@pytest.fixture(params=["ref", "cpu", "mlx", "metalsim"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that has a way of its own."""
    if request.param == "cpu" and not works():
        pytest.skip("the CPU kernels were not built: no C++ compiler")
    if request.param == "metalsim" and (reason := why_not()):
        pytest.skip(reason)
    with use(request.param) as name:
        yield name


def stack(rows: int, columns: int, format: str, seed: int) -> mx.array | QuantizedTensor:
    """N matrices [rows, columns]."""
    weight = mx.random.normal((N, rows, columns), key=mx.random.key(seed)) * columns**-0.5
    if format.endswith("bits"):
        bits = int(format.split()[0])
        return QuantizedTensor(*mx.quantize(weight, group_size=32, bits=bits), 32, bits)
    return weight.astype(mx.float32 if format == "float32" else mx.bfloat16)


def stacks(format: str, width: int = F) -> list[mx.array | QuantizedTensor]:
    """Gate, up and down."""
    return [stack(width, E, format, 1), stack(width, E, format, 2), stack(E, width, format, 3)]


def one(weight: mx.array | QuantizedTensor, expert: int, x: mx.array) -> mx.array:
    """x by one matrix of a stack, as a matrix by itself."""
    if isinstance(weight, mx.array):
        return linear_ref(x, weight[expert].astype(mx.float32))
    parts = (a[expert] for a in (weight.packed, weight.scales, weight.biases))
    return quantized_matmul_ref(x, QuantizedTensor(*parts, weight.group_size, weight.bits))


def by_definition(x: mx.array, logits: mx.array, routing: Routing, weights: list[Matrix]) -> mx.array:
    """Row by row and expert by expert."""
    chosen, shares = route_ref(logits, routing)
    rows = []
    for t in range(x.shape[0]):
        total = mx.zeros(E)
        for expert, share in zip(chosen[t].tolist(), shares[t].tolist(), strict=True):
            gate, up, down = (lambda a, w=w, e=expert: one(w, e, a) for w in weights)
            total = total + share * down(swiglu_ref(gate(x[t : t + 1]), up(x[t : t + 1])))[0]
        rows.append(total)
    return mx.stack(rows)


def drawn(rows: int, seed: int = 0) -> tuple[mx.array, mx.array]:
    """x [rows, E] and logits [rows, N]."""
    x = mx.random.normal((rows, E), key=mx.random.key(seed))
    return x, mx.random.normal((rows, N), key=mx.random.key(seed + 1)) * 2


def prepared(weights: list[mx.array | QuantizedTensor]) -> list[Matrix]:
    return [pack(weight, exact=True) for weight in weights]


def test_a_row_s_experts_by_hand() -> None:
    """Softmax of ln 1, ln 2, ln 4, ln 1 is 1/8, 2/8, 4/8, 1/8."""
    logits = mx.log(mx.array([[1.0, 2.0, 4.0, 1.0]]))
    chosen, weights = route_ref(logits, Routing(3, normalised=False))
    assert chosen.tolist() == [[2, 1, 0]], "the best first; of equals the one of the lower index"
    assert weights.tolist()[0] == pytest.approx([0.5, 0.25, 0.125]), "softmax over all, not over the chosen"
    _, weights = route_ref(logits, Routing(2, normalised=True))
    assert weights.tolist()[0] == pytest.approx([2 / 3, 1 / 3])
    correction = mx.array([0.0, 0.0, -1.0, 1.0])
    chosen, weights = route_ref(logits, Routing(2, normalised=False, correction=correction))
    assert chosen.tolist() == [[3, 1]], "the correction takes part in choosing"
    assert weights.tolist()[0] == pytest.approx([0.125, 0.25]), "and not in weighing"


@pytest.mark.parametrize("corrected", [False, True])
def test_equals_are_decided_by_index_everywhere(backend: str, corrected: bool, assert_close) -> None:
    """All logits are equal in half of the rows."""
    x, logits = drawn(24)
    logits = mx.where(mx.arange(24)[:, None] % 2 == 0, 0.5, logits)
    routing = Routing(K, normalised=True, correction=mx.zeros(N) if corrected else None)
    weights = stacks("float32")
    assert_close(experts(x, logits, routing, *prepared(weights)), by_definition(x, logits, routing, weights))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_definition(backend: str, format: str, rows: int, normalised: bool, assert_close) -> None:
    x, logits = drawn(rows)
    routing = Routing(K, normalised, mx.random.normal((N,), key=mx.random.key(9)) * 0.2)
    weights = stacks(format)
    counted = fallbacks().read()
    got = experts(x, logits, routing, *prepared(weights))
    assert_close(got, by_definition(x, logits, routing, weights), tolerance=2e-5)
    assert fallbacks().read() == counted, "it fell back"


@pytest.mark.parametrize("format", FORMATS)
def test_rows_do_not_know_of_each_other(backend: str, format: str) -> None:
    """Whoever shares a row's experts. Eight rows and more go together by other registers than one."""
    routing = Routing(K, normalised=False)
    weights = prepared(stacks(format))
    x, logits = drawn(70)
    if backend == "mlx":  # MLX's own order for rows in groups is its own
        x, logits = x[:20], logits[:20]
    together = experts(x, logits, routing, *weights)
    for t in range(x.shape[0]):
        alone = experts(x[t : t + 1], logits[t : t + 1], routing, *weights)
        assert mx.array_equal(together[t : t + 1], alone).item(), f"row {t}"


def test_a_width_that_no_tile_divides(backend: str, assert_close) -> None:
    x, logits = drawn(9)
    routing = Routing(2, normalised=True)
    weights = stacks("float32", width=21)
    assert_close(experts(x, logits, routing, *prepared(weights)), by_definition(x, logits, routing, weights))


def test_gate_and_up_may_differ_in_their_groups(backend: str, assert_close) -> None:
    x, logits = drawn(5)
    weights, routing = stacks("4 bits"), Routing(K, normalised=True)
    wide = mx.random.normal((N, F, E), key=mx.random.key(2)) * E**-0.5
    weights[1] = QuantizedTensor(*mx.quantize(wide, group_size=64, bits=4), 64, 4)
    if backend == "cpu":
        with pytest.raises(ValueError, match="expected gate and up of one group size"):
            experts(x, logits, routing, *prepared(weights))
        return
    got = experts(x, logits, routing, *prepared(weights))
    assert_close(got, by_definition(x, logits, routing, weights), tolerance=2e-5)


def test_no_rows(backend: str) -> None:
    x, logits = drawn(1)
    assert experts(x[:0], logits[:0], Routing(2, normalised=True), *prepared(stacks("4 bits"))).shape == (
        0,
        E,
    )


def test_a_row_of_nan_stays_alone(backend: str) -> None:
    x, logits = drawn(6)
    bad = mx.arange(6)[:, None] == 2
    weights, routing = prepared(stacks("4 bits")), Routing(K, normalised=True)
    clean = experts(x, logits, routing, *weights)
    got = experts(mx.where(bad, mx.nan, x), mx.where(bad, mx.nan, logits), routing, *weights)
    assert mx.all(mx.isnan(got[2])).item()
    rest = mx.array([0, 1, 3, 4, 5])
    assert mx.array_equal(got[rest], clean[rest]).item()


def test_metal_reads_an_expert_once_for_four_of_its_rows(where: str) -> None:
    """40 rows, of which expert 0 has 25, 1 has 14 and 2 has one: 7, 4 and 1 blocks."""
    if where != "metalsim":
        pytest.skip("what a GPU reads is not counted")
    x, _ = drawn(40)
    experts_of = mx.array([0] * 25 + [1] * 14 + [2])
    logits = mx.where(experts_of[:, None] == mx.arange(N), 5.0, 0.0)
    weights = stacks("4 bits")
    with watch() as seen:
        mx.eval(experts(x, logits, Routing(1, normalised=False), *weights))
    gate, up, down = (weight.packed.nbytes // N for weight in weights)
    (_, first), (_, second) = seen
    # 8 simdgroups of outputs read different rows; two of them are one threadgroup.
    assert first.fetched["packed_0"] == 12 * gate and first.fetched["packed_1"] == 12 * up
    assert second.fetched["packed"] == 12 * down


def test_what_metal_has_no_kernel_for_goes_to_mlx(where: str, assert_close) -> None:
    x, logits = drawn(9)
    weights, routing = stacks("bfloat16"), Routing(K, normalised=True)
    with watch() as seen:
        got = experts(x, logits, routing, *weights)
    assert {name for name, _ in seen} == {"swiglu"}
    assert_close(got, by_definition(x, logits, routing, weights), tolerance=2e-5)
