"""Rotary position embedding (Su et al. 2021), half-split as Hugging Face checkpoints have it. Chapter 1.2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from tiny_llm.config_rope import RopeScaling
from tiny_llm.ops.backend import cpu, on_cpu, on_mlx
from tiny_llm.ops.metal import kernel, on_metal, scalar
from tiny_llm.ops.rms_norm import rms_norm_mlx, rms_norm_ref


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> mx.array:
    """Return float32 [D/2], the radians by which each pair turns a position: ``theta ** (-2i / D)``, scaled.

    Not in half precision: an error here grows with the position.
    """
    frequencies = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    return mx.array(frequencies, dtype=mx.float32)


def rope_periods(inv_freq: mx.array) -> mx.array | None:
    """Return ``1 / inv_freq`` [D/2] for ``rope_qk``, made once; None where no kernel takes it."""
    if not on_mlx():
        return None
    periods = 1 / inv_freq
    mx.eval(periods)
    return periods


def _scaled(frequencies: list[float], scaling: RopeScaling) -> list[float]:
    """Divide by ``factor``, or by one for each; "llama3" and "yarn" spare pairs that turn often."""
    if scaling.factors:
        return [one / factor for one, factor in zip(frequencies, scaling.factors, strict=True)]
    if scaling.kind == "linear":
        return [one / scaling.factor for one in frequencies]
    kept = _kept_llama3 if scaling.kind == "llama3" else _kept_yarn
    shares = [min(max(share, 0.0), 1.0) for share in kept(frequencies, scaling)]
    # 1: a fast pair, left alone; 0: a slow one, divided
    return [s * one + (1 - s) * one / scaling.factor for one, s in zip(frequencies, shares, strict=True)]


def _kept_llama3(frequencies: list[float], scaling: RopeScaling) -> list[float]:
    """By how often a pair turns in the trained context (Llama 3.1)."""
    trained = scaling.original_max_position_embeddings / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return [(trained * frequency - low) / (high - low) for frequency in frequencies]


def _kept_yarn(frequencies: list[float], scaling: RopeScaling) -> list[float]:
    """By a pair's place between the one that turns often and the one that seldom does (YaRN)."""
    slower = -math.log(frequencies[1]) if len(frequencies) > 1 else 1.0  # from a pair to the next
    trained = scaling.original_max_position_embeddings / (2 * math.pi)
    ends = [
        math.log(trained / turns) / slower for turns in (scaling.high_freq_factor, scaling.low_freq_factor)
    ]
    if scaling.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], 2 * len(frequencies) - 1)
    return [1 - (i - first) / (last - first or 0.001) for i in range(len(frequencies))]


def rope_ref(x: mx.array, positions: mx.array, inv_freq: mx.array) -> mx.array:
    """Turn each pair (x[i], x[i + D/2]) of x [T, H, D] by ``positions[t] * inv_freq[i]`` radians.

    positions [T], inv_freq [D/2]. The dot product of two turned vectors then depends on
    the distance of their positions alone. Angles are float32; the result has x's dtype.
    """
    angles = positions.astype(mx.float32)[:, None, None] * inv_freq  # [T, 1, D/2]
    cos, sin = mx.cos(angles), mx.sin(angles)
    first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return mx.concatenate(turned, axis=-1).astype(x.dtype)


def rope_qk_ref(
    q: mx.array,
    k: mx.array,
    positions: mx.array,
    inv_freq: mx.array,
    q_norm: mx.array | None,
    k_norm: mx.array | None,
    eps: float,
) -> tuple[mx.array, mx.array]:
    """Return q [T, H, D] and k [T, K, D] turned by ``rope_ref``, after Qwen3's norm of each head if given."""
    q = q if q_norm is None else rms_norm_ref(q, q_norm, eps)
    k = k if k_norm is None else rms_norm_ref(k, k_norm, eps)
    return rope_ref(q, positions, inv_freq), rope_ref(k, positions, inv_freq)


def rope(x: mx.array, positions: mx.array, inv_freq: mx.array) -> mx.array:
    """Rotate x [T, H, D] by positions [T]; see ``rope_ref``."""
    if on_cpu("rope", x, inv_freq):
        return cpu.rope(x, positions, inv_freq)
    _check("rope", x, positions, inv_freq)
    if on_metal("rope", x):
        return _metal(x, x[:, :0], positions, inv_freq, (), 0.0)[0]
    if on_mlx():
        return rope_mlx(x[:, :, None], positions, 1 / inv_freq)
    return rope_ref(x, positions, inv_freq)


