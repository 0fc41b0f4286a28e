"""Tensors that lie otherwise than they are wanted: renamed, transposed, fused, reordered, stacked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from tiny_llm.config import Quantization
from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.errors import WeightError
from tiny_llm.families.family import Places, Stored, fused, place_of
from tiny_llm.weights import assemble
from tiny_llm.weights.checkpoint import load_weights

Q, K = "model.layers.{}.attn.q", "model.layers.{}.attn.k"
Arrays = Mapping[str, np.ndarray]


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def load(
    folder: Path, stored: Arrays, expected: Mapping[str, tuple[int, ...]], places: Places, **how: object
) -> dict[str, Matrix]:
    save_file(dict(stored), folder / "model.safetensors")
    options = {"dtype": None, "quantization": None, "quantize": None, "quantizable": (), **how}
    return load_weights(folder, expected, places=lambda names: places, **options)


def floats(matrix: Matrix) -> np.ndarray:
    if isinstance(matrix, QuantizedTensor):
        parts = matrix.packed, matrix.scales, matrix.biases
        return np.array(mx.dequantize(*parts, group_size=matrix.group_size, bits=matrix.bits))
    return np.array(matrix)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_fused_tensor(tmp_path: Path, transposed: bool) -> None:
    whole, bias = random(10, 4), random(10)
    stored = {"h.0.qk.weight": whole.T.copy() if transposed else whole, "h.0.qk.bias": bias}
    expected = {f"model.layers.0.attn.{name}": shape for name, shape in
                {"q.weight": (6, 4), "q.bias": (6,), "k.weight": (4, 4), "k.bias": (4,)}.items()}  # fmt: skip
    places = fused("h.{}.qk", [(Q, 6), (K, 4)], transposed=transposed)
    seen: list[tuple[int, int]] = []
    got = load(tmp_path, stored, expected, places, progress=lambda *at: seen.append(at))
    wanted = [whole[:6], bias[:6], whole[6:], bias[6:]]
    for name, array in zip(expected, wanted, strict=True):
        np.testing.assert_array_equal(floats(got[name]), array, name)
    assert seen[-1][0] == seen[-1][1], "progress ends at its end"


@pytest.mark.parametrize("transposed", [False, True])
def test_they_are_quantized_as_their_rows_alone_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transposed: bool
) -> None:
    """In blocks of rows that end within what is fused."""
    whole = random(40, 64)
    monkeypatch.setattr(assemble, "BLOCK_BYTES", 7 * 64 * 4)
    name = "model.layers.0.attn.k.weight"
    places = fused("qk", [(Q, 8), (K, 32)], transposed=transposed)
    places = {**places, K: Stored(("qk",), transposed, (8, 40), 40, order=(1, 0))}
    stored = {"qk.weight": whole.T.copy() if transposed else whole}
    expected = {"model.layers.0.attn.q.weight": (8, 64), name: (32, 64)}
    got = load(tmp_path, stored, expected, places, quantize=Quantization(4, 32), quantizable=[name])[name]
    assert isinstance(got, QuantizedTensor)
    swapped = whole[8:].reshape(16, 2, 64)[:, ::-1].reshape(32, 64)
    direct = mx.quantize(mx.array(swapped), group_size=32, bits=4)
    for ours, theirs in zip((got.packed, got.scales, got.biases), direct, strict=True):
        assert mx.array_equal(ours, theirs).item()


def test_rows_of_a_quantized_tensor_in_another_order(tmp_path: Path) -> None:
    whole = mx.array(random(12, 64))
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(whole, group_size=32, bits=4), strict=True))
    stored = {f"qk.{name}": np.array(array) for name, array in parts.items()}
    places = {
        Q: Stored(("qk",), rows=(0, 4), of=12),
        K: Stored(("qk",), rows=(4, 12), of=12, order=(2, 0, 1, 3)),
    }
    expected = {"model.layers.7.attn.q.weight": (4, 64), "model.layers.7.attn.k.weight": (8, 64)}
    got = load(tmp_path, stored, expected, places, quantization=Quantization(4, 32), quantizable=expected)
    values = np.array(mx.dequantize(*parts.values(), group_size=32, bits=4))
    np.testing.assert_array_equal(floats(got["model.layers.7.attn.q.weight"]), values[:4])
    order = [6, 4, 5, 7, 10, 8, 9, 11]
    np.testing.assert_array_equal(floats(got["model.layers.7.attn.k.weight"]), values[order])


def test_several_are_stacked_and_each_may_be_transposed(tmp_path: Path) -> None:
    each = [random(64, 5) + i for i in range(3)]
    stored = {f"layers.2.expert.{i}.up.weight": array for i, array in enumerate(each)}
    modules = tuple(f"layers.{{}}.expert.{i}.up" for i in range(3))
    places = {"layers.{}.experts.up": Stored(modules, transposed=True)}
    name = "layers.2.experts.up.weight"
    got = load(tmp_path, stored, {name: (3, 5, 64)}, places)
    np.testing.assert_array_equal(floats(got[name]), np.stack([array.T for array in each]))
    packed = load(
        tmp_path, stored, {name: (3, 5, 64)}, places, quantize=Quantization(8, 64), quantizable=[name]
    )[name]
    assert isinstance(packed, QuantizedTensor) and packed.packed.shape == (3, 5, 16)
    np.testing.assert_allclose(floats(packed), np.stack([array.T for array in each]), atol=0.05)


def test_plus_one_is_added_in_float32(tmp_path: Path) -> None:
    """A norm's weight of 2 ** -12 would vanish beside 1 in bfloat16."""
    name = "model.layers.0.norm.weight"
    places = {"model.layers.{}.norm": Stored(plus=1.0)}
    got = load(tmp_path, {name: np.full(3, 2.0**-12, np.float32)}, {name: (3,)}, places, dtype=mx.bfloat16)
    assert floats(got[name]).tolist() == [1 + 2.0**-12] * 3


def test_a_fused_tensor_of_wrong_shape_missing_or_left_over_is_named(tmp_path: Path) -> None:
    places = fused("h.{}.qk", [(Q, 6), (K, 4)], transposed=True)
    expected = {"model.layers.0.attn.q.weight": (6, 4), "model.layers.0.attn.k.weight": (4, 4)}
    cases: dict[str, Arrays] = {
        r"wrong shape: h\.0\.qk\.weight is \[10, 4\], expected \[4, 10\] \(it fits if transposed\)$":
            {"h.0.qk.weight": random(10, 4)},
        r"not expected: h\.1\.qk\.weight F32 \[4, 10\]":
            {"h.0.qk.weight": random(4, 10), "h.1.qk.weight": random(4, 10)},
        "it has none of the 1 tensors": {"other.weight": random(4, 10)},
    }  # fmt: skip
    for about, stored in cases.items():
        with pytest.raises(WeightError, match=about):
            load(tmp_path, stored, expected, places)


def test_the_first_number_is_the_layer() -> None:
    places = {"a.{}.b.3.c": Stored(("x.{}.y", "z.{}.7"))}
    assert place_of("a.12.b.3.c", places).modules == ("x.12.y", "z.12.7")
    assert place_of("a1.b", places) == Stored(("a1.b",))
