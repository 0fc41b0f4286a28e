"""Owns how many bytes a model takes, from its config alone: weights, keys and values, a step, training.

Integers only: no array is made here. Refuses to know which machine it is for. Chapter 0.2.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from tiny_llm.config import ModelConfig, ModelFacts, Quantization
from tiny_llm.families.family import ExpertFacts
from tiny_llm.models.registry import expected_tensors
from tiny_llm.weights.quantize import fit_group, format_of

LAYERS_AT_ONCE = 7
"""MLX allocates what operations will write before they run, for about a hundred of them ahead."""


class Training(NamedTuple):
    """Bytes of what mixed-precision training by Adam keeps."""

    weights: int
    gradients: int
    master: int
    moments: int
    activations: int


def tensor_bytes(shape: tuple[int, ...], item_bytes: int, format: Quantization | None = None) -> int:
    """Bytes of one tensor: ``item_bytes`` an entry, or ``bits`` an entry and two such items a group."""
    entries = prod(shape)
    if format is None:
        return entries * item_bytes
    return entries * format.bits // 8 + 2 * (entries // format.group_size) * item_bytes


def parameter_count(config: ModelFacts) -> int:
    """Entries of all tensors; a head that is tied to the embedding counts once."""
    return sum(map(prod, expected_tensors(config).values()))


def weights_bytes(
    config: ModelFacts, matrix_bytes: int, vector_bytes: int, quantize: Quantization | None = None
) -> int:
    """Bytes of all tensors: floats of a matrix take ``matrix_bytes`` each, of a vector ``vector_bytes``.

    ``quantize`` is what float matrices are packed into on loading, where a group divides their rows.
    """
    return sum(_each_bytes(config, matrix_bytes, vector_bytes, quantize).values())


def read_bytes(
    config: ModelFacts,
    matrix_bytes: int,
    vector_bytes: int,
    quantize: Quantization | None = None,
    *,
    tokens: int,
) -> int:
    """What a step of ``tokens`` T reads of ``weights_bytes``: no table of tokens, but where it is the head.

    Of N experts it reads ``N (1 - (1 - k / N)^T)``, as many as are met by chance.
    """
    each = _each_bytes(config, matrix_bytes, vector_bytes, quantize)
    if not config.tie_word_embeddings:
        each.pop("model.embed_tokens.weight", None)
    if (facts := _experts(config)) is None:
        return sum(each.values())
    met = 1 - (1 - facts.per_token / facts.count) ** tokens
    stacks = sum(size for name, size in each.items() if ".switch_mlp." in name)
    return sum(each.values()) - round((1 - met) * stacks)


def _experts(config: ModelFacts) -> ExpertFacts | None:
    return config.experts if isinstance(config, ModelConfig) else None


def _each_bytes(
    config: ModelFacts, matrix_bytes: int, vector_bytes: int, quantize: Quantization | None
) -> dict[str, int]:
    sizes: dict[str, int] = {}
    stored = config.quantization and config.quantization.kept
    for name, shape in expected_tensors(config).items():
        if len(shape) == 1:
            sizes[name] = tensor_bytes(shape, vector_bytes)
            continue
        format = format_of(name, stored) or fit_group(name, shape[-1], quantize)
        sizes[name] = tensor_bytes(shape, matrix_bytes, format)
    return sizes


def kv_token_bytes(config: ModelFacts, item_bytes: int) -> int:
    """Bytes of one token's keys and values: in each layer, one vector of each a KV head."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * item_bytes


def widest_window(config: ModelFacts) -> int:
    """Of how many of the last tokens any row needs keys and values; 0: a layer sees all."""
    return max(config.windows) if config.windows and all(config.windows) else 0


def held_tokens(config: ModelFacts, context: int, ahead: int) -> int:
    """Of how many tokens a sequence of ``context`` holds keys and values, with room for ``ahead`` new ones.

    Where every layer has a window, those before it have gone back to the pool.
    """
    window = widest_window(config)
    return min(context, window + ahead) if window else context


def activation_bytes(config: ModelFacts, tokens: int, rows: int, gathered: int = 0) -> int:
    """Bytes of a step's float32 intermediate results: ``tokens`` T go in, logits [rows, V] come out.

    ``gathered`` bytes of keys and values attention brings together in a layer, where it reads no pages.
    A layer makes six vectors [T, E] (two sums, two norms, two outputs), queries twice and attention's output
    [T, H, D], keys twice and values [T, K, D], and the MLP's middle [T, F]; each expert has an output.
    """
    heads = 3 * (config.num_heads + config.num_kv_heads) * config.head_dim
    facts = _experts(config)
    vectors = 6 if facts is None else 6 + facts.per_token
    layer = 4 * tokens * (vectors * config.hidden_size + heads + config.intermediate_size) + gathered
    return min(config.num_layers, LAYERS_AT_ONCE) * layer + 4 * rows * config.vocab_size


def training_bytes(config: ModelFacts, tokens: int) -> Training:
    """Bytes that training on ``tokens`` T at a time keeps: weights and gradients of 2 bytes, and of 4 bytes
    each a master copy and Adam's two moments (ZeRO, section 3.1).

    For the way back each layer keeps, in 2 bytes, four vectors [T, E], queries and attention's output
    [T, H, D], keys and values [T, K, D], and three [T, F] of the MLP; and there are logits [T, V] of 4 bytes.
    Attention is fused: no scores are kept.
    """
    count = parameter_count(config)
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    layer = 2 * tokens * (4 * config.hidden_size + heads + 3 * config.intermediate_size)
    activations = config.num_layers * layer + 4 * tokens * config.vocab_size
    return Training(2 * count, 2 * count, 4 * count, 8 * count, activations)
