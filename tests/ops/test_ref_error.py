"""How exact each ``_ref`` function is, in three dtypes, against its definition in NumPy's float64.

The kernels are held to the ``_ref`` functions, so what these lose nobody else would notice. Errors are
counted in roundings: half the distance between 1 and the next number of the result's dtype, relative to what
is added up. What computes in float32 and rounds once at its end is 1 rounding off in half precision, and its
own arithmetic shows in float32 alone.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import tiny_llm
from tiny_llm.data import Pages, QuantizedTensor
from tiny_llm.ops.argmax import argmax_ref, largest_ref
from tiny_llm.ops.attention import attention_ref, windowed_ref
from tiny_llm.ops.backend import use
from tiny_llm.ops.embedding import embedding_ref
from tiny_llm.ops.experts import Routing, experts_ref, route_ref
from tiny_llm.ops.kv_pool import KvFormat
from tiny_llm.ops.layer_norm import layer_norm_ref
from tiny_llm.ops.linear import linear_ref
from tiny_llm.ops.paged_attention import kv_write_ref, paged_attention_ref
from tiny_llm.ops.quantized_matmul import quantized_matmul_ref
from tiny_llm.ops.rms_norm import add_rms_norm_ref, rms_norm_ref
from tiny_llm.ops.rope import rope_frequencies, rope_qk_ref, rope_ref
from tiny_llm.ops.softmax import softmax_ref
from tiny_llm.ops.swiglu import swiglu_ref
from tiny_llm.sampling.logprobs import log_probabilities, reported_ref
from tiny_llm.sampling.sampler import filter_logits, gumbel_noise, sample_ref, top_k_top_p_mask
from tiny_llm.sampling_params import SamplingParams

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
VOCAB = 151_936  # Qwen2's
_ONCE = 1.02  # one rounding, and what float32 had already lost before it

Exact = np.ndarray


class Case:
    """What one function is given in one dtype, and how far off its results were."""

    def __init__(self, dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self.errors: list[float] = []
        self._seed = 0

    def normal(self, *shape: int, deviation: float = 1.0) -> tuple[mx.array, Exact]:
        """Numbers of the case's dtype, and the same in float64."""
        self._seed += 1
        given = (mx.random.normal(shape, key=mx.random.key(self._seed)) * deviation).astype(self.dtype)
        return given, wide(given)

    def result(self, got: mx.array, exact: Exact, relative_to: Exact) -> None:
        """Note how many roundings ``got`` is off. What is below the normal numbers has fewer digits."""
        assert got.shape == exact.shape, f"shape {got.shape}, expected {exact.shape}"
        limits = mx.finfo(got.dtype)
        scale = np.maximum(relative_to, limits.smallest_normal)
        self.errors.append(float((np.abs(wide(got) - exact) / scale).max()) / (limits.eps / 2))

    def choice(self, score: float, best: float) -> None:
        """Note how far what was chosen is below the best, in roundings of float32."""
        self.errors.append(abs(best - score) / (mx.finfo(mx.float32).eps / 2))


@dataclass(frozen=True)
class Row:
    """A function, what it is tried on, and the roundings that it may be off in each of ``DTYPES``."""

    function: Callable[..., object]
    run: Callable[[Case], None]
    allowed: tuple[float, float, float]
    why: str


def wide(a: mx.array) -> Exact:
    return np.array(a.astype(mx.float32)).astype(np.float64)


def product_of(x: Exact, weight: Exact) -> tuple[Exact, Exact]:
    """x w^T, and what it is to be compared with: itself, or a hundredth of both rows' lengths.

    A product far below that is the difference of large sums, which float32 has no digits for.
    """
    exact = x @ weight.T
    lengths = np.linalg.norm(x, axis=-1, keepdims=True) * np.linalg.norm(weight, axis=-1)
    return exact, np.maximum(np.abs(exact), lengths / 100)


def softmax_of(x: Exact) -> Exact:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def norm_of(x: Exact, weight: Exact, eps: float) -> Exact:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def turned(x: Exact, positions: list[int], inv_freq: Exact) -> tuple[Exact, Exact]:
    """Each pair turned, and how long it is."""
    angles = np.array(positions)[:, None, None] * inv_freq
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    pairs = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    length = np.hypot(first, second)
    return pairs, np.concatenate([length, length], axis=-1)


