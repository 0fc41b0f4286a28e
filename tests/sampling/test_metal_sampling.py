"""The Metal kernel draws the token that ``sample_ref`` draws, whatever the filters and the company."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator

import mlx.core as mx
import pytest

from tiny_llm.metalsim.build import why_not
from tiny_llm.metalsim.run import watch
from tiny_llm.metrics import fallbacks
from tiny_llm.ops import backend
from tiny_llm.sampling.sampler import sample, sample_ref
from tiny_llm.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

Options = dict[str, float]
KINDS: tuple[Options, ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 5.0, "top_k": 3, "top_p": 1.0},
    {"temperature": 1e-30},
    {"temperature": 0.0},
)
SEEDS = (0, 1, 2) if os.environ.get("TINY_LLM_METAL_GRID") == "full" else (0,)
GPUS = ["metal"] if mx.metal.is_available() else []


@pytest.fixture(autouse=True, params=["metalsim", *GPUS])
def as_metal(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every draw of this file is the kernel's, and no access of it is unchecked."""
    if request.param == "metalsim" and (reason := why_not()):
        pytest.skip(reason)
    before = fallbacks().read()
    with backend.use(request.param):
        yield
    assert fallbacks().read() == before, "the kernel must have drawn them"


def params_of(rows: int) -> list[SamplingParams]:
    every = (SamplingParams(**KINDS[r % len(KINDS)], seed=1 + r * 7919**3) for r in range(rows))  # type: ignore[arg-type]
    return list(every)


def check(logits: mx.array, first: int = 0) -> None:
    params, positions = params_of(logits.shape[0]), [first + r * r for r in range(logits.shape[0])]
    got = sample(logits, params, positions).tolist()
    assert got == sample_ref(logits, params, positions).tolist(), "not the tokens of ref"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("vocab", "rows"), [(1, 10), (2, 40), (31, 40), (513, 40), (4096, 20)])
def test_the_same_tokens_as_ref(vocab: int, rows: int, seed: int) -> None:
    check(mx.random.normal((rows, vocab), key=mx.random.key(vocab + 10**6 * seed)) * 3, first=seed)


def test_a_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """151,936 tokens, of which a nucleus holds thousands; accesses are checked on fewer."""
    monkeypatch.setenv("TINY_LLM_METALSIM", "fast")
    check(mx.random.normal((len(KINDS), 151936), key=mx.random.key(0)) * 2)


def hard_rows(vocab: int) -> Iterator[list[float]]:
    """All equal, few values, one far out, masked, far apart, one alone."""
    chance = random.Random(vocab)
    yield [1.5] * vocab
    yield [float(chance.randrange(3)) for _ in range(vocab)]
    yield [chance.choice([0.0, -0.0]) for _ in range(vocab)]
    yield [chance.gauss(0, 1e-4) for _ in range(vocab - 1)] + [-1e30]
    yield [chance.choice([-math.inf, chance.gauss(0, 2)]) for _ in range(vocab - 1)] + [0.0]
    yield [chance.gauss(0, 2000) for _ in range(vocab)]
    yield [-math.inf] * (vocab - 1) + [3.0]


@pytest.mark.parametrize("vocab", [7, 640])
def test_rows_that_are_hard_to_rank(vocab: int) -> None:
    for row in hard_rows(vocab):
        check(mx.broadcast_to(mx.array(row), (len(KINDS), vocab)))


@pytest.mark.parametrize(
    ("row", "token"),
    [([1.0, math.nan, math.nan, 0.0], 1), ([1.0, math.inf, 2.0, math.inf], 1), ([-math.inf] * 4, 0)],
)
def test_rows_that_are_not_finite_are_greedy(row: list[float], token: int) -> None:
    params = params_of(len(KINDS))
    logits = mx.broadcast_to(mx.array(row), (len(params), 4))
    assert sample(logits, params, range(len(params))).tolist() == [token] * len(params)


def test_ties_at_the_cut_go_to_the_lower_ids() -> None:
    """Of equals, top-k and top-p keep the first ones; over many draws each of them comes."""
    for options, kept in ({"top_k": 3}, 3), ({"top_p": 0.5}, 8), ({"top_k": 8, "top_p": 0.49}, 4):
        rows = 6 * int(kept)
        params = [SamplingParams(temperature=1.0, seed=r, **options) for r in range(rows)]  # type: ignore[arg-type]
        tokens = sample(mx.zeros((rows, 16)), params, [0] * rows).tolist()
        assert set(tokens) == set(range(kept)), options


def test_a_row_does_not_depend_on_its_company() -> None:
    params, positions = params_of(9), list(range(9))
    logits = mx.random.normal((9, 700), key=mx.random.key(4))
    together = sample(logits, params, positions).tolist()
    alone = [sample(logits[r : r + 1], params[r : r + 1], positions[r : r + 1]).item() for r in range(9)]
    assert alone == together


def read_of(logits: mx.array, **options: float) -> float:
    """How many times a row is read to draw from it."""
    with watch() as seen:
        sample(logits[None], [SamplingParams(seed=1, **options)], [0])  # type: ignore[arg-type]
    ((_, traffic),) = seen
    assert 3 * traffic.loads["logits"] < traffic.read["logits"] / 4, "four numbers a load"
    return traffic.read["logits"] / logits.nbytes


def test_a_row_is_read_twice_unless_its_cut_is_far_down() -> None:
    """It was read 7 times with top-k or top-p, 12 with both."""
    if backend.active() != "metalsim":
        pytest.skip("what is read is seen in the simulator alone")
    logits = mx.random.normal((16384,), key=mx.random.key(1))
    peaked, flat = logits * 4, logits
    for options in {}, {"top_k": 20}, {"top_k": 600}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.95}:
        assert 2 <= read_of(peaked, temperature=1.0, **options) < 2.1, options
    assert 5 <= read_of(flat, temperature=1.0, top_p=0.95) < 7.1
    assert read_of(flat, temperature=1.0, top_k=9000, top_p=0.95) < 14


def test_cuts_that_are_far_down() -> None:
    """Beyond what is held: thousands of tokens, of which some are equal."""
    logits = mx.round(mx.random.normal((1, 8192), key=mx.random.key(2)) * 40) / 40
    for options in {"top_k": 3000}, {"top_k": 1500, "top_p": 0.9}, {"top_p": 0.99}, {"top_k": 8191}:
        params = [SamplingParams(temperature=1.0, seed=5, **options)]  # type: ignore[arg-type]
        for row in logits, logits * 0, logits * 50:
            for position in range(3):
                got = sample(row, params, [position]).item()
                assert got == sample_ref(row, params, [position]).item(), options
