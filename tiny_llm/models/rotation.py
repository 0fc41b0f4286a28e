"""How each layer's queries and keys are turned, from a config's facts. Owns how that differs by layer."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.config_rope import RopeScaling
from tiny_llm.ops.rope import rope_frequencies


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