def attended(
    q: Exact, k: Exact, v: Exact, scale: float, offset: int, window: int = 10**9
) -> tuple[Exact, Exact]:
    """Attention's result, and the same of the values without their signs."""
    (T, H, _), (S, K, _) = q.shape, k.shape
    k, v = np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)
    scores = np.einsum("thd,shd->hts", q, k) * scale
    ago = offset + np.arange(T)[:, None] - np.arange(S)[None, :]
    weights = softmax_of(np.where((ago < 0) | (ago >= window), -np.inf, scores))
    return np.einsum("hts,shd->thd", weights, v), np.einsum("hts,shd->thd", weights, np.abs(v))


def quantized(case: Case, rows: int, columns: int, bits: int) -> tuple[QuantizedTensor, Exact, Exact]:
    """A matrix, what it stands for, and the sum of scale * q and bias without their signs."""
    weight = QuantizedTensor(*mx.quantize(case.normal(rows, columns)[0], 64, bits), 64, bits)
    words = np.array(weight.packed)[:, :, None]
    steps = (words >> np.arange(0, 32, bits, dtype=np.uint32)) % 2**bits
    scales, biases = (np.repeat(wide(a), 64, axis=1) for a in (weight.scales, weight.biases))
    products = steps.reshape(rows, columns).astype(np.float64) * scales
    return weight, products + biases, np.abs(products) + np.abs(biases)


def try_softmax(case: Case) -> None:
    x, exact_x = case.normal(3, 4096, deviation=5)
    exact = softmax_of(exact_x)
    case.result(softmax_ref(x), exact, exact)


def try_argmax(case: Case) -> None:
    x, exact_x = case.normal(5, 4096)
    places = argmax_ref(x).tolist()
    for row, place in zip(exact_x, places, strict=True):
        case.choice(row[place], row.max())


def try_largest(case: Case) -> None:
    x, exact_x = case.normal(5, 4096)
    places = largest_ref(x, 20).tolist()
    for row, own in zip(exact_x, places, strict=True):
        for place, best in zip(own, sorted(row, reverse=True)[:20], strict=True):
            case.choice(row[place], best)


def try_kv_write(case: Case) -> None:
    (k, exact_k), (v, exact_v) = case.normal(3, 2, 64), case.normal(3, 2, 64)
    pool = KvFormat(1, 2, 64, 16, case.dtype, token_major=False).empty_pool(4, 4)
    keys, values = kv_write_ref(pool, k, v, mx.array([5, 17, 63], mx.int32))
    for row, slot in enumerate((5, 17, 63)):
        block, place = divmod(slot, 16)
        case.result(keys[block, :, :, place], exact_k[row], np.abs(exact_k[row]))
        case.result(values[block, :, place], exact_v[row], np.abs(exact_v[row]))


def try_linear(case: Case) -> None:
    (x, exact_x), (weight, exact_weight), (bias, exact_bias) = (
        case.normal(*shape) for shape in [(3, 2048), (64, 2048), (64,)]
    )
    exact, size = product_of(exact_x, exact_weight)
    case.result(linear_ref(x, weight), exact, size)
    case.result(linear_ref(x, weight, bias), exact + exact_bias, size + np.abs(exact_bias))


def try_quantized_matmul(case: Case) -> None:
    for bits in (2, 4, 8):
        x, exact_x = case.normal(3, 1024)
        weight, exact_weight, _ = quantized(case, 33, 1024, bits)
        case.result(quantized_matmul_ref(x, weight), *product_of(exact_x, exact_weight))


def try_embedding(case: Case) -> None:
    tokens = mx.array([5, 0, 32, 5])
    for bits in (2, 4, 8):
        weight, exact, summed = quantized(case, 33, 1024, bits)
        size = np.maximum(np.abs(exact), summed / 100)  # where scale * q is nearly -bias, digits are gone
        case.result(embedding_ref(tokens, weight), exact[tokens.tolist()], size[tokens.tolist()])
    table, exact = case.normal(33, 64)
    case.result(embedding_ref(tokens, table), exact[tokens.tolist()], np.abs(exact[tokens.tolist()]))


def try_swiglu(case: Case) -> None:
    (gate, exact_gate), (up, exact_up) = case.normal(7, 4096, deviation=4), case.normal(7, 4096)
    exact = exact_gate / (1 + np.exp(-exact_gate)) * exact_up
    case.result(swiglu_ref(gate, up), exact, np.abs(exact))


def try_rms_norm(case: Case) -> None:
    (x, exact_x), (weight, exact_weight) = case.normal(3, 4096, deviation=300), case.normal(4096)
    exact = norm_of(exact_x, exact_weight, 1e-6)
    case.result(rms_norm_ref(x, weight, 1e-6), exact, np.abs(exact))


