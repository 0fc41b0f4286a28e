"""config.json: what is read, in both spellings, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_llm.config import ModelConfig, Quantization
from tiny_llm.config_rope import RopeScaling
from tiny_llm.errors import ConfigError
from tiny_llm.families.built_in import FAMILIES
from tiny_llm.families.family import Family
from tiny_llm.models.registry import load_config

QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "use_mrope": False,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
GPTQ: dict[str, object] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "torch_dtype": "bfloat16",
}
MISTRAL = LLAMA | {"model_type": "mistral", "rope_scaling": None, "sliding_window": None}
QWEN3 = QWEN2 | {"model_type": "qwen3", "attention_bias": False}


def read(base: dict[str, object], **changes: object) -> ModelConfig:
    return ModelConfig.from_hf(base | changes)


def without(base: dict[str, object], *names: str) -> dict[str, object]:
    return {name: value for name, value in base.items() if name not in names}


# What is read


def test_qwen2() -> None:
    config = read(QWEN2)
    assert (config.head_dim, config.num_kv_heads, config.num_layers) == (64, 2, 24)
    assert (config.attention_bias, config.output_bias, config.mlp_bias, config.qk_norm) == (
        True,
        False,
        False,
        "",
    )
    assert (config.rope_theta, config.rope_scaling) == (1e6, None)
    assert (config.eos_token_ids, config.dtype) == ((151645,), "bfloat16")
    assert config.tie_word_embeddings


def test_llama() -> None:
    config = read(LLAMA)
    assert config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert not (config.attention_bias or config.output_bias or config.mlp_bias)
    biased = read(LLAMA, attention_bias=True, mlp_bias=True)
    assert biased.attention_bias and biased.output_bias and biased.mlp_bias


def test_qwen3() -> None:
    config = read(QWEN3)
    assert config.qk_norm == "head" and not config.attention_bias
    assert config.head_dim == 128, "its class has 128 where config.json says nothing"
    biased = read(QWEN3, attention_bias=True)
    assert biased.attention_bias and biased.output_bias


def test_what_transformers_leaves_out() -> None:
    bare = without(LLAMA, "head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "eos_token_id")
    config = ModelConfig.from_hf(without(bare, "rms_norm_eps", "tie_word_embeddings", "torch_dtype"))
    assert (config.head_dim, config.num_kv_heads, config.rope_theta) == (64, 32, 10_000.0)
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.eos_token_ids) == (1e-6, False, ())
    assert (config.rope_scaling, config.dtype) == (None, "float32")


LLAMA3 = LLAMA["rope_scaling"]
assert isinstance(LLAMA3, dict)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 1e6}}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 10000}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        ),
        ({"rope_scaling": {"type": "default"}}, {"rope_parameters": {}}),
    ],
)
def test_transformers_4_and_5_spell_the_same_rope(old: dict[str, object], new: dict[str, object]) -> None:
    base = without(LLAMA, "rope_theta", "rope_scaling")
    assert read(base, **old) == read(base, **new)
    assert read(base, torch_dtype="float16") == read(without(base, "torch_dtype"), dtype="float16")


def test_both_spellings_at_once_must_agree() -> None:
    both = {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}
    assert read(LLAMA, **both) == read(LLAMA)
    with pytest.raises(ConfigError, match="rope_theta, rope_scaling and rope_parameters contradict"):
        read(LLAMA, rope_parameters=LLAMA3 | {"rope_theta": 10000.0})
    with pytest.raises(ConfigError, match="contradict"):
        read(LLAMA, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0})


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 24, "sliding_window": 4096}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 32768}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": None}),
        (QWEN2, {"layer_types": ["full_attention"] * 24, "use_sliding_window": True, "sliding_window": 4096}),
        (QWEN2, {"layer_types": ["full_attention"] * 24}),
        (MISTRAL, {"sliding_window": 131072}),
        (LLAMA, {"attn_logit_softcapping": None, "logits_scaling": 1.0, "num_experts": 0}),
        (LLAMA, {"partial_rotary_factor": 1.0, "rope_interleaved": False, "attention_dropout": 0.1}),
        (LLAMA, {"rope_scaling": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
        (MISTRAL, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),  # within the limit it is none
        (LLAMA, {"auto_map": {"AutoModel": "x.Y"}, "some_new_training_option": 3}),
        (LLAMA, {"quantization_config": {}, "pruned_heads": {}, "hidden_act": "swish"}),
    ],
)
def test_options_that_change_nothing_load(base: dict[str, object], changes: dict[str, object]) -> None:
    assert read(base, **changes) == read(base)


# What is refused


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (
            QWEN2,
            {"layer_types": ["full_attention"] * 23 + ["sliding_attention"], "sliding_window": 4096},
            "use_sliding_window is False, expected true, since layer_types has 'sliding_attention'",
        ),
        (
            MISTRAL,
            {"layer_types": ["sliding_attention"] * 16},
            "sliding_window is missing, expected a window",
        ),
        (QWEN2, {"layer_types": ["linear_attention"] * 24}, "expected 24 times 'full_attention'"),
        (QWEN2, {"layer_types": ["full_attention"] * 3}, "expected 24 times 'full_attention'"),
        (QWEN2, {"layer_types": "full_attention"}, "expected 24 times 'full_attention'"),
        (MISTRAL, {"sliding_window": "wide"}, "sliding_window is 'wide'"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor is missing"),
        (
            LLAMA,
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1}},
            "rope_scaling.beta_fast is 1, expected a number above beta_slow, which is 1.0",
        ),
        (LLAMA, {"rope_scaling": {"type": "mrope", "factor": 4.0}}, "rope_scaling.type is 'mrope'"),
        (
            LLAMA,
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "rope_scaling.short_factor is .* expected 32 numbers, one for each pair that is turned",
        ),
        (LLAMA, {"rope_scaling": {"factor": 4.0}}, "rope_scaling.type is missing"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "a number above low_freq_factor"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"mscale": 2}}, "rope_scaling.mscale is 2"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "all of a head is rotated"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        (
            LLAMA,
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "rope_parameters.full_attention",
        ),
        (LLAMA, {"rope_theta": 0}, "rope_theta is 0, expected a positive number"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        (
            LLAMA,
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor is 0.5: it changes the model's result",
        ),
        (LLAMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts is 8"),
        (LLAMA, {"residual_multiplier": 0.22}, "residual_multiplier is 0.22"),
        (QWEN2, {"use_mrope": True}, "use_mrope is True"),
        (QWEN2, {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        (
            LLAMA,
            {"model_type": "lama"},
            r"model_type is 'lama', expected one of .*llama, .* Did you mean 'llama'",
        ),
        (LLAMA, {"model_type": None}, "model_type is missing, expected a string"),
        (LLAMA, {"model_type": 3}, "model_type is 3, expected a string"),
        (LLAMA, {"hidden_size": None}, "hidden_size is missing, expected a whole number from 1"),
        (LLAMA, {"hidden_size": "2048"}, "hidden_size is '2048', expected a whole number"),
        (LLAMA, {"hidden_size": 2048.0}, "hidden_size is 2048.0, expected a whole number"),
        (LLAMA, {"vocab_size": True}, "vocab_size is True, expected a whole number"),
        (LLAMA, {"vocab_size": 0}, "vocab_size is 0"),
        (LLAMA, {"intermediate_size": -1}, "intermediate_size is -1"),
        (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        (LLAMA, {"num_key_value_heads": 5}, "num_key_value_heads is 5, expected a divisor of .* 32"),
        (LLAMA, {"head_dim": 63}, "head_dim is 63, expected an even size"),
        (
            LLAMA,
            {"head_dim": None, "hidden_size": 2050},
            "head_dim is missing, expected a size, since 32 heads",
        ),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a positive number"),
        (LLAMA, {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        (LLAMA, {"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        (LLAMA, {"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected a token id, or a list"),
        (LLAMA, {"eos_token_id": [2, -1]}, r"eos_token_id is \[2, -1\]"),
        (LLAMA, {"torch_dtype": "int8"}, "torch_dtype is 'int8', expected one of float32, bfloat16, float16"),
        (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "quant_method is 'fp8', expected 'awq' or"),
        (LLAMA, {"quantization_config": GPTQ | {"bits": 3}}, "3 bits in groups of 128"),
        (LLAMA, {"quantization_config": GPTQ | {"group_size": -1}}, "group_size is -1"),
        (LLAMA, {"quantization_config": GPTQ | {"desc_act": True}}, "desc_act is True, expected false"),
        (
            LLAMA,
            {"quantization_config": GPTQ | {"checkpoint_format": "marlin"}},
            "checkpoint_format is 'marlin'",
        ),
        (
            LLAMA,
            {"quantization_config": GPTQ | {"quant_method": "awq", "version": "gemv"}},
            "version is 'gemv'",
        ),
        (LLAMA, {"quantization": {"bits": 7, "group_size": 64}}, "7 bits in groups of 64"),
        (LLAMA, {"quantization": {"bits": 4, "group_size": 16}}, "4 bits in groups of 16"),
        (LLAMA, {"quantization": {"bits": 4}}, "quantization.group_size is missing"),
        (
            LLAMA,
            {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp5"}},
            "quantization.mode is 'mxfp5'",
        ),
        (LLAMA, {"quantization": {"bits": 4, "group_size": 32, "lm_head": 3}}, "quantization.lm_head is 3"),
    ],
)
def test_refused(base: dict[str, object], changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read(base, **changes)
    assert "\n" not in str(error.value)


def test_mistral_slides_unless_it_says_otherwise() -> None:
    assert ModelConfig.from_hf(without(MISTRAL, "sliding_window")).windows == (4096,) * 16
    assert read(MISTRAL, sliding_window=1000).windows == (1000,) * 16
    assert read(MISTRAL).windows == read(MISTRAL, sliding_window=131072).windows == ()


def test_which_layers_have_a_window() -> None:
    on = {"use_sliding_window": True, "sliding_window": 4096}
    assert read(QWEN2, **on).windows == (0,) * 21 + (4096,) * 3, "from max_window_layers on"
    assert read(QWEN2, **on, max_window_layers=0).windows == (4096,) * 24
    kinds = ["sliding_attention", "full_attention", "sliding_attention"] + ["full_attention"] * 21
    assert read(QWEN2, **on, layer_types=kinds).windows == (4096, 0, 4096) + (0,) * 21, "layer_types decide"
    assert read(QWEN2, **on | {"use_sliding_window": False}).windows == ()


# Quantized checkpoints


def test_quantization_as_mlx_writes_it() -> None:
    section = {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "lm_head": False,
        "model.embed_tokens": True,
        "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 32, "mode": "affine"},
        "model.layers.1.mlp.down_proj": {"bits": 6},
    }
    config = read(LLAMA, quantization=section, quantization_config=section)
    overrides = {
        "lm_head": None,
        "model.layers.0.mlp.down_proj": Quantization(8, 32),
        "model.layers.1.mlp.down_proj": Quantization(6, 64),
    }
    assert config.quantization == Quantization(4, 64, overrides)
    assert read(LLAMA, quantization_config=section) == config


# Files


def test_load_config_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json cannot be read \(No such file"):
        load_config(tmp_path)
    path = tmp_path / "config.json"
    for text, message in [
        (b'{"a": ', "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b"{}", r"config.json: model_type is missing"),
    ]:
        path.write_bytes(text)
        with pytest.raises(ConfigError, match=message) as error:
            load_config(tmp_path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.write_text(json.dumps(LLAMA))
    assert load_config(tmp_path) == read(LLAMA)


def test_qwen2_5_with_yarn_has_the_longer_context() -> None:
    """Its page says to add just this; the limit in its config.json stays what was trained."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(QWEN2, rope_scaling=yarn)
    assert config.max_position_embeddings == 131072
    assert config.rope_scaling is not None and config.rope_scaling.kind == "yarn"
    assert config.rope_scaling.attention_factor == pytest.approx(1.1386294)  # 0.1 ln 4 + 1


