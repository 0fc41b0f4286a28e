"""GGUF's blocks of quantized weights as MLX's affine format, ``w = scale * q + bias`` in groups of 32.

Owns how a block's bits lie. Exact, as long as floats are kept as they come from here: Q4_0, Q4_1, Q5_0, Q5_1
and Q8_0 with their own float16 scales, Q4_K and Q5_K with float32 ones, since they are products. Q6_K has
groups of 16, which no kernel reads: it is rounded to 8 bits in groups of 32.
Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import mlx.core as mx

from tiny_llm.config import Quantization
from tiny_llm.data import QuantizedTensor
from tiny_llm.weights.quantize import quantize_matrix

GROUP = 32


class _Groups(NamedTuple):
    """A matrix: its values in words, one a byte; scales and biases of its groups, in whatever shape."""

    words: mx.array
    scales: mx.array
    biases: mx.array


def unpack(kind: str, raw: mx.array) -> QuantizedTensor:
    """Return the matrix [..., columns] whose blocks are ``raw`` uint8 [..., bytes a row]; made now."""
    rows = raw.shape[:-1]
    if kind == "Q6_K":
        return quantize_matrix(
            _q6_k(raw.reshape(-1, 210)).reshape(*rows, -1), Quantization(BITS[kind], GROUP)
        )
    bits, nbytes, read = _READ[kind]
    words, *numbers = read(raw.reshape(-1, nbytes))
    packed = _squeezed(words, bits).reshape(*rows, -1).view(mx.uint32)
    scales, biases = (part.reshape(*rows, -1) for part in numbers)
    mx.eval(packed, scales, biases)
    return QuantizedTensor(packed, scales, biases, GROUP, bits)


def _each(byte: int) -> mx.array:
    """A word whose bytes are all this one."""
    return mx.full(8, byte, mx.uint8).view(mx.uint64)


def _squeezed(words: mx.array, bits: int) -> mx.array:
    """The stream of bits, low ones first, of words with a value in each byte: 8 bytes become ``bits``."""
    for count in (1, 2, 4) if bits < 8 else ():  # values that are together already
        low = mx.array(sum((1 << count * bits) - 1 << at for at in range(0, 64, count * 16)), mx.uint64)
        words = words & low | (words >> count * (8 - bits)) & low << count * bits
    return words.view(mx.uint8).reshape(-1, 8)[:, :bits]


def _half(part: mx.array) -> mx.array:
    return part.view(mx.float16)[..., 0]


def _nibbles(part: mx.array) -> mx.array:
    """The low halves of bytes [..., n] as words, then the high ones: [..., n / 4]."""
    words, low = part.view(mx.uint64), _each(15)
    return mx.concatenate([words & low, words >> 4 & low], axis=-1)


def _fifth(part: mx.array) -> mx.array:
    """Bits of bytes [..., n] as the fifth of values: [..., n] words."""
    own = mx.array([1 << bit for bit in range(8)], mx.uint8).view(mx.uint64)
    spread = part.astype(mx.uint64) * _each(1) & own
    return (spread + _each(0x7F) & _each(0x80)) >> 3


def _signed(b: mx.array, words: mx.array, zero: int) -> _Groups:
    scales = _half(b[..., :2])
    return _Groups(words, scales, scales * -zero)


def _from_least(b: mx.array, words: mx.array) -> _Groups:
    return _Groups(words, _half(b[..., :2]), _half(b[..., 2:4]))


def _scales_k(b: mx.array) -> tuple[mx.array, mx.array]:
    """Scales and biases [n, 8] of 256 weights: two float16, times six bits in twelve bytes."""
    low, middle, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scales = mx.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=-1)
    least = mx.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=-1)
    of_scales, of_least = (b[..., at : at + 2].view(mx.float16).astype(mx.float32) for at in (0, 2))
    return of_scales * scales, of_least * least * -1


def _q5_k(b: mx.array) -> _Groups:
    group = mx.arange(8, dtype=mx.uint64)[:, None]
    fifth = (b[..., 16:48].view(mx.uint64).reshape(-1, 1, 4) >> group & _each(1)) << 4
    return _Groups(_nibbles(b[..., 48:].reshape(-1, 4, 32)).reshape(-1, 8, 4) | fifth, *_scales_k(b))


def _q6_k(b: mx.array) -> mx.array:
    """Blocks [n, 210] as float32 [n, 256]: 4 bits and 2 bits a weight, a signed byte a group of 16."""
    shifts = mx.arange(0, 8, 2, dtype=mx.uint64)[:, None]
    high = b[:, 128:192].view(mx.uint64).reshape(-1, 2, 1, 4) >> shifts & _each(3)
    words = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(high.shape) | high << 4
    q = words.reshape(-1, 32).view(mx.uint8).astype(mx.float32) - 32
    scales = b[:, 208:].view(mx.float16).astype(mx.float32) * b[:, 192:208].view(mx.int8)
    return (scales[..., None] * q.reshape(-1, 16, 16)).reshape(-1, 256)


_READ: Mapping[str, tuple[int, int, Callable[[mx.array], _Groups]]] = {
    "Q4_0": (4, 18, lambda b: _signed(b, _nibbles(b[..., 2:]), 8)),
    "Q4_1": (4, 20, lambda b: _from_least(b, _nibbles(b[..., 4:]))),
    "Q5_0": (5, 22, lambda b: _signed(b, _nibbles(b[..., 6:]) | _fifth(b[..., 2:6]), 16)),
    "Q5_1": (5, 24, lambda b: _from_least(b, _nibbles(b[..., 8:]) | _fifth(b[..., 4:8]))),
    "Q8_0": (8, 34, lambda b: _signed(b, b[..., 2:].view(mx.uint64) ^ _each(128), 128)),  # were signed
    "Q4_K": (4, 144, lambda b: _Groups(_nibbles(b[..., 16:].reshape(-1, 4, 32)), *_scales_k(b))),
    "Q5_K": (5, 176, _q5_k),
}
"""For each exact type: bits of a weight, bytes of a block, what reads blocks uint8 [n, bytes]."""
BITS: Mapping[str, int] = {**{kind: bits for kind, (bits, _, _) in _READ.items()}, "Q6_K": 8}
"""The bits that a weight of each quantized type has here."""
