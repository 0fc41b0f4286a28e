"""RoPE: by hand, its properties, and as transformers computes it with each scaling."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from tiny_llm.config_rope import RopeScaling
from tiny_llm.ops.rope import rope, rope_frequencies, rope_ref

pytestmark = pytest.mark.chapter("1.2")
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def by_loops(x: mx.array, positions: mx.array, inv_freq: mx.array, *, neighbours: bool = False) -> mx.array:
    """The definition, a pair at a time; ``neighbours`` pairs x[2i] with x[2i + 1], as the paper does."""
    D = x.shape[-1]
    out = mx.zeros_like(x)
    for t, position in enumerate(positions.tolist()):
        for i, frequency in enumerate(inv_freq.tolist()):
            a, b = (2 * i, 2 * i + 1) if neighbours else (i, i + D // 2)
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            out[t, :, a] = x[t, :, a] * cos - x[t, :, b] * sin
            out[t, :, b] = x[t, :, b] * cos + x[t, :, a] * sin
    return out


def test_by_hand() -> None:
    """One pair, one radian a position: (1, 0) goes round the circle."""
    x = mx.array([[[1.0, 0.0]]] * 3)
    got = rope(x, mx.array([0, 1, 2]), mx.array([1.0]))[:, 0].tolist()
    assert got == [pytest.approx([math.cos(p), math.sin(p)], abs=1e-6) for p in range(3)]


def test_pairs_are_half_a_head_apart() -> None:
    """A quarter turn takes (a, b, c, d) to (-c, b, a, d) if only the first pair turns."""
    x = mx.array([[[1.0, 2.0, 3.0, 4.0]]])
    got = rope(x, mx.array([1]), mx.array([math.pi / 2, 0.0])).flatten().tolist()
    hint = "pairs interleaved, expected half-split" if got == pytest.approx([-2, 1, 3, 4], abs=1e-5) else ""
    assert got == pytest.approx([-3, 2, 1, 4], abs=1e-5), hint


def test_frequencies_by_hand() -> None:
    assert rope_frequencies(4, 10_000.0).tolist() == pytest.approx([1.0, 0.01]), "theta ** (-2i / D)"
    slower = rope_frequencies(4, 10_000.0, RopeScaling("linear", 4.0)).tolist()
    assert slower == pytest.approx([0.25, 0.0025]), "linear scaling divides every frequency"


def test_llama3_divides_only_slow_pairs() -> None:
    """More than 4 turns in the trained context: kept. Less than 1: divided. Between them: in between."""
    plain = rope_frequencies(8, 1000.0).tolist()
    turns = [64 * frequency / (2 * math.pi) for frequency in plain]
    assert [round(n, 1) for n in turns] == [10.2, 1.8, 0.3, 0.1]
    share = (turns[1] - 1) / (4 - 1)
    expected = [plain[0], plain[1] * (share + (1 - share) / 8), plain[2] / 8, plain[3] / 8]
    assert rope_frequencies(8, 1000.0, LLAMA3).tolist() == pytest.approx(expected)


def test_each_token_turns_by_its_own_position(assert_close) -> None:
    """Two sequences in one batch, one of which begins anew; and a gap."""
    x, positions = mx.random.normal((6, 3, 8), key=mx.random.key(0)), mx.array([5, 6, 7, 0, 1, 40])
    frequencies = rope_frequencies(8, 10_000.0)
    assert_close(
        rope(x, positions, frequencies),
        by_loops(x, positions, frequencies),
        counted_on_from_the_first_position=by_loops(x, mx.arange(5, 11), frequencies),
        counted_from_zero=by_loops(x, mx.arange(6), frequencies),
    )


def test_turning_changes_no_length() -> None:
    x = mx.random.normal((3, 2, 8), key=mx.random.key(0))
    turned = rope(x, mx.array([0, 5, 900]), rope_frequencies(8, 10_000.0))
    pairs = [mx.square(a[..., :4]) + mx.square(a[..., 4:]) for a in (x, turned)]
    assert mx.allclose(*pairs, atol=1e-5).item()


def test_what_is_turned_stays_as_it_is() -> None:
    x = mx.random.normal((2, 1, 8), key=mx.random.key(0))
    before = mx.array(x)
    rope_ref(x, mx.array([1, 2]), rope_frequencies(8, 10_000.0))
    assert mx.array_equal(x, before).item(), "return a new array"


def test_position_zero_changes_nothing() -> None:
    x = mx.random.normal((1, 2, 8), key=mx.random.key(0))
    assert mx.array_equal(rope(x, mx.array([0]), rope_frequencies(8, 10_000.0)), x)


def test_scores_depend_on_distance_alone() -> None:
    q, k = mx.random.normal((2, 1, 1, 16), key=mx.random.key(0))
    frequencies = rope_frequencies(16, 10_000.0)

    def score(at: int, other: int) -> float:
        turned = rope(q, mx.array([at]), frequencies) * rope(k, mx.array([other]), frequencies)
        return mx.sum(turned).item()

    assert score(107, 100) == pytest.approx(score(7, 0), abs=1e-4)
    assert abs(score(7, 0) - score(8, 0)) > 1e-3, "another distance must give another score"


@pytest.mark.parametrize(
    ("case", "scaling"), [("qwen2_tied", None), ("qwen3", None), ("llama_llama3", LLAMA3)]
)
@pytest.mark.parametrize("name", ["q", "k"])
def test_as_transformers(
    assert_close, activations, case: str, scaling: RopeScaling | None, name: str
) -> None:
    seen = activations(case)
    x, positions = seen[f"layer0.{name}"], seen["positions"]
    frequencies = rope_frequencies(x.shape[-1], 10_000.0, scaling)
    plain = mx.array([10_000.0 ** (-2 * i / x.shape[-1]) for i in range(x.shape[-1] // 2)])
    mistakes = {
        "pairs_interleaved,_expected_half_split": by_loops(x, positions, frequencies, neighbours=True),
        "turned_the_other_way": by_loops(x, -positions, frequencies),
        "positions_off_by_one": by_loops(x, positions + 1, frequencies),
    }
    if scaling is not None:
        mistakes["rope_scaling_ignored"] = by_loops(x, positions, plain)
    assert_close(rope(x, positions, frequencies), seen[f"layer0.{name}_rotated"], **mistakes)


def test_bfloat16_turns_by_exact_angles(assert_close) -> None:
    """A position of 1,001 is not a bfloat16 number: angles made in bfloat16 would be far off."""
    x = mx.random.normal((1, 2, 8), key=mx.random.key(0)).astype(mx.bfloat16)
    frequencies = rope_frequencies(8, 10_000.0)
    for position in (1001, 100_003):
        exact = by_loops(x.astype(mx.float32), mx.array([position]), frequencies)
        got = rope(x, mx.array([position]), frequencies)
        assert got.dtype == mx.bfloat16
        assert_close(got, exact, tolerance=2**-7)
    assert rope_ref(x.astype(mx.float16), mx.array([1001]), frequencies).dtype == mx.float16


def test_wrong_shapes_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=r"\[rope\] expected .*positions \[.*, got .*[(\[]1"):
        rope(mx.zeros((2, 1, 8)), mx.array([0]), mx.zeros(4))
    with pytest.raises(ValueError, match=r"\[rope\] expected .*inv_freq .*, got .*[(\[]8"):
        rope(mx.zeros((2, 1, 8)), mx.array([0, 1]), mx.zeros(8))
