"""Quantized checkpoints in other formats than MLX's affine one become the very same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import _transform_awq_weights

from tiny_llm.config import Quantization
from tiny_llm.data import Batch, Matrix, QuantizedTensor
from tiny_llm.errors import WeightError
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.checkpoint import FolderCheckpoint
from tiny_llm.models.loading import load_model
from tiny_llm.ops.backend import use, works
from tiny_llm.weights.checkpoint import load_weights

OUT, IN, GROUP = 48, 256, 64
NAME = "model.layers.0.mlp.up_proj.weight"
Tensors = Mapping[str, mx.array]
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # which column of eight lies at place 0, 1, ... of a word: AutoAWQ


def load(folder: Path, tensors: Tensors, format: Quantization) -> Matrix:
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tensors))
    options = {"dtype": None, "quantize": None, "quantizable": (NAME,), "quantization": format}
    return load_weights(folder, {NAME: (OUT, IN)}, **options)[NAME]


def floats(matrix: Matrix) -> np.ndarray:
    """A matrix's numbers in float32; in float64 where it is packed, so that nothing is rounded."""
    if not isinstance(matrix, QuantizedTensor):
        return np.array(matrix.astype(mx.float32))
    zero, one = mx.zeros_like(matrix.scales), mx.ones_like(matrix.scales)
    q = mx.dequantize(matrix.packed, one, zero, group_size=matrix.group_size, bits=matrix.bits)
    scales, biases = (
        np.repeat(np.array(part.astype(mx.float32)), matrix.group_size, axis=-1).astype(np.float64)
        for part in (matrix.scales, matrix.biases)
    )
    return np.array(q.astype(mx.float32)) * scales + biases