def try_add_rms_norm(case: Case) -> None:
    (x, exact_x), (residual, exact_residual) = case.normal(3, 4096, deviation=3), case.normal(3, 4096)
    weight, exact_weight = case.normal(4096)
    total, normed = add_rms_norm_ref(x, residual, weight, 1e-6)
    exact_total = exact_x + exact_residual
    case.result(total, exact_total, np.abs(exact_total))
    exact = norm_of(exact_total, exact_weight, 1e-6)
    case.result(normed, exact, np.abs(exact))


_POSITIONS = [0, 1, 2047, 4095]


def try_rope(case: Case) -> None:
    x, exact_x = case.normal(4, 3, 64)
    inv_freq = rope_frequencies(64, 1e6)
    exact, length = turned(exact_x, _POSITIONS, wide(inv_freq))
    case.result(rope_ref(x, mx.array(_POSITIONS), inv_freq), exact, length)


def try_rope_qk(case: Case) -> None:
    inv_freq = rope_frequencies(64, 1e6)
    given = [case.normal(4, 6, 64), case.normal(4, 2, 64), case.normal(64), case.normal(64)]
    (q, _), (k, _), (q_norm, _), (k_norm, _) = given
    results = rope_qk_ref(q, k, mx.array(_POSITIONS), inv_freq, q_norm, k_norm, 1e-6)
    for got, (_, x), (_, norm) in zip(results, given[:2], given[2:], strict=True):
        exact, length = turned(norm_of(x, norm, 1e-6), _POSITIONS, wide(inv_freq))
        case.result(got, exact, length)


def try_attention(case: Case) -> None:
    (q, exact_q), (k, exact_k), (v, exact_v) = (
        case.normal(*shape, deviation=2) for shape in [(5, 4, 64), (900, 2, 64), (900, 2, 64)]
    )
    exact, summed = attended(exact_q, exact_k, exact_v, 0.125, 895)
    case.result(attention_ref(q, k, v, scale=0.125, offset=895), exact, summed)


def try_windowed(case: Case) -> None:
    (q, exact_q), (k, exact_k), (v, exact_v) = (
        case.normal(*shape, deviation=2) for shape in [(5, 4, 64), (900, 2, 64), (900, 2, 64)]
    )
    exact, summed = attended(exact_q, exact_k, exact_v, 0.125, 895, 300)
    case.result(windowed_ref(q, k, v, scale=0.125, offset=895, window=300), exact, summed)


def try_layer_norm(case: Case) -> None:
    (x, exact_x), (weight, exact_weight), (bias, exact_bias) = (
        case.normal(*shape, deviation=deviation) for *shape, deviation in [(3, 4096, 9), (4096, 1), (4096, 1)]
    )
    centred = exact_x - exact_x.mean(axis=-1, keepdims=True)
    scaled = norm_of(centred, exact_weight, 1e-5)
    case.result(
        layer_norm_ref(x, weight, bias, 1e-5), scaled + exact_bias, np.abs(scaled) + np.abs(exact_bias)
    )


def routed(logits: Exact, k: int) -> tuple[np.ndarray, Exact]:
    """The k experts of each row, the best first, and their weights, which add up to 1."""
    shares = softmax_of(logits)
    chosen = np.argsort(-shares, axis=-1, kind="stable")[:, :k]
    weights = np.take_along_axis(shares, chosen, axis=-1)
    return chosen, weights / weights.sum(axis=-1, keepdims=True)


def try_route(case: Case) -> None:
    logits, exact_logits = case.normal(64, 60)
    chosen, weights = route_ref(logits, Routing(4, normalised=True))
    _, best = routed(exact_logits, 4)
    all_of = np.exp(exact_logits)
    own = np.take_along_axis(all_of, np.array(chosen).astype(np.int64), axis=-1)
    case.result(weights, own / own.sum(axis=-1, keepdims=True), best)


def try_experts(case: Case) -> None:
    (x, exact_x), (logits, exact_logits) = case.normal(3, 128), case.normal(3, 6)
    (gate, exact_gate), (up, exact_up), (down, exact_down) = (
        case.normal(*shape, deviation=0.1) for shape in [(6, 96, 128), (6, 96, 128), (6, 128, 96)]
    )
    chosen, weights = routed(exact_logits, 2)
    exact, size = np.zeros((3, 128)), np.zeros((3, 128))
    for row, expert, weight in zip(np.repeat(np.arange(3), 2), chosen.ravel(), weights.ravel(), strict=True):
        wide_gate = exact_gate[expert] @ exact_x[row]
        hidden = wide_gate / (1 + np.exp(-wide_gate)) * (exact_up[expert] @ exact_x[row])
        exact[row] += weight * (exact_down[expert] @ hidden)
        size[row] += weight * (np.abs(exact_down[expert]) @ np.abs(hidden))
    got = experts_ref(x, logits, Routing(2, normalised=True), gate, up, down)
    case.result(got, exact, size)


