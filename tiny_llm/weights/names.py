"""The short names that stand for models on the hub, with the facts those models publish.

Owns the table: repository, parameter count, size, and what matters of config.json, so that a model
can be sized or filled with random weights without a network. Refuses to know what is on disk.
Facts: each repository's config.json and model.safetensors.index.json.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tiny_llm.errors import ConfigError, did_you_mean

Facts = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ShortName:
    """A published model: its hub id, its parameters, and config.json's facts.

    ``duplicate_parameters`` counts a tied head that the repository stores once more; nearly all are
    published in ``bytes_a_parameter`` of 2, as bfloat16.
    """

    repo_id: str
    parameters: int
    facts: Facts
    duplicate_parameters: int = 0
    bytes_a_parameter: int = 2

    @property
    def download_bytes(self) -> int:
        """Size of the weight files; the tokenizer adds some 10 MB."""
        return (self.parameters + self.duplicate_parameters) * self.bytes_a_parameter


def config_of(name: str) -> dict[str, object]:
    """Return the facts of a short name's config.json, as a new dict for ``ModelConfig.from_hf``.

    Raises ConfigError, with near names, for an unknown one.
    """
    if name not in SHORT_NAMES:
        raise ConfigError(f"There is no short name {name!r}.{did_you_mean(name, SHORT_NAMES)}")
    return copy.deepcopy(dict(SHORT_NAMES[name].facts))


def _facts(*parts: Facts, **more: object) -> Facts:
    """Join facts; a later one replaces an earlier."""
    joined = {name: value for part in (*parts, more) for name, value in part.items()}
    return MappingProxyType(joined)


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def _row(
    repo_id: str, parameters: int, family: Facts, sizes: tuple[int, ...], duplicate_parameters: int = 0
) -> ShortName:
    facts = _facts(family, dict(zip(_SIZES, sizes, strict=True)))
    return ShortName(repo_id, parameters, facts, duplicate_parameters)


def _tied(family: Facts, **more: object) -> Facts:
    return _facts(family, tie_word_embeddings=True, **more)


_COMMON = _facts(hidden_act="silu", torch_dtype="bfloat16", tie_word_embeddings=False)
_QWEN = _facts(
    _COMMON,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    use_sliding_window=False,
    bos_token_id=151643,
    eos_token_id=151645,
)
_QWEN2 = _facts(_QWEN, model_type="qwen2", max_position_embeddings=32768, sliding_window=32768)
_QWEN2_LARGE = _facts(_QWEN2, vocab_size=152064, sliding_window=131072)
_QWEN3 = _facts(
    _QWEN,
    model_type="qwen3",
    attention_bias=False,
    head_dim=128,
    max_position_embeddings=40960,
    rope_scaling=None,
    sliding_window=None,
)
_QWEN2_MOE = _facts(
    _QWEN,
    **{"model_type": "qwen2_moe", "max_position_embeddings": 8192, "sliding_window": 32768},
    **{"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": False},
    **{"shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1},
)
_QWEN3_MOE = _facts(
    _QWEN3,
    **{"model_type": "qwen3_moe", "mlp_only_layers": [], "decoder_sparse_step": 1},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
)
_OLMOE = _facts(
    _COMMON,
    **{"model_type": "olmoe", "vocab_size": 50304, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    **{"max_position_embeddings": 4096, "eos_token_id": 50279, "clip_qkv": None, "attention_bias": False},
    **{"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
)
_QWEN3_EMBEDDING = _tied(_QWEN3, vocab_size=151669, max_position_embeddings=32768, eos_token_id=151643)
_LLAMA = _facts(_COMMON, model_type="llama", attention_bias=False, rms_norm_eps=1e-5, rope_scaling=None)
_LLAMA3 = _facts(
    _LLAMA,
    vocab_size=128256,
    rope_theta=500000.0,
    max_position_embeddings=8192,
    bos_token_id=128000,
    eos_token_id=128009,
)
_FIRST_IDS = _facts(bos_token_id=1, eos_token_id=2)
_TINYLLAMA = _facts(_LLAMA, _FIRST_IDS, vocab_size=32000, rope_theta=10000.0, max_position_embeddings=2048)
_MISTRAL = _facts(
    _COMMON,
    _FIRST_IDS,
    model_type="mistral",
    vocab_size=32768,
    rms_norm_eps=1e-5,
    rope_theta=1000000.0,
    max_position_embeddings=32768,
    sliding_window=None,
)

_GPT2 = _facts(model_type="gpt2", vocab_size=50257, n_positions=1024, eos_token_id=50256)
_ERNIE = _facts(
    _COMMON,
    **{"model_type": "ernie4_5", "vocab_size": 103424, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    **{"max_position_embeddings": 131072, "head_dim": 128, "use_bias": False, "eos_token_id": 2},
)
_ERNIE_MOE = _facts(
    _ERNIE,
    **{"model_type": "ernie4_5_moe", "moe_num_experts": 64, "moe_k": 6, "moe_intermediate_size": 1536},
    **{"moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 27},
)
_PHI3 = _facts(
    _COMMON,
    **{"model_type": "phi3", "vocab_size": 32064, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    **{"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": 2047},
    **{"rope_scaling": None, "eos_token_id": 32000},
)
# The long factors of Phi-4-mini; all short ones are 1.
_LONG = """1 1.118320672 1.250641126 1.398617824 1.564103225 1.74916897 1.956131817 2.187582649 2.446418898
2.735880826 3.059592084 3.421605075 3.826451687 4.279200023 4.785517845 5.351743533 5.984965424 6.693110555
7.485043894 8.370679318 9.36110372 10.4687158 11.70738129 13.09260651 14.64173252 16.37415215 18.31155283
20.47818807 22.90118105 25.61086418 28.64115884 32.03 32.1 32.13 32.23 32.6 32.61 32.64 32.66 32.7 32.71 32.93
32.97 33.28 33.49 33.5 44.16 47.77"""
_LONGROPE: Mapping[str, object] = {
    "long_factor": [float(one) for one in _LONG.split()],
    "short_factor": [1.0] * 48,
}
_PHI4_MINI = _facts(
    _PHI3,
    **{"vocab_size": 200064, "max_position_embeddings": 131072, "sliding_window": 262144},
    **{"partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope", **_LONGROPE}},
    **{"eos_token_id": 199999},
)
_SMOLLM3 = _facts(
    _COMMON,
    **{"model_type": "smollm3", "vocab_size": 128256, "rms_norm_eps": 1e-6, "rope_theta": 5000000.0},
    **{"max_position_embeddings": 65536, "no_rope_layers": [1, 1, 1, 0] * 9, "eos_token_id": 128012},
)
_OLMO2 = _facts(
    _COMMON,
    **{"model_type": "olmo2", "vocab_size": 100352, "rms_norm_eps": 1e-6, "rope_theta": 500000.0},
    **{"max_position_embeddings": 4096, "attention_bias": False, "eos_token_id": 100257},
)
_GRANITE = _facts(
    _COMMON,
    **{"model_type": "granite", "vocab_size": 49159, "rms_norm_eps": 1e-5, "rope_theta": 10000000.0},
    **{"max_position_embeddings": 131072, "embedding_multiplier": 12.0, "attention_multiplier": 0.015625},
    **{"residual_multiplier": 0.22, "logits_scaling": 8.0, "eos_token_id": 0},
)
_GEMMA3 = _facts(
    **{"model_type": "gemma3_text", "torch_dtype": "bfloat16", "vocab_size": 262144, "head_dim": 256},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
    **{"max_position_embeddings": 32768, "sliding_window": 512, "query_pre_attn_scalar": 256},
    **{"hidden_activation": "gelu_pytorch_tanh", "eos_token_id": [1, 106]},
)


def _gpt2(repo_id: str, parameters: int, width: int, layers: int, heads: int) -> ShortName:
    facts = _facts(_GPT2, n_embd=width, n_layer=layers, n_head=heads)
    return ShortName(repo_id, parameters, facts, bytes_a_parameter=4)


def _llama3_long(factor: float) -> Facts:
    """LLaMA 3.1 and later: the context stretched to 128K, and three ids that end an answer."""
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    eos = [128001, 128008, 128009]
    return _facts(_LLAMA3, max_position_embeddings=131072, rope_scaling=scaling, eos_token_id=eos)


_LLAMA31 = _llama3_long(8.0)
_LLAMA32 = _llama3_long(32.0)
# Hidden and intermediate size, layers, heads, key/value heads.
_QWEN_05B, _QWEN_15B, _QWEN_7B = (896, 4864, 24, 14, 2), (1536, 8960, 28, 12, 2), (3584, 18944, 28, 28, 4)
_LLAMA_8B = (4096, 14336, 32, 32, 8)

SHORT_NAMES: Mapping[str, ShortName] = {
    "qwen2-0.5b": _row("Qwen/Qwen2-0.5B-Instruct", 494_032_768, _tied(_QWEN2), _QWEN_05B),
    "qwen2-1.5b": _row("Qwen/Qwen2-1.5B-Instruct", 1_543_714_304, _tied(_QWEN2), _QWEN_15B),
    "qwen2-7b": _row("Qwen/Qwen2-7B-Instruct", 7_615_616_512, _QWEN2_LARGE, _QWEN_7B),
    "qwen2.5-0.5b": _row("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, _tied(_QWEN2), _QWEN_05B),
    "qwen2.5-1.5b": _row("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, _tied(_QWEN2), _QWEN_15B),
    "qwen2.5-3b": _row("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688, _tied(_QWEN2), (2048, 11008, 36, 16, 2)),
    "qwen2.5-7b": _row("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, _QWEN2_LARGE, _QWEN_7B),
    "qwen2.5-14b": _row("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664, _QWEN2_LARGE, (5120, 13824, 48, 40, 8)),
    "qwen2.5-32b": _row("Qwen/Qwen2.5-32B-Instruct", 32_763_876_352, _QWEN2_LARGE, (5120, 27648, 64, 40, 8)),
    "qwen2.5-72b": _row("Qwen/Qwen2.5-72B-Instruct", 72_706_203_648, _QWEN2_LARGE, (8192, 29568, 80, 64, 8)),
    "qwen3-0.6b": _row("Qwen/Qwen3-0.6B", 596_049_920, _tied(_QWEN3), (1024, 3072, 28, 16, 8), 155_582_464),
    "qwen3-1.7b": _row("Qwen/Qwen3-1.7B", 1_720_574_976, _tied(_QWEN3), (2048, 6144, 28, 16, 8), 311_164_928),
    "qwen3-4b": _row("Qwen/Qwen3-4B", 4_022_468_096, _tied(_QWEN3), (2560, 9728, 36, 32, 8)),
    "qwen3-8b": _row("Qwen/Qwen3-8B", 8_190_735_360, _QWEN3, (4096, 12288, 36, 32, 8)),
    "qwen3-14b": _row("Qwen/Qwen3-14B", 14_768_307_200, _QWEN3, (5120, 17408, 40, 40, 8)),
    "qwen3-32b": _row("Qwen/Qwen3-32B", 32_762_123_264, _QWEN3, (5120, 25600, 64, 64, 8)),
    "qwen3-embedding-0.6b": _row(
        "Qwen/Qwen3-Embedding-0.6B", 595_776_512, _QWEN3_EMBEDDING, (1024, 3072, 28, 16, 8)
    ),
    "qwen1.5-moe-a2.7b": _row(
        "Qwen/Qwen1.5-MoE-A2.7B-Chat", 14_315_784_192, _QWEN2_MOE, (2048, 5632, 24, 16, 16)
    ),
    "qwen3-30b-a3b": _row("Qwen/Qwen3-30B-A3B", 30_532_122_624, _QWEN3_MOE, (2048, 6144, 48, 32, 4)),
    "olmoe-1b-7b": _row("allenai/OLMoE-1B-7B-0924-Instruct", 6_919_161_856, _OLMOE, (2048, 1024, 16, 16, 16)),
    "llama-3-8b": _row("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248, _LLAMA3, _LLAMA_8B),
    "llama-3.1-8b": _row("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, _LLAMA31, _LLAMA_8B),
    "llama-3.2-1b": _row(
        "meta-llama/Llama-3.2-1B-Instruct",
        1_235_814_400,
        _tied(_LLAMA32, head_dim=64),
        (2048, 8192, 16, 32, 8),
    ),
    "llama-3.2-3b": _row(
        "meta-llama/Llama-3.2-3B-Instruct",
        3_212_749_824,
        _tied(_LLAMA32, head_dim=128),
        (3072, 8192, 28, 24, 8),
    ),
    "llama-3.3-70b": _row(
        "meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496, _LLAMA31, (8192, 28672, 80, 64, 8)
    ),
    "mistral-7b": _row(
        "mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552, _MISTRAL, (4096, 14336, 32, 32, 8)
    ),
    "tinyllama-1.1b": _row(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384, _TINYLLAMA, (2048, 5632, 22, 32, 4)
    ),
    "gpt2": _gpt2("openai-community/gpt2", 124_439_808, 768, 12, 12),
    "gpt2-xl": _gpt2("openai-community/gpt2-xl", 1_557_611_200, 1600, 48, 25),
    "ernie-4.5-21b-a3b": _row(
        "baidu/ERNIE-4.5-21B-A3B-PT", 21_825_437_888, _tied(_ERNIE_MOE), (2560, 12288, 28, 20, 4)
    ),
    "ernie-4.5-0.3b": _row("baidu/ERNIE-4.5-0.3B-PT", 360_748_032, _tied(_ERNIE), (1024, 3072, 18, 16, 2)),
    "phi-3-mini": _row("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552, _PHI3, (3072, 8192, 32, 32, 32)),
    "phi-4-mini": _row(
        "microsoft/Phi-4-mini-instruct", 3_836_021_760, _tied(_PHI4_MINI), (3072, 8192, 32, 24, 8)
    ),
    "smollm3-3b": _row("HuggingFaceTB/SmolLM3-3B", 3_075_098_624, _tied(_SMOLLM3), (2048, 11008, 36, 16, 4)),
    "olmo2-1b": _row("allenai/OLMo-2-0425-1B-Instruct", 1_484_916_736, _OLMO2, (2048, 8192, 16, 16, 16)),
    "olmo2-7b": _row("allenai/OLMo-2-1124-7B-Instruct", 7_298_617_344, _OLMO2, (4096, 11008, 32, 32, 32)),
    "granite-3.3-2b": _row(
        "ibm-granite/granite-3.3-2b-instruct", 2_533_539_840, _tied(_GRANITE), (2048, 8192, 40, 32, 8)
    ),
    "gemma-3-270m": _row("google/gemma-3-270m-it", 268_098_176, _tied(_GEMMA3), (640, 2048, 18, 4, 1)),
    "gemma-3-1b": _row("google/gemma-3-1b-it", 999_885_952, _tied(_GEMMA3), (1152, 6912, 26, 4, 1)),
}
