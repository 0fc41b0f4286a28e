"""Attention's maps around the cache: project, normalise, rotate, attend, project back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.config_rope import RopeScaling
from tiny_llm.data import Batch, KVCache
from tiny_llm.distributed.group import ALONE, Group
from tiny_llm.layers.linear import Linear, heads_of
from tiny_llm.layers.named import Shapes, Weights, under
from tiny_llm.layers.norm import OutputMap, RMSNorm, output_shapes, take_output, take_rms_norm
from tiny_llm.ops.rope import rope_frequencies, rope_periods, rope_qk


@dataclass(frozen=True, slots=True)
class Attention:
    """x [T, E] to [T, E]. ``inv_freq`` [D/2], or None where nothing is turned (GPT-2).

    ``q_norm`` and ``k_norm`` normalise each head (Qwen3), or all heads as one vector (OLMo-2).
    ``periods`` are ``rope_periods`` of the frequencies. ``query_scale`` multiplies queries, a number or one
    an entry [D], on top of what attention scales them by. ``window``: how many tokens a row sees; 0: all.
    """

    layer: int
    window: int
    head_dim: int
    inv_freq: mx.array | None
    periods: mx.array | None
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: OutputMap
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    query_scale: float | mx.array = 1.0

    @staticmethod
    def shapes(config: ModelConfig) -> Shapes:
        """The tensors that ``take`` reads, without their prefix."""
        E, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        wide, narrow = config.num_heads * D, config.num_kv_heads * D
        normed = (wide, narrow) if config.qk_norm == "whole" else (D, D)
        norms: Shapes = {"q_norm.weight": normed[:1], "k_norm.weight": normed[1:]} if config.qk_norm else {}
        return {
            **under("q_proj", Linear.shapes(E, wide, bias=bias)),
            **under("k_proj", Linear.shapes(E, narrow, bias=bias)),
            **under("v_proj", Linear.shapes(E, narrow, bias=bias)),
            **output_shapes(config, "o_proj", wide, bias=config.output_bias),
            **norms,
        }

    @classmethod
    def take(
        cls,
        weights: Weights,
        prefix: str,
        config: ModelConfig,
        layer: int,
        inv_freq: mx.array | None,
        query_scale: float | mx.array = 1.0,
        group: Group = ALONE,
    ) -> Attention:
        """Pick the maps and norms below ``prefix``. Raises WeightError for a tensor that is missing."""
        bias = config.attention_bias
        q, k, v = (Linear.take(weights, f"{prefix}.{name}_proj", bias=bias) for name in "qkv")
        o = take_output(weights, prefix, "o_proj", config, bias=config.output_bias, group=group)
        q_norm = take_rms_norm(weights, f"{prefix}.q_norm", config) if config.qk_norm else None
        k_norm = take_rms_norm(weights, f"{prefix}.k_norm", config) if config.qk_norm else None
        periods = None if inv_freq is None else rope_periods(inv_freq)
        window = config.windows[layer] if config.windows else 0
        return cls(layer, window, config.head_dim, inv_freq, periods, q, k, v, o, q_norm, k_norm, query_scale)

    def __call__(self, x: mx.array, batch: Batch, kv: KVCache) -> mx.array:
        q, k, v = self.heads(x, batch.positions)
        return self.o_proj(self.attend(q, k, v, batch, kv))

    def attend(self, q: mx.array, k: mx.array, v: mx.array, batch: Batch, kv: KVCache) -> mx.array:
        """What the cache's attention gives, [T, H, D]."""
        return kv.attend(self.layer, q, k, v, batch, window=self.window)

    def heads(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """What attends: q [T, H, D] and k [T, K, D], normed and rotated, and v [T, K, D]."""
        q, k, v = heads_of(x, (self.q_proj, self.k_proj, self.v_proj), self.head_dim)
        shape = (x.shape[0], -1, self.head_dim)
        norms: tuple[mx.array | None, mx.array | None] = (None, None)
        eps = 0.0
        if self.q_norm is not None and self.k_norm is not None:
            eps, weight = self.q_norm.eps, self.q_norm.weight
            if weight.size == self.head_dim and weight.dtype == x.dtype:  # in one kernel with the rotation
                norms = weight, self.k_norm.weight
            else:
                q, k = (_normed(y, norm).reshape(shape) for y, norm in ((q, self.q_norm), (k, self.k_norm)))
        if self.inv_freq is None:
            q, k = q.reshape(shape), k.reshape(shape)
        else:
            q, k = rope_qk(q, k, positions, self.inv_freq, *norms, eps, self.periods)
        if not isinstance(self.query_scale, float) or self.query_scale != 1:
            q = (q * self.query_scale).astype(q.dtype)
        return q, k, v.reshape(shape)


def _normed(heads: mx.array, norm: RMSNorm) -> mx.array:
    """Each of as many as there are in heads [T, ...]: a head, or all of them together."""
    return norm(heads.reshape(heads.shape[0], -1, norm.weight.size))


class Rotation(NamedTuple):
    """A layer's ``inv_freq`` [D/2], None where nothing is turned, and what its queries are multiplied by."""

    inv_freq: mx.array | None
    query_scale: float | mx.array


def rotations(config: ModelConfig) -> list[Rotation]:
    """One a layer. Layers of one kind share their arrays: they are the model's, and no checkpoint's."""
    if config.learned_positions:
        return [Rotation(None, config.query_scale)] * config.num_layers
    turned = _rotation(config, config.rope_theta, config.rope_scaling)
    local = _rotation(config, config.local_theta, None)
    zeros = mx.zeros((config.head_dim // 2,))
    mx.eval(zeros)
    still = Rotation(zeros, config.query_scale)
    others = dict.fromkeys(config.local_layers, local) | dict.fromkeys(config.no_rope_layers, still)
    return [others.get(layer, turned) for layer in range(config.num_layers)]


def _rotation(config: ModelConfig, theta: float, scaling: RopeScaling | None) -> Rotation:
    turned = rope_frequencies(config.rotary_dim or config.head_dim, theta, scaling)
    still = mx.zeros((config.head_dim // 2 - turned.size,))
    inv_freq = mx.concatenate([turned, still])
    # Queries and keys are multiplied alike: of both, queries alone bear it, so that keys can be moved.
    factor = 1.0 if scaling is None else scaling.attention_factor**2
    scale: float | mx.array = config.query_scale * factor
    if factor != 1 and still.size:
        half = mx.concatenate([mx.full(turned.shape, scale), mx.full(still.shape, config.query_scale)])
        scale = mx.concatenate([half, half])
        mx.eval(scale)
    mx.eval(inv_freq)
    return Rotation(inv_freq, scale)


def head_order(config: ModelConfig) -> tuple[int, ...]:
    """Which entry of a head as it is stored our rotation wants at each place; () where they lie so already.

    We turn entry i with entry i + D/2. Others turn neighbours (``rope_interleaved``), or the first
    ``rotary_dim`` entries alone: then what is not turned has pairs of its own, of frequency 0.
    """
    D, R = config.head_dim, config.rotary_dim or config.head_dim
    first, second = range(R // 2), range(R // 2, R)
    if config.rope_interleaved:
        first, second = range(0, R, 2), range(1, R, 2)
    half = (D - R) // 2
    order = (*first, *range(R, R + half), *second, *range(R + half, D))
    return () if order == tuple(range(D)) else order