def rope_mlx(x: mx.array, positions: mx.array, periods: mx.array) -> mx.array:
    """By MLX's kernel, to which each of x [T, H, 1, D]'s rows is a sequence of one token at its own offset.

    Returns [T, H, D].
    """
    T, H, _, D = x.shape
    if x.size:
        x = mx.fast.rope(x, D, traditional=False, base=None, scale=1.0, offset=positions, freqs=periods)
    return x.reshape(T, H, D)


def rope_qk(
    q: mx.array,
    k: mx.array,
    positions: mx.array,
    inv_freq: mx.array,
    q_norm: mx.array | None,
    k_norm: mx.array | None,
    eps: float,
    periods: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Norm the heads of q [T, H, D] and k [T, K, D] by [D] each, if given, and rotate; ``rope_qk_ref``.

    Both may be flat, [T, H * D]. ``periods`` are ``rope_periods(inv_freq)``, if the caller has them.
    """
    norms = [norm for norm in (q_norm, k_norm) if norm is not None]
    if on_cpu("rope", q, k, inv_freq, *norms):
        return cpu.rope_qk(q, k, positions, inv_freq, q_norm, k_norm, eps)
    ours = on_metal("rope", q, k, *norms) and len(norms) != 1
    q, k = (_as_heads(x, positions, inv_freq, one_each=on_mlx() and not ours) for x in (q, k))
    if any(norm.shape != q.shape[-1:] for norm in norms):
        raise ValueError(f"[rope_qk] expected norms {q.shape[-1:]}, got {[norm.shape for norm in norms]}")
    if ours:
        return _metal(q, k, positions, inv_freq, norms, eps)
    if on_mlx():
        periods = 1 / inv_freq if periods is None else periods
        q = q if q_norm is None else rms_norm_mlx(q, q_norm, eps)
        k = k if k_norm is None else rms_norm_mlx(k, k_norm, eps)
        return rope_mlx(q, positions, periods), rope_mlx(k, positions, periods)
    return rope_qk_ref(q, k, positions, inv_freq, q_norm, k_norm, eps)


def _metal(
    q: mx.array, k: mx.array, positions: mx.array, inv_freq: mx.array, norms: Sequence[mx.array], eps: float
) -> tuple[mx.array, mx.array]:
    """A simdgroup a head, queries' and keys' in one dispatch."""
    T, H, D = q.shape
    heads = H + k.shape[1]
    if not T * heads:
        return q, k
    q_out, k_out = kernel("rope_qk", "rope")(
        inputs=[q, k, positions, inv_freq, *(norms or [_no_norm(D, q.dtype)] * 2), scalar(eps)],
        template=[("T", q.dtype), ("D", D), ("HQ", H), ("HK", k.shape[1]), ("NORM", bool(norms))],
        grid=(32, heads, T),
        threadgroup=(32, 4, 1),
        output_shapes=[q.shape, k.shape],
        output_dtypes=[q.dtype, k.dtype],
    )
    return q_out, k_out


@cache
def _no_norm(dim: int, dtype: mx.Dtype) -> mx.array:
    """What the kernel is given in place of a norm's weight, and does not read."""
    zeros = mx.zeros((dim,), dtype)
    mx.eval(zeros)  # it may be kept in a graph that is played again
    return zeros


def _as_heads(x: mx.array, positions: mx.array, inv_freq: mx.array, *, one_each: bool) -> mx.array:
    """x [T, H, D], which may be flat; with ``one_each`` as [T, H, 1, D], in the same one operation."""
    D = 2 * inv_freq.size
    if x.ndim != 2 or not D or x.shape[1] % D:
        _check("rope_qk", x, positions, inv_freq)
    T, heads = x.shape[0], x.shape[1] // D if x.ndim == 2 else x.shape[1]
    return x.reshape(T, heads, 1, D) if one_each else x.reshape(T, heads, D)


def _check(op: str, x: mx.array, positions: mx.array, inv_freq: mx.array) -> None:
    if x.ndim != 3 or positions.shape != x.shape[:1] or 2 * inv_freq.size != x.shape[2]:
        raise ValueError(
            f"[{op}] expected x [T, H, D] with even D, positions [T] and inv_freq [D/2], "
            f"got {x.shape}, {positions.shape}, {inv_freq.shape}"
        )
