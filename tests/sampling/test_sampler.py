"""Sampling: the drawn tokens follow the distribution that the parameters describe."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import pytest

from tiny_llm.ops import backend
from tiny_llm.sampling import sampler
from tiny_llm.sampling.sampler import filter_logits, gumbel_noise, sample
from tiny_llm.sampling_params import SamplingParams

pytestmark = pytest.mark.chapter("1.7")


@pytest.fixture(params=["ref", "cpu"], autouse=True)
def on_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of this file, once on each backend."""
    if request.param == "cpu" and not backend.works():
        pytest.skip("the CPU kernels are not built")
    with backend.use(request.param):
        yield


def kept(logits: list[float], **options: float) -> list[int]:
    params = SamplingParams(temperature=options.pop("temperature", 1.0), **options)  # type: ignore[arg-type]
    scores = filter_logits(mx.array([logits]), [params])[0]
    return [i for i, score in enumerate(scores.tolist()) if score > -math.inf]


def logits_of(*shares: float) -> list[float]:
    return [math.log(share) if share else -math.inf for share in shares]


def exact_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """The definition, in plain Python: temperature, top-k, top-p, min-p."""
    top = max(logits)
    weights = [math.exp((x - top) / params.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))[: params.top_k or None]
    total, mass, chosen = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if mass < params.top_p * total and weights[i] >= params.min_p:
            chosen.append(i)
        mass += weights[i]
    total = sum(weights[i] for i in chosen)
    return [weights[i] / total if i in chosen else 0.0 for i in range(len(logits))]


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals() -> None:
    logits = mx.array([[0.0, 3.0, 3.0, -1.0], [-5.0, -5.0, -5.0, -5.0], [-math.inf, -2.0, -math.inf, -2.0]])
    tokens = sample(logits, [SamplingParams()] * 3, [0, 1, 2])
    assert tokens.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.1},
    ],
)
def test_frequencies_follow_the_exact_probabilities(options: dict[str, float]) -> None:
    """Pearson's chi-square over 4,000 draws, one row each; the bound is 5 sigma above its mean."""
    logits = [1.0, -0.5, 2.0, 0.3, -2.0, 0.9, 1.9, -math.inf, -1.0]
    draws = 4000
    params = SamplingParams(**({"temperature": 1.0, "seed": 11} | options))  # type: ignore[arg-type]
    tokens = sample(mx.array([logits] * draws), [params] * draws, range(draws)).tolist()
    expected = exact_probabilities(logits, params)
    impossible = [t for t in tokens if expected[t] == 0]
    assert not impossible, f"drew tokens of probability zero: {sorted(set(impossible))}"
    counts = [tokens.count(i) for i in range(len(logits))]
    chi2 = sum((n - draws * p) ** 2 / (draws * p) for n, p in zip(counts, expected, strict=True) if p)
    freedom = sum(p > 0 for p in expected) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom), (
        f"chi2 {chi2:.1f}: counts {counts}, expected {[round(draws * p) for p in expected]}"
    )


def test_top_k_keeps_k_even_among_equals() -> None:
    assert kept([1.0, 2.0, 2.0, 2.0, 0.0], top_k=2) == [1, 2], "lower ids first among equal logits"
    assert kept([1.0, 2.0, 0.0], top_k=1) == [1] and kept([0.0, -200.0]) == [0, 1]
    assert kept([1.0, 2.0], top_k=50) == [0, 1], "a k larger than the vocabulary keeps all"


def test_top_p_keeps_the_smallest_set_and_the_token_that_crosses() -> None:
    shares = logits_of(0.1, 0.4, 0.2, 0.3)
    assert kept(shares, top_p=0.39) == [1]
    assert kept(shares, top_p=0.41) == [1, 3], "the token that crosses p stays"
    assert kept(shares, top_p=0.71) == [1, 2, 3]
    assert kept(shares, top_p=1.0) == [0, 1, 2, 3]
    assert kept(logits_of(0.992, 0.004, 0.004), top_p=0.995) == [0, 1], "one is one, and no less"
    assert kept(shares, top_p=1e-9) == [1], "at least one token stays"
    assert kept([0.0] * 4, top_p=0.5) == [0, 1], "equal logits are not kept beyond what p needs"


@pytest.mark.parametrize("top_p", [5e-324, 1e-46, 1e-40, 1e-9])
def test_top_p_below_float32_still_keeps_the_likeliest(top_p: float) -> None:
    assert kept(logits_of(0.1, 0.3, 0.6), top_p=top_p) == [2]
    assert kept(logits_of(0.1, 0.3, 0.6), top_p=top_p, temperature=1e-300) == [2]


