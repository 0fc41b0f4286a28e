"""Token ids to vectors. Chapter 1.5."""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.ops.backend import cpu, on_mlx
from tiny_llm.ops.metal import kernel, on_metal


def embedding_ref(tokens: mx.array, weight: mx.array | QuantizedTensor) -> mx.array:
    """Return [T, E]: row ``tokens[t]`` of weight [V, E] for each t. A quantized table unpacks only these.

    They are unpacked in float32, and rounded to the dtype of the scales: so a table that is the head too
    has the same numbers in both places.
    """
    if not isinstance(weight, QuantizedTensor):
        return weight[tokens]
    scales, biases = (a[tokens].astype(mx.float32) for a in (weight.scales, weight.biases))
    rows = weight.packed[tokens], scales, biases
    wide = mx.dequantize(*rows, group_size=weight.group_size, bits=weight.bits)
    return wide.astype(weight.scales.dtype)


def embedding(tokens: mx.array, weight: Matrix) -> mx.array:
    """Look tokens [T] up in weight [V, E]; see ``embedding_ref``. Ids must be below V, unchecked here."""
    if tokens.ndim != 1 or not mx.issubdtype(tokens.dtype, mx.integer):
        raise ValueError(f"[embedding] expected integer tokens [T], got {tokens.dtype} {tokens.shape}")
    if not isinstance(weight, (mx.array, QuantizedTensor)):
        return cpu.embedding(tokens, weight)
    if isinstance(weight, QuantizedTensor) and _on_metal(tokens, weight):
        return _metal(tokens, weight)
    return embedding_mlx(tokens, weight) if on_mlx() else embedding_ref(tokens, weight)


def embedding_mlx(tokens: mx.array, weight: mx.array | QuantizedTensor) -> mx.array:
    """In the scales' dtype throughout, as ``quantized_matmul_mlx`` reads the same table."""
    if not isinstance(weight, QuantizedTensor):
        return weight[tokens]
    rows = weight.packed[tokens], weight.scales[tokens], weight.biases[tokens]
    return mx.dequantize(*rows, group_size=weight.group_size, bits=weight.bits)


def _on_metal(tokens: mx.array, weight: QuantizedTensor) -> bool:
    takes = weight.bits in (4, 8) and tokens.size > 0
    return takes and on_metal("embedding", weight.scales, weight.biases)


def _metal(tokens: mx.array, weight: QuantizedTensor) -> mx.array:
    """A thread a word of a row."""
    words = weight.packed.shape[1]
    width = words * 32 // weight.bits
    return kernel("embedding")(
        inputs=[tokens, weight.packed, weight.scales, weight.biases, words],
        template=[("T", weight.scales.dtype), ("BITS", weight.bits), ("GROUP", weight.group_size)],
        grid=(words, tokens.size, 1),
        threadgroup=(min(words, 256), 1, 1),
        output_shapes=[(tokens.size, width)],
        output_dtypes=[weight.scales.dtype],
    )[0]
