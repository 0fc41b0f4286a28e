"""Folders of weights, good and bad: what was expected comes back, or one message says all that is wrong."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.config import Quantization
from tiny_llm.data import QuantizedTensor
from tiny_llm.errors import WeightError
from tiny_llm.weights import assemble
from tiny_llm.weights.checkpoint import load_weights

pytestmark = pytest.mark.chapter("1.5")

EMBED, PROJ, NORM = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
SHAPES = {EMBED: (96, 64), PROJ: (32, 64), NORM: (64,)}
MATRICES = (EMBED, PROJ)
HEAD_PARTS = ("lm_head.weight", "lm_head.scales", "lm_head.biases")


def random_weights(dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    keys = mx.random.split(mx.random.key(0), len(SHAPES))
    return {
        name: mx.random.normal(shape, key=key).astype(dtype)
        for (name, shape), key in zip(SHAPES.items(), keys, strict=True)
    }


def save(folder: Path, weights: Mapping[str, mx.array], file: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / file), dict(weights))
    return folder


def save_shards(folder: Path, weights: Mapping[str, mx.array]) -> Path:
    """One shard a tensor, and the index."""
    weight_map = {name: f"model-{i:05d}.safetensors" for i, name in enumerate(weights)}
    for name, file in weight_map.items():
        save(folder, {name: weights[name]}, file)
    return save_index(folder, weight_map)


def save_index(folder: Path, weight_map: object) -> Path:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def load(folder: Path, expected: Mapping[str, tuple[int, ...]] = SHAPES, **changes: object):
    options = {"dtype": None, "quantization": None, "quantize": None, "quantizable": MATRICES}
    return load_weights(folder, expected, **{**options, **changes})


def message(folder: Path, expected: Mapping[str, tuple[int, ...]] = SHAPES, **changes: object) -> str:
    with pytest.raises(WeightError) as error:
        load(folder, expected, **changes)
    return str(error.value)


def assert_same(got: mx.array, wanted: mx.array, name: str) -> None:
    assert got.dtype == wanted.dtype, f"{name}: {got.dtype}, expected {wanted.dtype}"
    assert mx.array_equal(got, wanted).item(), f"{name} differs"


@pytest.mark.parametrize("layout", [save, save_shards])
def test_one_file_and_shards_give_back_what_was_saved(tmp_path, layout):
    weights = random_weights(mx.bfloat16)
    got = load(layout(tmp_path, weights))
    assert list(got) == list(SHAPES), "the result must have the expected names, in their order"
    for name, array in got.items():
        assert_same(array, weights[name], name)


def test_the_only_safetensors_file_may_have_any_name(tmp_path):
    assert load(save(tmp_path, random_weights(), "weights.safetensors")).keys() == SHAPES.keys()


@pytest.mark.parametrize("stored", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("wanted", [None, mx.float32, mx.bfloat16])
def test_floats_become_the_dtype_asked_for(tmp_path, stored, wanted):
    weights = random_weights(stored)
    for name, array in load(save(tmp_path, weights), dtype=wanted).items():
        assert_same(array, weights[name].astype(wanted or stored), name)


def test_progress_counts_the_bytes_that_are_read(tmp_path):
    calls: list[tuple[int, int]] = []
    load(save(tmp_path, random_weights()), progress=lambda done, total: calls.append((done, total)))
    total = (96 * 64 + 32 * 64 + 64) * 4
    assert calls[-1] == (total, total) and len(calls) == len(SHAPES)
    assert calls == sorted(calls)


@pytest.mark.parametrize("options", [{}, {"dtype": mx.float32}, {"quantize": Quantization(8, 64)}])
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, options):
    """The largest matrix, a third of all, is read first: its source must not meet the others."""
    shapes = {"embed.weight": (512, 256)} | {f"layers.{i}.weight": (64, 256) for i in range(16)}
    folder = save(tmp_path, {name: mx.zeros(shape, mx.bfloat16) for name, shape in shapes.items()})
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    weights = load(folder, shapes, quantizable=list(shapes), **options)
    kept = mx.get_active_memory() - before
    ratio = (mx.get_peak_memory() - before) / kept
    assert len(weights) == 17 and ratio <= 1.2, f"peak is {ratio:.2f} times the {kept} bytes of the weights"


def test_the_real_checkpoint_of_others_loads(stories260k):
    shapes = {"model.embed_tokens.weight": (512, 64), "model.norm.weight": (64,)}
    for i in range(5):
        layer = f"model.layers.{i}"
        square = {f"{layer}.self_attn.{name}_proj.weight": (64, 64) for name in "qo"}
        narrow = {f"{layer}.self_attn.{name}_proj.weight": (32, 64) for name in "kv"}
        mlp = {f"{layer}.mlp.{name}_proj.weight": (172, 64) for name in ("gate", "up")}
        norms = {f"{layer}.{name}_layernorm.weight": (64,) for name in ("input", "post_attention")}
        shapes |= square | narrow | mlp | norms | {f"{layer}.mlp.down_proj.weight": (64, 172)}
    assert {name: array.shape for name, array in load(stories260k, shapes).items()} == shapes


# What does not fit.


def test_everything_that_is_wrong_is_in_one_message(tmp_path):
    weights = random_weights()
    weights["model.norm.wieght"] = weights.pop(NORM)
    weights[PROJ] = weights[PROJ].T
    weights[EMBED] = weights[EMBED].astype(mx.int32)
    lines = message(save(tmp_path, weights)).splitlines()
    assert "4 problems" in lines[0] and str(tmp_path) in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        f"missing: {NORM} [64]. Did you mean 'model.norm.wieght'?",
        f"wrong dtype: {EMBED} is I32, expected F32 or BF16 or F16",
        f"wrong shape: {PROJ} is [64, 32], expected [32, 64] (it fits if transposed)",
        "not expected: model.norm.wieght F32 [64] in model.safetensors",
    ]


def test_one_problem_is_one_line(tmp_path):
    weights = random_weights()
    del weights[NORM]
    assert "\n" not in message(save(tmp_path, weights))


def test_many_problems_are_counted_not_listed(tmp_path):
    expected = SHAPES | {f"model.layers.{i}.self_attn.q_proj.bias": (64,) for i in range(500)}
    lines = message(save(tmp_path, random_weights()), expected).splitlines()
    assert len(lines) == 10 and lines[-1].strip() == "and 492 more"


def test_a_checkpoint_of_another_architecture_says_so(tmp_path):
    text = message(save(tmp_path, {"transformer.wte.weight": mx.zeros((4, 4))}))
    assert "none of the 3 tensors" in text and "transformer.wte.weight" in text and "\n" not in text


def test_harmless_left_overs_of_old_exporters(tmp_path):
    weights = random_weights()
    weights["lm_head.weight"] = weights[EMBED]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros((8,))
    folder = save(tmp_path, weights)
    assert load(folder, unread=(".rotary_emb.inv_freq",)).keys() == SHAPES.keys()
    assert "not expected: model.layers.0.self_attn.rotary_emb.inv_freq" in message(folder)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("packed", [False, True], ids=["float model", "quantized model"])
def test_a_quantized_copy_of_the_embedding_is_dropped_too(tmp_path, bits, packed):
    """A tied model whose file also has lm_head.weight, .scales and .biases."""
    weights = random_weights()
    head = dict(zip(HEAD_PARTS, mx.quantize(weights[EMBED], 32, bits), strict=True))
    if packed:
        values, scales, biases = mx.quantize(weights[EMBED], 64, 4)
        embed = EMBED.removesuffix(".weight")
        weights |= {EMBED: values, f"{embed}.scales": scales, f"{embed}.biases": biases}
    quantization = Quantization(group_size=64, bits=4) if packed else None
    assert list(load(save(tmp_path, weights | head), quantization=quantization)) == list(SHAPES)


def test_a_quantized_head_that_is_no_copy_is_not_dropped(tmp_path):
    weights = random_weights()
    other = dict(zip(HEAD_PARTS, mx.quantize(mx.zeros((95, 64)), 32, 4), strict=True))
    assert "not expected: lm_head.weight" in message(save(tmp_path / "rows", weights | other))
    cut = dict(zip(HEAD_PARTS[:2], mx.quantize(weights[EMBED], 32, 4), strict=False))
    assert "not expected: lm_head.weight" in message(save(tmp_path / "parts", weights | cut))


def test_a_head_that_is_no_copy_of_the_embedding_is_not_harmless(tmp_path):
    weights = random_weights() | {"lm_head.weight": mx.zeros((95, 64))}
    assert "not expected: lm_head.weight" in message(save(tmp_path, weights))


# Folders that are not whole, or not honest.


def test_no_weights(tmp_path):
    assert "no weights" in message(tmp_path)


def test_weights_of_another_format_are_named_and_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04never unpickled")
    assert "pytorch_model.bin" in message(tmp_path) and "safetensors" in message(tmp_path)


def test_several_files_need_an_index(tmp_path):
    (save_shards(tmp_path, random_weights()) / "model.safetensors.index.json").unlink()
    assert "3 safetensors files but no model.safetensors.index.json" in message(tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path):
    save_shards(tmp_path, random_weights())
    (tmp_path / "model-00001.safetensors").unlink()
    assert "model-00001.safetensors is missing" in message(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path):
    save_shards(tmp_path, random_weights())
    save_index(tmp_path, dict.fromkeys(SHAPES, "model-00000.safetensors"))
    assert f"puts {PROJ} in model-00000.safetensors" in message(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    save_shards(tmp_path, random_weights())
    save(tmp_path, random_weights(), "model-00002.safetensors")
    assert "stored twice" in message(tmp_path)


OUTSIDE = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "a/b.safetensors",
    "..\\x.safetensors",
    "C:x.safetensors",
]


@pytest.mark.parametrize("file", [*OUTSIDE, "x.bin", "..", "", 3, None, ["x.safetensors"], "x\0.safetensors"])
def test_a_weight_map_may_only_name_files_of_its_folder(tmp_path, file):
    save(tmp_path, random_weights(), "x.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    text = message(save_index(folder, {EMBED: file}))
    assert "only a *.safetensors file of the same folder" in text and "\n" not in text


def test_a_shard_that_links_out_of_its_folder_is_refused(tmp_path):
    save(tmp_path, random_weights(), "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("../secret.safetensors")
    assert "outside its folder" in message(folder)


@pytest.mark.parametrize("blobs", ["models--ada--tiny/blobs", "blobs/ab"])
def test_the_hub_cache_links_into_its_own_blobs(tmp_path, blobs):
    """huggingface_hub keeps a file's bytes in the repository's blobs, or in some shared by all."""
    save((tmp_path / blobs).parent, {}, "unused")
    (tmp_path / blobs).mkdir(exist_ok=True)
    save(tmp_path / blobs, random_weights(), "abc.safetensors")
    snapshot = tmp_path / "models--ada--tiny" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(tmp_path / blobs / "abc.safetensors")
    assert load(snapshot).keys() == SHAPES.keys()


@pytest.mark.parametrize("index", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b"[" * 100_000, b"\xff"])
def test_a_broken_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    text = message(tmp_path)
    assert "model.safetensors.index.json" in text and "\n" not in text


def test_a_bit_flip_of_the_header_is_refused_or_changes_nothing(tmp_path):
    weights = random_weights()
    path = save(tmp_path, weights) / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng, loaded = random.Random(0), 0
    for bit in [rng.randrange(header * 8) for _ in range(300)]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            got = load(tmp_path)
        except WeightError:
            continue
        loaded += 1
        for name, array in got.items():
            assert_same(array, weights[name], f"bit {bit}: {name}")
    assert loaded < 300, "no flip was seen"


# Quantized checkpoints.


def quantized(name: str, weights: dict[str, mx.array], bits: int, group: int) -> dict[str, mx.array]:
    module = name.removesuffix(".weight")
    packed, scales, biases = mx.quantize(weights[name], group_size=group, bits=bits)
    return {name: packed, f"{module}.scales": scales, f"{module}.biases": biases}


def dense(tensor: QuantizedTensor) -> mx.array:
    return mx.dequantize(
        tensor.packed, tensor.scales, tensor.biases, group_size=tensor.group_size, bits=tensor.bits
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_quantized_checkpoint_comes_back_as_it_is(tmp_path, bits, group):
    shapes = {PROJ: (32, 256), NORM: (64,)}
    weights = {PROJ: mx.random.normal((32, 256), key=mx.random.key(0)), NORM: mx.ones((64,))}
    parts = quantized(PROJ, weights, bits, group)
    folder = save(tmp_path, weights | parts)
    got = load(folder, shapes, quantization=Quantization(bits, group))[PROJ]
    assert isinstance(got, QuantizedTensor) and (got.bits, got.group_size) == (bits, group)
    for array, part in zip((got.packed, got.scales, got.biases), parts.values(), strict=True):
        assert_same(array, part, PROJ)


def test_scales_take_the_dtype_and_packed_values_keep_theirs(tmp_path):
    weights = random_weights(mx.bfloat16)
    folder = save(tmp_path, weights | quantized(PROJ, weights, 4, 64))
    got = load(folder, quantization=Quantization(4, 64), dtype=mx.float32)[PROJ]
    assert (got.packed.dtype, got.scales.dtype, got.biases.dtype) == (mx.uint32, mx.float32, mx.float32)


def test_a_module_may_have_its_own_format_or_none(tmp_path):
    weights = random_weights()
    folder = save(tmp_path, weights | quantized(PROJ, weights, 8, 32))
    own = {PROJ.removesuffix(".weight"): Quantization(8, 32), EMBED.removesuffix(".weight"): None}
    got = load(folder, quantization=Quantization(4, 64, own))
    assert (got[PROJ].bits, got[PROJ].group_size) == (8, 32)
    assert_same(got[EMBED], weights[EMBED], EMBED)


def test_a_matrix_left_float_needs_no_override(tmp_path):
    """MLX's tools decide by the scales' presence, so older checkpoints list no exceptions."""
    weights = random_weights()
    folder = save(tmp_path, weights | quantized(PROJ, weights, 4, 64))
    assert_same(load(folder, quantization=Quantization(4, 64))[EMBED], weights[EMBED], EMBED)


def test_scales_of_another_group_are_named(tmp_path):
    weights = random_weights()
    folder = save(tmp_path, weights | quantized(PROJ, weights, 4, 32))
    text = message(folder, quantization=Quantization(4, 64))
    assert "wrong shape: model.layers.0.mlp.up_proj.scales is [32, 2], expected [32, 1]" in text


def test_scales_that_are_missing_are_named(tmp_path):
    weights = random_weights()
    parts = quantized(PROJ, weights, 4, 64)
    del parts["model.layers.0.mlp.up_proj.scales"]
    text = message(save(tmp_path, weights | parts), quantization=Quantization(4, 64))
    assert "missing: model.layers.0.mlp.up_proj.scales [32, 1]" in text


def test_packed_weights_without_a_word_in_the_config(tmp_path):
    weights = random_weights()
    text = message(save(tmp_path, weights | quantized(PROJ, weights, 4, 64)))
    assert f"{PROJ} is U32 (packed integers, but its config says nothing of a quantization)" in text


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32), (3, 64)])
def test_quantizing_on_load_is_what_mlx_does(tmp_path, bits, group):
    weights = random_weights()
    got = load(save(tmp_path, weights), quantize=Quantization(bits, group))
    assert_same(got[NORM], weights[NORM], NORM)
    for name in MATRICES:
        wanted = list(quantized(name, weights, bits, group).values())
        for array, part in zip((got[name].packed, got[name].scales, got[name].biases), wanted, strict=True):
            assert_same(array, part, name)
    error = mx.abs(dense(got[PROJ]) - weights[PROJ]).max().item()
    step = mx.abs(got[PROJ].scales).max().item()
    assert error <= step, f"off by {error}, a step is {step}"


def test_a_matrix_quantized_by_blocks_of_rows_is_the_same(tmp_path, monkeypatch):
    weights = random_weights(mx.bfloat16)
    whole = load(save(tmp_path, weights), quantize=Quantization(4, 64))[EMBED]
    for size in (1, 7 * 64 * 2, 95 * 64 * 2):
        monkeypatch.setattr(assemble, "BLOCK_BYTES", size)
        blocks = load(tmp_path, quantize=Quantization(4, 64))[EMBED]
        for name in ("packed", "scales", "biases"):
            assert_same(getattr(blocks, name), getattr(whole, name), f"{name}, {size} bytes at a time")


def test_each_entry_is_finished_before_the_next_is_read(tmp_path):
    """Largest first; what ``finish`` returns is what comes back."""
    seen = []

    def finish(weight: mx.array) -> mx.array:
        seen.append(weight.shape)
        return weight + 1

    weights = random_weights()
    got = load(save(tmp_path, weights), finish=finish)
    assert seen == [SHAPES[EMBED], SHAPES[PROJ], SHAPES[NORM]]
    for name, array in got.items():
        assert_same(array, weights[name] + 1, name)


@pytest.mark.parametrize(("columns", "group"), [(128, 64), (96, 32), (80, None)])
def test_the_group_shrinks_until_it_divides(tmp_path, columns, group):
    weights = {PROJ: mx.random.normal((32, columns), key=mx.random.key(0))}
    got = load(save(tmp_path, weights), {PROJ: (32, columns)}, quantize=Quantization(4, 64))[PROJ]
    assert (got.group_size if isinstance(got, QuantizedTensor) else None) == group


def test_quantizing_what_is_quantized_is_refused(tmp_path):
    weights = random_weights()
    folder = save(tmp_path, weights | quantized(PROJ, weights, 4, 64))
    text = message(folder, quantization=Quantization(4, 64), quantize=Quantization(8, 64))
    assert "quantized already, to 4 bits" in text
