"""A plug-in that tests install: GPT-2, whose config and tensors have names and facts of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.config import read_dtype
from tiny_llm.config_fields import Fields
from tiny_llm.data import Batch, KVCache
from tiny_llm.layers.named import Shapes, Weights, vector
from tiny_llm.models.registry import Architecture


@dataclass(frozen=True)
class GPT2Config:
    """What config.json calls n_embd, n_layer, n_head and n_positions. The MLP is four times as wide."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int
    layer_norm_epsilon: float
    eos_token_ids: tuple[int, ...]
    dtype: str
    model_type: str = "tiny_gpt2"
    tie_word_embeddings: bool = True
    quantization: None = None
    windows: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, raw: Mapping[str, object]) -> GPT2Config:
        fields = Fields(raw)
        return cls(
            vocab_size=fields.whole("vocab_size"),
            hidden_size=fields.whole("n_embd"),
            num_layers=fields.whole("n_layer"),
            num_heads=fields.whole("n_head"),
            max_position_embeddings=fields.whole("n_positions", 1024),
            layer_norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
            eos_token_ids=fields.token_ids("eos_token_id"),
            dtype=read_dtype(fields),
        )

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def intermediate_size(self) -> int:
        return 4 * self.hidden_size


def shapes(config: GPT2Config) -> Shapes:
    """Its matrices are stored the other way around: [in, out]."""
    E, F = config.hidden_size, config.intermediate_size
    found: Shapes = {"wte.weight": (config.vocab_size, E), "wpe.weight": (config.max_position_embeddings, E)}
    norms = ["ln_f"]
    for i in range(config.num_layers):
        norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
        maps = {"attn.c_attn": (E, 3 * E), "attn.c_proj": (E, E), "mlp.c_fc": (E, F), "mlp.c_proj": (F, E)}
        for name, (inputs, outputs) in maps.items():
            found[f"h.{i}.{name}.weight"] = (inputs, outputs)
            found[f"h.{i}.{name}.bias"] = (outputs,)
    for name in norms:
        found |= {f"{name}.weight": (E,), f"{name}.bias": (E,)}
    return found


@dataclass(frozen=True)
class GPT2:
    """Learned positions, LayerNorm, one map for queries, keys and values, GELU."""

    config: GPT2Config
    weights: Mapping[str, mx.array]

    @classmethod
    def take(cls, config: GPT2Config, weights: Weights) -> GPT2:
        return cls(config, {name: vector(weights, name) for name in shapes(config)})

    def __call__(self, batch: Batch, kv: KVCache) -> mx.array:
        heads = (-1, self.config.num_heads, self.config.head_dim)
        x = self.weights["wte.weight"][batch.tokens] + self.weights["wpe.weight"][batch.positions]
        for i in range(self.config.num_layers):
            qkv = self._linear(self._norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
            q, k, v = (part.reshape(heads) for part in mx.split(qkv, 3, axis=-1))
            attended = kv.attend(i, q, k, v, batch).reshape(x.shape)
            x = x + self._linear(attended, f"h.{i}.attn.c_proj")
            inner = self._linear(self._norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
            x = x + self._linear(_gelu(inner), f"h.{i}.mlp.c_proj")
        return self._norm(x[batch.logit_rows], "ln_f") @ self.weights["wte.weight"].T

    def _linear(self, x: mx.array, name: str) -> mx.array:
        return x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _norm(self, x: mx.array, name: str) -> mx.array:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return mx.fast.layer_norm(x, weight, bias, self.config.layer_norm_epsilon)


def _gelu(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(0.7978845608 * (x + 0.044715 * x**3)))


GPT_2 = Architecture(GPT2Config.from_hf, shapes, GPT2.take, unread=(".attn.bias", ".attn.masked_bias"))