def test_top_p_shares_are_of_what_top_k_left() -> None:
    shares = logits_of(0.4, 0.3, 0.2, 0.1)
    # Among the two best, 0.4 is a share of 4/7 = 0.571.
    assert kept(shares, top_k=2, top_p=0.57) == [0]
    assert kept(shares, top_k=2, top_p=0.58) == [0, 1]


def test_min_p_is_relative_to_the_likeliest() -> None:
    shares = logits_of(0.5, 0.26, 0.24)
    assert kept(shares, min_p=0.5) == [0, 1]
    assert kept(shares, min_p=1.0) == [0]
    assert kept([2.0, 2.0, 1.0], min_p=1.0) == [0, 1], "equals of the likeliest stay"
    assert kept(logits_of(1, 5e-4, 5e-5), min_p=1e-4) == [0, 1]
    assert kept(logits_of(0.5, 0.3, 0.2), min_p=0.5, top_p=0.6) == [0, 1], "top-p counts what min-p forbids"


def test_min_p_acts_after_the_temperature() -> None:
    shares = logits_of(0.5, 0.2, 0.1)
    assert kept(shares, min_p=0.5) == [0]
    assert kept(shares, min_p=0.5, temperature=2.0) == [0, 1], "hot: 0.63 times as likely as the best"
    assert kept(shares, min_p=0.3, temperature=0.5) == [0], "cold: 0.16 times"


def test_top_p_of_one_keeps_every_token_of_a_large_vocabulary() -> None:
    """However sums are rounded: the last of 151,936 are far smaller than the sum of all before them."""
    scores = mx.random.normal((1, 151_936), key=mx.random.key(0)) * 2
    scores = scores - mx.max(scores)
    mask = sampler.top_k_top_p_mask(scores, [SamplingParams(temperature=1.0, top_p=1.0, seed=1)])
    assert mx.all(mask).item(), f"{mx.sum(~mask).item():,} tokens are forbidden"


def test_each_row_has_its_own_parameters() -> None:
    logits, draws = mx.array([logits_of(0.5, 0.3, 0.2)] * 3), (0.25, 1.0, 4.0)
    scores = filter_logits(logits, [SamplingParams(temperature=t, seed=1) for t in draws])
    assert scores[:, 1].tolist() == pytest.approx([math.log(0.6) / t for t in draws], rel=1e-5)
    assert scores[:, 0].tolist() == [0.0] * 3, "the largest score of a row is 0"


def test_a_row_without_a_finite_largest_logit_is_greedy() -> None:
    rows = [[-math.inf] * 3, [0.0, math.inf, 1.0], [0.0, 1.0, 2.0]]
    params = [SamplingParams(temperature=1.0, seed=1)] * 2 + [SamplingParams()]
    assert sample(mx.array(rows * 4), params * 4, range(12)).tolist() == [0, 1, 2] * 4


def test_the_logits_stay_as_they_are() -> None:
    logits = mx.array([[3.0, 2.0, 1.0]])
    params = SamplingParams(temperature=0.5, top_k=1, seed=1)
    filter_logits(logits, [params])
    sampler.sample_ref(logits, [params], [0])
    assert logits.tolist() == [[3.0, 2.0, 1.0]], "others report them"


def test_temperature_acts_before_the_filters() -> None:
    shares = logits_of(0.5, 0.3, 0.2)
    assert kept(shares, top_p=0.6) == [0, 1]
    assert kept(shares, top_p=0.6, temperature=0.25) == [0], "cold: the first alone now holds 0.87"


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-38, 5e-324])
def test_tiny_temperature_is_greedy_without_overflow(temperature: float) -> None:
    logits = mx.array([[1.0, 90.0, 89.0, -90.0]] * 8)
    params = SamplingParams(temperature=temperature, seed=1)
    for factor in (1.0, 1e7):
        scores = filter_logits(factor * logits, [params] * 8)
        assert not mx.any(mx.isnan(scores)).item() and mx.all(scores[:, 1] == 0).item()
    assert sample(logits, [params] * 8, range(8)).tolist() == [1] * 8


def test_a_tiny_temperature_is_divided_by_as_it_is() -> None:
    for tiny in (1e-8, 1e-29):
        params = SamplingParams(temperature=tiny, seed=1)
        scores = filter_logits(mx.array([[0.0, -2 * tiny]]), [params])
        assert scores[0].tolist() == pytest.approx([0, -2], rel=1e-3)
        assert {*sampler.sample_ref(mx.zeros((40, 2)), [params] * 40, range(40)).tolist()} == {0, 1}


