"""Owns how many bytes a model takes, from its config alone: weights, keys and values, a step, training.

Integers only: no array is made here. Refuses to know which machine it is for. Chapter 0.2.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from tiny_llm.config import ModelFacts, Quantization
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
    total = 0
    for name, shape in expected_tensors(config).items():
        if len(shape) == 1:
            total += tensor_bytes(shape, vector_bytes)
            continue
        format = format_of(name, config.quantization) or fit_group(name, shape[-1], quantize)
        total += tensor_bytes(shape, matrix_bytes, format)
    return total


def kv_token_bytes(config: ModelFacts, item_bytes: int) -> int:
    """Bytes of one token's keys and values: in each layer, one vector of each a KV head."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * item_bytes


def activation_bytes(config: ModelFacts, tokens: int, rows: int, gathered: int = 0) -> int:
    """Bytes of a step's float32 intermediate results: ``tokens`` T go in, logits [rows, V] come out.

    ``gathered`` bytes of keys and values attention brings together in a layer, where it reads no pages.
    A layer makes six vectors [T, E] (two sums, two norms, two outputs), queries twice and attention's output
    [T, H, D], keys twice and values [T, K, D], and the MLP's middle [T, F].
    """
    heads = 3 * (config.num_heads + config.num_kv_heads) * config.head_dim
    layer = 4 * tokens * (6 * config.hidden_size + heads + config.intermediate_size) + gathered
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
