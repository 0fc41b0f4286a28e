"""GPT-2 checkpoints as they are found: three prefixes, buffers of masks, mlx-lm's; and what it cannot do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.config import ModelConfig
from tiny_llm.data import QuantizedTensor
from tiny_llm.errors import ConfigError, WeightError
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.loading import load_model
from tiny_llm.ops.backend import use

MATRICES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.fixture
def gpt2(golden: Path) -> Path:
    return golden / "gpt2"


def respelled(folder: Path, copy: Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> Path:
    """A copy of a checkpoint whose tensors ``change`` makes of those without a prefix."""
    shutil.copytree(folder, copy)
    path = copy / "model.safetensors"
    stored = mx.load(str(path))
    assert isinstance(stored, dict)
    bare = {name.removeprefix("transformer."): array for name, array in stored.items()}
    assert bare.keys() != stored.keys(), "transformers saves it with a prefix"
    mx.save_safetensors(str(path), change(bare))
    return copy


def logits_of(folder: Path, make_batch: Callable[..., object]) -> mx.array:
    with use("ref"):
        logits = load_model(folder, dtype="float32")(make_batch([5, 3, 9, 1]), NoCache())  # type: ignore[arg-type]
        mx.eval(logits)
    return logits


def test_openai_s_own_files_have_no_prefix_but_masks(gpt2: Path, tmp_path: Path, make_batch) -> None:
    def as_published(bare: dict[str, mx.array]) -> dict[str, mx.array]:
        masks = {f"h.{i}.attn.bias": mx.tri(128).reshape(1, 1, 128, 128) for i in range(2)}
        return bare | masks | {f"h.{i}.attn.masked_bias": mx.array([-1e4]) for i in range(2)}

    copy = respelled(gpt2, tmp_path / "copy", as_published)
    assert mx.array_equal(logits_of(copy, make_batch), logits_of(gpt2, make_batch)).item()


@pytest.mark.parametrize("bits", [None, 8])
def test_mlx_lm_s_files_have_their_matrices_turned(
    gpt2: Path, tmp_path: Path, make_batch, off, bits: int | None
) -> None:
    """And may have packed them."""

    def converted(bare: dict[str, mx.array]) -> dict[str, mx.array]:
        turned = {
            f"model.{name}": array.T if name.endswith(MATRICES) else array for name, array in bare.items()
        }
        if bits is None:
            return {name: mx.contiguous(array) for name, array in turned.items()}
        found = {}
        for name, array in turned.items():
            if array.ndim == 2 and array.shape[1] % 32 == 0:
                parts = mx.quantize(array, group_size=32, bits=bits)
                module = name.removesuffix(".weight")
                found |= dict(zip((name, f"{module}.scales", f"{module}.biases"), parts, strict=True))
            else:
                found[name] = array
        return {name: mx.contiguous(array) for name, array in found.items()}

    wide = tmp_path / "wide"  # of a width that groups of 32 divide
    shutil.copytree(gpt2, wide)
    config = json.loads((wide / "config.json").read_text()) | {"n_embd": 64, "n_head": 4, "n_inner": 96}
    (wide / "config.json").write_text(json.dumps(config))
    stored = mx.load(str(gpt2 / "model.safetensors"))
    assert isinstance(stored, dict)
    sizes = {40: 64, 72: 96, 120: 192}
    noise = {
        name: mx.random.normal([sizes.get(size, size) for size in array.shape], key=mx.random.key(i)) / 8
        for i, (name, array) in enumerate(stored.items())
    }
    mx.save_safetensors(str(wide / "model.safetensors"), noise)
    copy = respelled(wide, tmp_path / "copy", converted)
    if bits is not None:
        packed = config | {"quantization": {"bits": bits, "group_size": 32}}
        (copy / "config.json").write_text(json.dumps(packed))
    assert off(logits_of(copy, make_batch), logits_of(wide, make_batch)) < (1e-6 if bits is None else 0.05)
    if bits is not None:
        model = load_model(copy)
        assert isinstance(model, Decoder)
        with use("ref"):
            query = load_model(copy).layers[0].self_attn.q_proj.weight  # type: ignore[attr-defined]
        assert isinstance(query, QuantizedTensor) and query.packed.shape == (64, 16)


def test_a_tensor_that_is_missing_has_its_stored_name(gpt2: Path, tmp_path: Path) -> None:
    copy = respelled(
        gpt2, tmp_path / "copy", lambda bare: bare | {"h.1.attn.c_attn.weight": bare.pop("ln_f.bias")}
    )
    with pytest.raises(WeightError) as error:
        load_model(copy)
    assert "missing: ln_f.bias [40]" in str(error.value)
    assert "wrong shape: h.1.attn.c_attn.weight is [40], expected [40, 120]" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "about"),
    [
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is True, expected false"),
        ("scale_attn_weights", False, "scale_attn_weights is False, expected true"),
        ("activation_function", "relu", "activation_function is 'relu', expected 'gelu_new'"),
        ("add_cross_attention", True, "add_cross_attention is True: it changes the model's result"),
    ],
)
def test_what_would_change_the_result_is_refused(field: str, value: object, about: str) -> None:
    with pytest.raises(ConfigError, match=about):
        ModelConfig.from_hf({"model_type": "gpt2", field: value})


def test_places_beyond_the_table_have_the_last_one_s(gpt2: Path, make_batch) -> None:
    """Where a draft model guesses beyond its own context: no memory that is not its own is read."""
    model = load_model(gpt2)
    last, beyond = (model(make_batch([5], start=start), NoCache()) for start in (127, 100_000))
    assert mx.array_equal(last, beyond).item()


def test_keys_of_learned_places_cannot_be_turned(gpt2: Path) -> None:
    """So contexts are joined exactly: see Contexts."""
    model = load_model(gpt2)
    assert isinstance(model, Decoder) and model.inv_freq is None