def test_rows_at_temperature_0_and_broken_ones_change_nothing_for_others() -> None:
    logits = mx.array([[0.0, 3.0, 3.0], [math.nan, 0.0, 0.0], [0.1, 0.0, 0.2], [0.0, 0.1, 0.0]])
    hot = SamplingParams(temperature=9.0, seed=3)
    for position in range(8):
        drawn = sampler.sample_ref(logits, [SamplingParams(), hot, hot, hot], [0, 1, position, 7])
        alone = sampler.sample_ref(logits[2:], [hot, hot], [position, 7])
        assert drawn[0].item() == 1, "the lowest id among equals"
        assert drawn[2:].tolist() == alone.tolist()


def test_minus_infinity_is_never_drawn() -> None:
    logits = mx.array([[-math.inf, 0.0, -math.inf, -3.0, -math.inf]] * 300)
    hot = SamplingParams(temperature=50, seed=2)
    for params in (hot, replace(hot, top_k=4, top_p=0.999)):
        drawn = set(sample(logits, [params] * 300, range(300)).tolist())
        assert drawn == {1, 3}


def mixed_params(rows: int) -> list[SamplingParams]:
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=0.9, min_p=0.05),
        SamplingParams(temperature=1.1, top_k=40, top_p=0.95, min_p=0.01),
    ]
    return [replace(kinds[r % len(kinds)], seed=r // 2) for r in range(rows)]


@pytest.mark.parametrize("vocab", [2, 257, 1001])
def test_a_row_does_not_depend_on_its_batch(vocab: int) -> None:
    """33 rows at once, each alone, and in reverse order: the same tokens."""
    logits = mx.random.normal((33, vocab), key=mx.random.key(5)) * 2
    params, positions = mixed_params(33), [7 * r % 13 for r in range(33)]
    together = sample(logits, params, positions).tolist()
    alone = [sample(logits[r : r + 1], [params[r]], [positions[r]]).item() for r in range(33)]
    assert together == alone
    assert sample(logits[::-1], params[::-1], positions[::-1]).tolist() == together[::-1]
    assert sample(logits, params, positions).tolist() == together, "a second call draws the same"


def test_noise_differs_by_seed_and_by_position() -> None:
    pairs = [(seed, position) for seed in (0, 1, 2, 2**32, 2**64 - 1) for position in (0, 1, 2, 1_000_000)]
    noise = gumbel_noise([s for s, _ in pairs], [p for _, p in pairs], 3).tolist()
    assert len({tuple(row) for row in noise}) == len(pairs)


def test_noise_has_the_gumbel_mean_and_variance() -> None:
    noise = gumbel_noise([0] * 40, range(40), 1000)
    assert mx.mean(noise).item() == pytest.approx(0.5772, abs=5 * 1.2825 / 200)
    assert mx.var(noise).item() == pytest.approx(math.pi**2 / 6, rel=0.05)
    across = gumbel_noise(list(range(2000)), [9] * 2000, 1)
    assert mx.mean(across).item() == pytest.approx(0.5772, abs=5 * 1.2825 / math.sqrt(2000))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits_are_filtered_in_float32(dtype: mx.Dtype) -> None:
    logits = mx.random.normal((6, 101), key=mx.random.key(1)).astype(dtype)
    params = mixed_params(6)
    exact = sample(logits.astype(mx.float32), params, range(6))
    hot = [replace(p, temperature=p.temperature or 1.0) for p in params]
    scores = filter_logits(logits, hot)
    assert scores.dtype == mx.float32
    assert mx.array_equal(scores, filter_logits(logits.astype(mx.float32), hot)).item()
    assert sample(logits, params, range(6)).tolist() == exact.tolist()


def test_a_few_are_ranked_as_all_would_be() -> None:
    """Of a wide row with many equals, top-k and top-p keep the same, sorted whole or not."""
    scores = mx.round(mx.random.normal((4, 3000), key=mx.random.key(3)) * 4) / 2
    scores = scores - mx.max(scores, axis=-1, keepdims=True)
    params = [
        SamplingParams(top_k=k, top_p=p, seed=1) for k, p in ((1, 1.0), (20, 0.5), (7, 0.999), (20, 1.0))
    ]
    assert mx.array_equal(sampler._among_best(scores, params), sampler.top_k_top_p_mask(scores, params))