@pytest.mark.parametrize(("mode", "bits", "group"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_mlx_floats_are_what_mlx_makes_of_them(tmp_path: Path, mode: str, bits: int, group: int) -> None:
    rows = mx.exp(mx.random.normal((OUT, 1), key=mx.random.key(1)) * 3)
    packed, scales = mx.quantize(mx.random.normal((OUT, IN), key=mx.random.key(0)) * rows, mode=mode)
    name = NAME.removesuffix(".weight")
    made = load(tmp_path, {NAME: packed, f"{name}.scales": scales}, Quantization(bits, group, method=mode))
    expected = mx.dequantize(packed, scales, mode=mode, dtype=mx.float32)
    assert np.array_equal(floats(made), np.array(expected))
    assert isinstance(made, QuantizedTensor) == (mode == "mxfp4")


def words(values: np.ndarray, axis: int, places: tuple[int, ...] = tuple(range(8))) -> mx.array:
    """Values of 4 bits, eight to an int32 along ``axis``, by one loop over all of them."""
    values = np.moveaxis(values, axis, -1)
    made = np.zeros((*values.shape[:-1], values.shape[-1] // 8), np.uint32)
    for index in np.ndindex(made.shape):
        for place, which in enumerate(places):
            made[index] |= np.uint32(values[*index[:-1], index[-1] * 8 + which]) << np.uint32(4 * place)
    return mx.array(np.moveaxis(made, -1, axis).view(np.int32))


def random_matrix() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [in, out], zeros and half scales [in / group, out]."""
    random = np.random.default_rng(0)
    zeros = random.integers(1, 16, (IN // GROUP, OUT))
    return random.integers(0, 16, (IN, OUT)), zeros, random.random((IN // GROUP, OUT)).astype(np.float16)


def awq(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, module: str) -> Tensors:
    return {
        f"{module}.qweight": words(q, 1, AWQ_PLACES),
        f"{module}.qzeros": words(zeros, 1, AWQ_PLACES),
        f"{module}.scales": mx.array(scales),
    }


def gptq(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, module: str) -> Tensors:
    return {
        f"{module}.qweight": words(q, 0),
        f"{module}.qzeros": words(zeros - 1, 1),
        f"{module}.scales": mx.array(scales),
        f"{module}.g_idx": mx.arange(q.shape[0], dtype=mx.int32) // (q.shape[0] // scales.shape[0]),
    }


@pytest.mark.parametrize("pack", [awq, gptq])
def test_awq_and_gptq_keep_their_numbers(tmp_path: Path, pack: Callable[..., Tensors]) -> None:
    q, zeros, scales = random_matrix()
    tensors = pack(q, zeros, scales, NAME.removesuffix(".weight"))
    made = load(tmp_path, tensors, Quantization(4, GROUP, method=pack.__name__))
    wide = scales.astype(np.float64).repeat(GROUP, axis=0)
    assert np.array_equal(floats(made), ((q - zeros.repeat(GROUP, axis=0)) * wide).T)


def test_awq_is_what_mlx_lm_makes_of_it(tmp_path: Path) -> None:
    module = NAME.removesuffix(".weight")
    tensors = awq(*random_matrix(), module)
    made = load(tmp_path, tensors, Quantization(4, GROUP, method="awq"))
    theirs, _ = _transform_awq_weights(dict(tensors), {"bits": 4, "group_size": GROUP})
    assert isinstance(made, QuantizedTensor)
    assert mx.array_equal(made.packed, theirs[NAME])
    assert mx.array_equal(made.scales, theirs[f"{module}.scales"].astype(mx.float32))
    assert mx.allclose(made.biases, theirs[f"{module}.biases"].astype(mx.float32), rtol=1e-3)  # halves


def test_gptq_in_another_order_is_refused(tmp_path: Path) -> None:
    module = NAME.removesuffix(".weight")
    order = {f"{module}.g_idx": mx.arange(IN, dtype=mx.int32)[::-1] // GROUP}
    with pytest.raises(WeightError, match=f"{NAME} was quantized by GPTQ with its inputs in another order"):
        load(tmp_path, {**gptq(*random_matrix(), module), **order}, Quantization(4, GROUP, method="gptq"))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    module = NAME.removesuffix(".weight")
    tensors = dict(awq(*random_matrix(), module))
    del tensors[f"{module}.qzeros"]
    with pytest.raises(WeightError, match=rf"missing: {module}.qzeros \[4, 6\]"):
        load(tmp_path, tensors, Quantization(4, GROUP, method="awq"))


@pytest.mark.parametrize("pack", [awq, gptq])
def test_a_whole_model_of_such_matrices(
    golden: Path, tmp_path: Path, pack: Callable[..., Tensors], off: Callable[[mx.array, mx.array], float]
) -> None:
    """Its matrices are those of the golden model, rounded by groups of 32; embedding and head stay floats."""
    source = golden / "llama"
    loaded = mx.load(str(source / "model.safetensors"))
    assert isinstance(loaded, dict)
    tensors: dict[str, mx.array] = {}
    rounded: dict[str, np.ndarray] = {}
    for name, array in loaded.items():
        if "_proj" not in name:
            tensors[name] = array
            continue
        groups = np.array(array.astype(mx.float32)).T.reshape(-1, 32, array.shape[0])
        scales = (np.abs(groups).max(axis=1) / 7).astype(np.float16)
        zeros = np.full(scales.shape, 8)
        q = np.clip(np.rint(groups / scales[:, None].astype(np.float32)) + 8, 0, 15).astype(np.int64)
        rounded[name] = ((q - 8) * scales[:, None].astype(np.float32)).reshape(-1, array.shape[0]).T
        tensors |= pack(q.reshape(-1, array.shape[0]), zeros, scales, name.removesuffix(".weight"))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": pack.__name__, "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = FolderCheckpoint(tmp_path).tensors(dtype=None, quantize=None, finish=lambda weight: weight)
    assert set(read) == set(loaded)
    for name, expected in rounded.items():
        assert np.allclose(floats(read[name]), expected, rtol=1e-6)
    plain = tmp_path / "plain"
    plain.mkdir()
    wide = {name: mx.array(rounded[name]) if name in rounded else tensors[name] for name in loaded}
    mx.save_safetensors(str(plain / "model.safetensors"), wide)
    (plain / "config.json").write_text((source / "config.json").read_text())
    for name in ("ref", "cpu") if works() else ("ref",):
        with use(name):
            assert off(logits(tmp_path), logits(plain)) < 1e-5


def logits(folder: Path) -> mx.array:
    """Of a few tokens, by a model in float32 whose activations are not rounded."""
    tokens = mx.array([3, 1, 4, 1, 5, 9, 2])
    batch = Batch(tokens, mx.arange(7), (0, 7), mx.arange(7))
    return load_model(folder, dtype="float32", activations="exact")(batch, NoCache())
