"""Attention's maps around the cache: project, normalise, rotate, attend, project back."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.data import Batch, KVCache
from tiny_llm.layers.linear import Linear, heads_of
from tiny_llm.layers.named import Shapes, Weights, under
from tiny_llm.layers.norm import RMSNorm
from tiny_llm.ops.rope import rope_periods, rope_qk


@dataclass(frozen=True, slots=True)
class Attention:
    """x [T, E] to [T, E]. ``inv_freq`` [D/2]; ``q_norm`` and ``k_norm`` (Qwen3) normalise each head.

    ``periods`` are ``rope_periods`` of the frequencies. ``window``: how many tokens a row sees; 0: all.
    """

    layer: int
    window: int
    head_dim: int
    inv_freq: mx.array
    periods: mx.array | None
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    @staticmethod
    def shapes(config: ModelConfig) -> Shapes:
        """The tensors that ``take`` reads, without their prefix."""
        E, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        wide, narrow = config.num_heads * D, config.num_kv_heads * D
        norms: Shapes = {"q_norm.weight": (D,), "k_norm.weight": (D,)} if config.qk_norm else {}
        return {
            **under("q_proj", Linear.shapes(E, wide, bias=bias)),
            **under("k_proj", Linear.shapes(E, narrow, bias=bias)),
            **under("v_proj", Linear.shapes(E, narrow, bias=bias)),
            **under("o_proj", Linear.shapes(wide, E, bias=config.output_bias)),
            **norms,
        }

    @classmethod
    def take(
        cls, weights: Weights, prefix: str, config: ModelConfig, layer: int, inv_freq: mx.array
    ) -> Attention:
        """Pick the maps and norms below ``prefix``. Raises WeightError for a tensor that is missing."""
        bias, eps = config.attention_bias, config.rms_norm_eps
        q = Linear.take(weights, f"{prefix}.q_proj", bias=bias)
        k = Linear.take(weights, f"{prefix}.k_proj", bias=bias)
        v = Linear.take(weights, f"{prefix}.v_proj", bias=bias)
        o = Linear.take(weights, f"{prefix}.o_proj", bias=config.output_bias)
        q_norm = RMSNorm.take(weights, f"{prefix}.q_norm", eps) if config.qk_norm else None
        k_norm = RMSNorm.take(weights, f"{prefix}.k_norm", eps) if config.qk_norm else None
        window = config.windows[layer] if config.windows else 0
        periods = rope_periods(inv_freq)
        return cls(layer, window, config.head_dim, inv_freq, periods, q, k, v, o, q_norm, k_norm)

    def __call__(self, x: mx.array, batch: Batch, kv: KVCache) -> mx.array:
        q, k, v = self.heads(x, batch.positions)
        return self.o_proj(self.attend(q, k, v, batch, kv))

    def attend(self, q: mx.array, k: mx.array, v: mx.array, batch: Batch, kv: KVCache) -> mx.array:
        """What the cache's attention gives, [T, H, D]."""
        return kv.attend(self.layer, q, k, v, batch, window=self.window)

    def heads(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """What attends: q [T, H, D] and k [T, K, D], normed and rotated, and v [T, K, D]."""
        q, k, v = heads_of(x, (self.q_proj, self.k_proj, self.v_proj), self.head_dim)
        norms: tuple[mx.array | None, mx.array | None] = (None, None)
        eps = 0.0
        if self.q_norm is not None and self.k_norm is not None:
            norms, eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
        q, k = rope_qk(q, k, positions, self.inv_freq, *norms, eps, self.periods)
        return q, k, v.reshape(v.shape[0], -1, self.head_dim)