def try_paged_attention(case: Case) -> None:
    """Two sequences, of 40 and 24 tokens that are all new, in blocks that do not lie in order."""
    (q, exact_q), (k, exact_k), (v, exact_v) = (
        case.normal(*shape, deviation=2) for shape in [(64, 4, 64), (64, 2, 64), (64, 2, 64)]
    )
    tables = [[4, 0, 3], [1, 2, 0]]
    slots = [
        16 * table[i // 16] + i % 16 for table, n in zip(tables, (40, 24), strict=True) for i in range(n)
    ]
    numbers = (slots, tables, [0, 40, 64], [40, 24])
    pages = Pages(*(mx.array(given, mx.int32) for given in numbers))
    pool = KvFormat(1, 2, 64, 16, case.dtype).empty_pool(5, 5)
    out, _ = paged_attention_ref(q, k, v, pool, pages, 0.125)
    for start, end in ((0, 40), (40, 64)):
        exact, summed = attended(exact_q[start:end], exact_k[start:end], exact_v[start:end], 0.125, 0)
        case.result(out[start:end], exact, summed)


def log_softmax_of(x: Exact) -> Exact:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def try_log_probabilities(case: Case) -> None:
    logits, exact_logits = case.normal(2, VOCAB, deviation=4)
    exact = log_softmax_of(exact_logits)
    case.result(log_probabilities(logits), exact, np.abs(exact))


def try_reported(case: Case) -> None:
    logits, exact_logits = case.normal(2, VOCAB, deviation=4)
    exact = log_softmax_of(exact_logits)
    tokens = mx.array([7, VOCAB - 1], mx.uint32)
    chosen, ids, values = reported_ref(logits, tokens, 5)
    own, best = (
        np.take_along_axis(exact, np.array(at).astype(np.int64), -1) for at in (tokens[:, None], ids)
    )
    case.result(chosen, own[:, 0], np.abs(own[:, 0]))
    case.result(values, best, np.abs(best))
    likeliest = -np.sort(-exact, axis=-1)[:, :5]
    case.result(values, likeliest, np.abs(likeliest))


_DRAWN = SamplingParams(temperature=0.7, top_k=50_000, top_p=0.999, min_p=1e-6, seed=3)


def exact_filter(logits: Exact, p: SamplingParams) -> tuple[Exact, Exact]:
    """Scores [V] over the temperature, less the largest; and the share of what top-k leaves before each."""
    scores = (logits - logits.max()) / p.temperature
    order = np.argsort(-scores, kind="stable")
    weights = np.exp(scores[order]) * (np.arange(len(order)) < p.top_k)
    before = np.empty_like(scores)
    before[order] = (np.cumsum(weights) - weights) / weights.sum()
    return scores, before


def try_filter_logits(case: Case) -> None:
    """The scores of what is kept. What is kept, is ``try_top_p``'s."""
    logits, exact_logits = case.normal(1, VOCAB, deviation=4)
    scores, _ = exact_filter(exact_logits[0], _DRAWN)
    got = filter_logits(logits, [_DRAWN])[0]
    kept = np.flatnonzero(np.isfinite(wide(got)))
    case.result(got[mx.array(kept)], scores[kept], np.abs(scores[kept]))


def try_top_p(case: Case) -> None:
    """Of a token that is wrongly kept or dropped: how far it was from the edge, as a share of all."""
    logits, exact_logits = case.normal(1, VOCAB, deviation=4)
    for p in (0.5, 0.99, 0.9999):
        params = SamplingParams(temperature=1.0, top_k=140_000, top_p=p, seed=0)
        _, before = exact_filter(exact_logits[0], params)
        scores = logits.astype(mx.float32)
        kept = np.array(top_k_top_p_mask(scores - mx.max(scores), [params])[0])
        for share in before[kept != (before < p)]:
            case.choice(share, p)
        case.choice(p, p)


def try_sample(case: Case) -> None:
    """The score with noise of what was drawn, against the best of what may be drawn."""
    logits, exact_logits = case.normal(4, VOCAB, deviation=4)
    positions = [1, 2, 3, 4]
    params = [_DRAWN] * 3 + [SamplingParams()]
    drawn = sample_ref(logits.astype(mx.float32), params, positions).tolist()
    noise = wide(gumbel_noise([3] * 4, positions, VOCAB))
    for row, token in enumerate(drawn[:3]):
        scores, before = exact_filter(exact_logits[row], _DRAWN)
        allowed = (before < _DRAWN.top_p) & (scores >= np.log(_DRAWN.min_p))
        sums = np.where(allowed, scores + noise[row], -np.inf)
        case.choice(sums[token], sums.max())
    case.choice(exact_logits[3][drawn[3]], exact_logits[3].max())


ROWS = (
    Row(softmax_ref, try_softmax, (300, _ONCE, _ONCE), "exp(-x) is x off (40), and a sum of 4,096 up to 100"),
    Row(argmax_ref, try_argmax, (0, 0, 0), "compares, and computes nothing"),
    Row(largest_ref, try_largest, (0, 0, 0), "compares, and computes nothing"),
    Row(kv_write_ref, try_kv_write, (0, 0, 0), "moves, and computes nothing"),
    Row(linear_ref, try_linear, (120, 2, 2), "the product is rounded, and its sum with the bias"),
    Row(quantized_matmul_ref, try_quantized_matmul, (160, _ONCE, _ONCE), "float32 until its end"),
    Row(embedding_ref, try_embedding, (100, _ONCE, _ONCE), "float32 until its end"),
    Row(swiglu_ref, try_swiglu, (30, 2, 2), "silu is rounded before the product, as in transformers"),
    Row(rms_norm_ref, try_rms_norm, (40, 2, 2), "rounded before the weight, as in transformers"),
    Row(add_rms_norm_ref, try_add_rms_norm, (40, 3, 3), "the sum is rounded, then as rms_norm_ref"),
    Row(rope_ref, try_rope, (4096, _ONCE, _ONCE), "an angle is a float32: as many roundings as radians"),
    Row(rope_qk_ref, try_rope_qk, (4096, 3, 3), "as rms_norm_ref, then as rope_ref"),
    Row(attention_ref, try_attention, (80, _ONCE, _ONCE), "float32 until its end"),
    Row(windowed_ref, try_windowed, (80, _ONCE, _ONCE), "as attention_ref"),
    Row(layer_norm_ref, try_layer_norm, (40, _ONCE, _ONCE), "float32 until its end"),
    Row(route_ref, try_route, (40, 40, 40), "all in float32, whatever the logits are"),
    Row(
        experts_ref,
        try_experts,
        (100, 4, 4),
        "products, silu and the gated are rounded, and the weighted sum",
    ),
    Row(paged_attention_ref, try_paged_attention, (120, _ONCE, _ONCE), "as attention_ref"),
    Row(log_probabilities, try_log_probabilities, (80, 80, 80), "all in float32, whatever the logits are"),
    Row(reported_ref, try_reported, (80, 80, 80), "some of log_probabilities"),
    Row(filter_logits, try_filter_logits, (4, 4, 4), "all in float32, whatever the logits are"),
    Row(top_k_top_p_mask, try_top_p, (40, 40, 40), "sums of float32, by blocks"),
    Row(sample_ref, try_sample, (40, 40, 40), "as the two before"),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).rpartition(".")[2])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.function.__name__)
def test_error_is_as_stated(row: Row, dtype: mx.Dtype) -> None:
    case = Case(dtype)
    with use("ref"):
        row.run(case)
    worst, allowed = max(case.errors), row.allowed[DTYPES.index(dtype)]
    assert worst <= allowed, f"{worst:.4g} roundings off, but {allowed:g} are stated: {row.why}"


NO_NUMBERS = {"constraint_ref", "mask_ref"}
"""They say which tokens may come, and round nothing."""


def test_no_function_is_without_a_stated_error() -> None:
    """A new ``_ref`` needs a row here. The bridges' run what a learner wrote, and are held to ours."""
    package = Path(tiny_llm.__file__).parent
    files = [path for path in package.rglob("*.py") if "bridges" not in path.parts]
    found = {
        (str(path.relative_to(package)), node.name)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_ref") and node.name not in NO_NUMBERS
    }
    stated = {
        (str(Path(inspect.getfile(row.function)).relative_to(package)), row.function.__name__) for row in ROWS
    }
    assert found, "no _ref function was found"
    assert found <= stated, f"without a row in ROWS: {sorted(found - stated)}"