def test_longrope_takes_its_long_factors_where_the_context_is_long() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    scaling = {"type": "longrope", **factors}
    phi4 = {"model_type": "phi3", "partial_rotary_factor": 0.75, "rope_scaling": scaling}
    long = ModelConfig.from_hf(phi4 | {"max_position_embeddings": 131072, "num_attention_heads": 24})
    assert long.rope_scaling is not None and long.rotary_dim == 96
    assert set(long.rope_scaling.factors) == {2.0}
    assert long.rope_scaling.attention_factor == pytest.approx(1.1902381)  # sqrt(1 + ln 32 / ln 4096)
    short = ModelConfig.from_hf(phi4 | {"max_position_embeddings": 4096, "num_attention_heads": 24})
    assert short.rope_scaling is not None and set(short.rope_scaling.factors) == {1.0}
    old = ModelConfig.from_hf(phi4 | {"rope_scaling": scaling | {"type": "su"}, "num_attention_heads": 24})
    assert old == short, "the first files of Phi-3 call it so"


def test_a_family_of_ones_own() -> None:
    config = ModelConfig.from_hf(QWEN2 | {"model_type": "mine"}, Family(facts={"qk_norm": "head"}))
    assert config == replace(read(QWEN2), model_type="mine", qk_norm="head", attention_bias=False)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["factor", "rope_type", "type", "bits", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = sorted(
    {*QWEN2, *LLAMA, "quantization", "quantization_config", "rope_parameters", "layer_types", "dtype"}
)


@pytest.mark.slow
@settings(max_examples=200)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3),
)
def test_any_value_is_read_or_refused(model_type: str, changes: dict[str, object]) -> None:
    """Whatever stands in config.json, the only error is ConfigError."""
    try:
        config = read(LLAMA | changes, model_type=model_type)
    except ConfigError as error:
        assert str(error)
    else:
        assert config.num_heads % config.num_kv_heads == 0 and config.head_dim % 2 == 0
