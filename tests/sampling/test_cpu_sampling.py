"""The sampling kernel draws the token that ``sample_ref`` draws, whatever the filters and the company."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import mlx.core as mx
import pytest

from tests.instruction_sets import SETS
from tiny_llm.metrics import fallbacks
from tiny_llm.ops import backend
from tiny_llm.ops.backend import cpu
from tiny_llm.sampling.sampler import sample, sample_ref
from tiny_llm.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(not backend.works(), reason="the CPU kernels are not built")

KINDS = [
    SamplingParams(**options)  # type: ignore[arg-type]
    for options in (
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 5.0, "top_p": 0.5},
        {"temperature": 0.05, "top_k": 300, "top_p": 0.999},
        {"temperature": 0.0},
    )
]


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    """Every draw of this file is the kernel's."""
    with backend.use("cpu"):
        yield


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that the machine has."""
    if SETS.index(request.param) > SETS.index(cpu.best_isa()):
        pytest.skip(f"this machine has no {request.param}")
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


def seeded(kinds: list[SamplingParams], rows: int) -> list[SamplingParams]:
    return [SamplingParams(**{**fields(kinds[r % len(kinds)]), "seed": 1 + r * 7919**3}) for r in range(rows)]


def fields(params: SamplingParams) -> dict[str, float]:
    return {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}


@pytest.mark.parametrize(("vocab", "rows"), [(1, 16), (2, 64), (513, 2000), (4096, 800), (40001, 32)])
def test_the_same_tokens_as_ref(vocab: int, rows: int, isa: str) -> None:
    logits = mx.random.normal((rows, vocab), key=mx.random.key(vocab)) * 3
    params, positions = seeded(KINDS, rows), [r * r for r in range(rows)]
    expected = sample_ref(logits, params, positions).tolist()
    before = fallbacks().read()
    got = sample(logits, params, positions).tolist()
    assert fallbacks().read() == before, "the kernel must have drawn them"
    wrong = [r for r in range(rows) if got[r] != expected[r]]
    assert not wrong, [(params[r], got[r], expected[r]) for r in wrong[:3]]


def test_a_whole_vocabulary() -> None:
    """151,936 tokens: chunks, threads, and rounding where a nucleus of thousands ends."""
    logits = mx.random.normal((len(KINDS), 151936), key=mx.random.key(0)) * 2
    for position in range(4):
        params, positions = seeded(KINDS, len(KINDS)), [position] * len(KINDS)
        expected = sample_ref(logits, params, positions).tolist()
        assert sample(logits, params, positions).tolist() == expected


def hard_rows(vocab: int) -> Iterator[list[float]]:
    """Rows that are hard to rank: all equal, few values, one far out, masked, beyond every bucket."""
    chance = random.Random(vocab)
    yield [1.5] * vocab
    yield [float(chance.randrange(3)) for _ in range(vocab)]
    yield [chance.gauss(0, 1e-4) for _ in range(vocab - 1)] + [-1e30]
    yield [chance.choice([-math.inf, chance.gauss(0, 2)]) for _ in range(vocab - 1)] + [0.0]
    yield [chance.gauss(0, 2000) for _ in range(vocab)]
    yield [-math.inf] * (vocab - 1) + [3.0]


@pytest.mark.parametrize("vocab", [7, 640, 16400])
def test_rows_that_are_hard_to_rank(vocab: int, isa: str) -> None:
    for number, row in enumerate(hard_rows(vocab)):
        params = seeded(KINDS, 3 * len(KINDS))
        logits = mx.broadcast_to(mx.array(row), (len(params), vocab))
        expected = sample_ref(logits, params, range(len(params))).tolist()
        assert sample(logits, params, range(len(params))).tolist() == expected, f"row kind {number}"


def test_rows_that_are_not_finite_are_greedy(isa: str) -> None:
    rows = [[1.0, math.nan, math.nan, 0], [1.0, math.inf, 2.0, math.inf], [-math.inf] * 4]
    for row, params in itertools.product(rows, seeded(KINDS, len(KINDS))):
        logits = mx.array([row])
        token = 0 if row[0] == -math.inf else 1
        assert sample(logits, [params], [3]).item() == sample_ref(logits, [params], [3]).item() == token


def test_no_rows() -> None:
    assert sample(mx.zeros((0, 5)), [], []).shape == (0,)
    assert cpu.sample(mx.zeros((0, 5)), [], [], [], [], [], []).shape == (0,)


def test_a_row_does_not_depend_on_threads_or_company() -> None:
    threads, vocab = cpu.num_threads(), 50000
    params, positions = seeded(KINDS, 9), list(range(9))
    logits = mx.random.normal((9, vocab), key=mx.random.key(4))
    try:
        cpu.set_num_threads(1)
        expected = sample(logits, params, positions).tolist()
        cpu.set_num_threads(3)
        assert sample(logits, params, positions).tolist() == expected
        alone = [sample(logits[r : r + 1], params[r : r + 1], positions[r : r + 1]).item() for r in range(9)]
        assert alone == expected
    finally:
        cpu.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"logits": mx.zeros((2, 4), mx.bfloat16)}, "logits float32"),
        ({"logits": mx.zeros((2, 0))}, "at least one value a row"),
        ({"logits": mx.zeros(4)}, "logits float32"),
        ({"seeds": [1]}, "as many of each parameter as there are rows"),
        ({"temperature": [1.0, math.nan]}, "temperature >= 0"),
        ({"top_k": [-1, 0]}, "top_k >= 0"),
        ({"min_p": [0.0, 1.5]}, "min_p from 0 to 1"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], complaint: str) -> None:
    good = {"logits": mx.zeros((2, 4)), "temperature": [1.0, 0.0], "top_k": [0, 0], "top_p": [1.0, 1.0]}
    good |= {"min_p": [0.0, 0.0], "seeds": [0, 2**64 - 1], "positions": [0, 1]}
    assert cpu.sample(**good).shape == (2,)
    with pytest.raises(ValueError, match=complaint):
        cpu.sample(**good | change)
