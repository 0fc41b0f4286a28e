"""Bytes computed from a config are those of loaded models, of steps that are run, of Adam's state."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import mlx.optimizers as optimizers
import pytest

from tiny_llm.config import ModelConfig, Quantization
from tiny_llm.decoding.generate import one_sequence
from tiny_llm.kv.dense import DenseCache
from tiny_llm.models.footprint import (
    activation_bytes,
    held_tokens,
    kv_token_bytes,
    parameter_count,
    read_bytes,
    tensor_bytes,
    training_bytes,
    weights_bytes,
    widest_window,
)
from tiny_llm.models.loading import load_model, weight_bytes, weight_dtype
from tiny_llm.models.registry import expected_tensors, load_config
from tiny_llm.ops.backend import use, works
from tiny_llm.ops.kv_pool import KvFormat
from tiny_llm.planning.memory import serving_need
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.weights.hub import resolve
from tiny_llm.weights.names import config_of, short_names

DEMO = resolve("demo")
CONFIG = load_config(DEMO)
ALL = {name: ModelConfig.from_hf(config_of(name)) for name in short_names()}


@pytest.mark.chapter("0.2")
@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, 8, 4])
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_weights_are_those_of_a_loaded_model(backend: str, quantize: int | None, dtype: str | None) -> None:
    model = load_model(DEMO, quantize=quantize, dtype=dtype)
    matrix = weight_dtype(CONFIG, dtype=dtype, quantize=quantize).size
    vector = 4 if backend == "cpu" else matrix
    format = None if quantize is None else Quantization(quantize, 64)
    frequencies = CONFIG.head_dim // 2 * 4  # rope's, which no checkpoint has
    computed = weights_bytes(CONFIG, matrix, vector, format) + frequencies
    loaded = weight_bytes(model)
    assert loaded == computed, f"{computed / loaded:.4f} of what is loaded"


@pytest.mark.parametrize("name", ALL)
def test_parameters_are_the_published_ones(name: str) -> None:
    count = parameter_count(ALL[name])
    config = ALL[name]
    head = config.vocab_size * config.hidden_size
    twice = " (the tied head was counted twice)" if count - head == short_names()[name].parameters else ""
    assert count == short_names()[name].parameters, twice


def test_a_step_reads_the_experts_that_it_meets() -> None:
    """Of Qwen1.5-MoE's 60 one token meets 4, two tokens meet 4 + 56 * 4 / 60. "A2.7B" counts the table."""
    config, everything = ALL["qwen1.5-moe-a2.7b"], 2 * short_names()["qwen1.5-moe-a2.7b"].parameters
    expert, table = 2 * 24 * 3 * 2048 * 1408, 2 * 151_936 * 2048
    assert weights_bytes(config, 2, 2) == everything
    assert read_bytes(config, 2, 2, tokens=1) == everything - table - 56 * expert
    assert read_bytes(config, 2, 2, tokens=2) == pytest.approx(
        everything - table - (56 - 56 * 4 / 60) * expert
    )
    assert (read_bytes(config, 2, 2, tokens=1) + table) / 2e9 == pytest.approx(2.7, abs=0.05)
    assert config.intermediate_size == 4 * 1408 + 5632, "what a token goes through"


def test_an_untied_table_is_not_read() -> None:
    config = ALL["llama-3-8b"]
    head = 2 * config.vocab_size * config.hidden_size
    assert read_bytes(config, 2, 2, tokens=1) == weights_bytes(config, 2, 2) - head


@pytest.mark.chapter("0.2")
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 64), (4, 32), (4, 64), (4, 128), (6, 64), (8, 64)])
def test_a_quantized_matrix_has_two_numbers_a_group(bits: int, group: int) -> None:
    shape = (24, 768)
    parts = mx.quantize(mx.ones(shape, mx.bfloat16), group_size=group, bits=bits)
    expected, values = sum(part.nbytes for part in parts), parts[0].nbytes
    computed = tensor_bytes(shape, 2, Quantization(bits, group))
    known = {
        values: "scales and biases are missing",
        (expected + values) // 2: "a group has a scale and a bias",
        2 * expected - values: "scales and biases take 2 bytes here",
    }
    assert computed == expected, known.get(computed, f"{computed} bytes, expected {expected}")
    assert tensor_bytes(shape, 4) == mx.zeros(shape).nbytes
    wide = sum(part.nbytes for part in mx.quantize(mx.ones(shape), group_size=group, bits=bits))
    assert tensor_bytes(shape, 4, Quantization(bits, group)) == wide, "scales and biases are of item_bytes"
    assert type(computed) is int, "bytes are whole numbers"


@pytest.mark.chapter("0.2")
@pytest.mark.parametrize("shape", [(768,), (2, 768), (3, 2, 768)])
def test_a_tensor_may_have_any_number_of_axes(shape: tuple[int, ...]) -> None:
    assert tensor_bytes(shape, 2) == mx.zeros(shape, mx.bfloat16).nbytes
    parts = mx.quantize(mx.ones((2, *shape), mx.bfloat16), group_size=64, bits=4)
    assert tensor_bytes((2, *shape), 2, Quantization(4, 64)) == sum(part.nbytes for part in parts)
    assert 2 * tensor_bytes(shape, 2, Quantization(4, 64)) == sum(part.nbytes for part in parts)


@pytest.mark.chapter("0.2")
def test_a_tokens_keys_and_values_as_published() -> None:
    llama, mha = ALL["llama-3-8b"], 32 * 128 * 2 * 32 * 2
    computed = kv_token_bytes(llama, 2)
    known = {64: "values, or keys, are missing", 4: "of one layer", mha // 1024: "counts query heads"}
    assert computed == 128 * 1024, f"{computed / 1024} KiB: {known.get(computed // 1024, 'expected 128')}"
    assert kv_token_bytes(ALL["qwen2-0.5b"], 2) == 12 * 1024
    assert kv_token_bytes(ALL["qwen2-0.5b"], 1) == 6 * 1024
    wide = ALL["qwen3-0.6b"]
    assert wide.head_dim * wide.num_heads == 2 * wide.hidden_size, "a head is as wide as the config says"
    assert kv_token_bytes(wide, 2) == 2 * 28 * 8 * 128 * 2


@pytest.mark.chapter("0.2")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int8])
@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2-0.5b"])
def test_the_pools_format_takes_as_many(name: str, dtype: mx.Dtype) -> None:
    format = KvFormat.of(ALL[name], 16, dtype)
    assert format.scale_bytes == (2 * 2 * format.num_layers * format.heads if dtype == mx.int8 else 0)
    assert format.token_bytes == kv_token_bytes(ALL[name], dtype.size) + format.scale_bytes
    assert format.block_bytes == 16 * format.token_bytes


def peaks(tokens: int, tries: int) -> list[int]:
    """Bytes that a step of the bundled model allocates at most, beyond keys and values, in each try."""
    if not works():
        pytest.skip("the CPU kernels were not built: no C++ compiler")
    found = []
    with use("cpu"):
        model = load_model(DEMO)
        kv = DenseCache(CONFIG.num_layers, mx.bfloat16)
        for _ in range(tries + 1):
            kv.truncate(0)
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            mx.eval(model(one_sequence([1] * tokens, start=0), kv))
            found.append(mx.get_peak_memory() - before)
    return found[1:]  # the first also makes the cache


@pytest.mark.chapter("0.2")
@pytest.mark.slow
def test_a_step_allocates_what_is_computed() -> None:
    """All layers' results are there at once, unless the thread that allocates is held up for a while."""
    measured, computed = max(peaks(250, tries=8)), activation_bytes(CONFIG, 250, 1)
    assert 0.7 < measured / computed < 1.1, f"{computed:,} computed, {measured:,} measured"


@pytest.mark.chapter("0.2")
def test_a_step_by_hand() -> None:
    """6 E + 3 (H + K) D + F floats a token, of at most seven layers."""
    wide, deep = ALL["qwen3-0.6b"], ALL["qwen2-0.5b"]
    floats = {
        wide: 6 * 1024 + 3 * (16 + 8) * 128 + 3072,
        deep: 6 * 896 + 3 * (14 + 2) * 64 + 4864,
        CONFIG: 6 * 256 + 3 * (4 + 2) * 64 + 768,
    }
    for config, token in floats.items():
        layers = min(config.num_layers, 7)
        assert activation_bytes(config, 10, 3) == 4 * (layers * 10 * token + 3 * config.vocab_size)
    assert CONFIG.num_layers < 7 < deep.num_layers
    for config, layers in ((CONFIG, CONFIG.num_layers), (deep, 7)):
        more = activation_bytes(config, 10, 3, gathered=1000) - activation_bytes(config, 10, 3)
        assert more == 1000 * layers, "each layer that is there at once gathers its own"


@pytest.mark.chapter("0.2")
def test_logits_are_counted_for_rows_only() -> None:
    wide = ALL["qwen2-0.5b"]
    assert activation_bytes(wide, 8, 2) - activation_bytes(wide, 8, 1) == 4 * wide.vocab_size
    assert activation_bytes(wide, 8, 1) - activation_bytes(wide, 8, 0) == 4 * wide.vocab_size, "0 is a number"
    sizes = [activation_bytes(wide, tokens, 1) for tokens in (100, 200, 300)]
    assert len({after - before for before, after in pairwise(sizes)}) == 1, "it grows with the tokens"


@pytest.mark.chapter("0.2")
def test_training_keeps_what_adam_keeps() -> None:
    tensors = {name: mx.zeros(shape, mx.float32) for name, shape in expected_tensors(CONFIG).items()}
    adam = optimizers.Adam(1e-3)
    adam.init(tensors)
    moments = sum(
        state[part].nbytes for state in adam.state.values() if isinstance(state, dict) for part in "mv"
    )
    need = training_bytes(CONFIG, 1024)
    assert need.moments == moments, "two float32 moments a parameter"
    assert need.master == sum(tensor.nbytes for tensor in tensors.values())
    assert need.weights == need.gradients == need.master // 2, "bfloat16"
    assert sum(need[:4]) == 16 * parameter_count(CONFIG)


@pytest.mark.chapter("0.2")
def test_training_keeps_each_layers_results() -> None:
    names = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    E, F, H, K, D = (getattr(CONFIG, name) for name in names)
    layer = {
        "x": E,
        "norm": E,
        "q": H * D,
        "kv": 2 * K * D,
        "out": H * D,
        "sum": E,
        "norm 2": E,
        "mlp": 3 * F,
    }
    logits = 4 * CONFIG.vocab_size
    need = training_bytes(CONFIG, 10).activations
    assert need == 10 * (2 * CONFIG.num_layers * sum(layer.values()) + logits), layer
    deep = ALL["qwen3-0.6b"]
    token = 4 * 1024 + 2 * (16 + 8) * 128 + 3 * 3072
    need = training_bytes(deep, 10).activations
    assert need == 10 * (2 * 28 * token + 4 * deep.vocab_size), (
        "all layers count, and head_dim is the config's"
    )


def test_where_every_layer_has_a_window_a_sequence_holds_that_and_a_step() -> None:
    raw = config_of("mistral-7b") | {"sliding_window": 4096}
    every = ModelConfig.from_hf(raw)
    kinds = ["sliding_attention", "full_attention"] * (every.num_layers // 2)
    some, none = ModelConfig.from_hf(raw | {"layer_types": kinds}), ALL["mistral-7b"]
    assert [widest_window(one) for one in (every, some, none)] == [4096, 0, 0]
    assert [held_tokens(one, 30_000, 512) for one in (every, some, none)] == [4608, 30_000, 30_000]
    assert held_tokens(every, 3000, 512) == 3000
    needs = [serving_need(one, 0, 1000, 0, 30_000, 2).kv for one in (every, none)]
    step = SchedulerSettings().max_num_batched_tokens
    assert needs == [2 * -(-(4096 + step) // 16) * 16 * 1000, 2 * 30_000 * 1000]
