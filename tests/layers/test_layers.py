"""Layers: which tensors they take, how strictly, and what the golden files say of their outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.config import ModelConfig
from tiny_llm.data import Batch, QuantizedTensor
from tiny_llm.errors import WeightError
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.layers.attention import Attention
from tiny_llm.layers.embedding import Embedding
from tiny_llm.layers.linear import Linear
from tiny_llm.layers.mlp import MLP
from tiny_llm.layers.norm import RMSNorm
from tiny_llm.models.registry import load_config
from tiny_llm.ops.rope import rope_frequencies


class Golden:
    """A golden model's config, float32 weights and activations."""

    def __init__(self, folder: Path) -> None:
        self.config = load_config(folder)
        stored = mx.load(str(folder / "model.safetensors"))
        self.weights = {name: array.astype(mx.float32) for name, array in stored.items()}
        self.seen = mx.load(str(folder / "activations.safetensors"))

    def attention(self, config: ModelConfig) -> mx.array:
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        layer = Attention.take(self.weights, "model.layers.0.self_attn", config, 0, frequencies)
        tokens = self.seen["tokens"]
        batch = Batch(tokens, self.seen["positions"], (0, tokens.size), mx.arange(tokens.size))
        return layer(self.seen["layer0.norm"], batch, NoCache())


@pytest.fixture(params=["qwen2_tied", "qwen3", "llama_llama3"])
def model(golden: Path, request: pytest.FixtureRequest) -> Golden:
    return Golden(golden / request.param)


@pytest.mark.chapter("1.4")
def test_mlp_as_transformers(model: Golden, off) -> None:
    mlp = MLP.take(model.weights, "model.layers.0.mlp", model.config)
    x, expected = model.seen["layer0.mlp_in"], model.seen["layer0.mlp"]
    swapped = off(MLP(mlp.up_proj, mlp.gate_proj, mlp.down_proj)(x), expected)
    assert off(mlp(x), expected) < 1e-5, "gate and up are swapped" if swapped < 1e-5 else "not the golden MLP"


@pytest.mark.chapter("1.3")
def test_attention_as_transformers(model: Golden, off) -> None:
    expected = model.seen["layer0.attention"]
    got = off(model.attention(model.config), expected)
    mistakes = {
        "rope scaling ignored": replace(model.config, rope_scaling=None),
        "q and k are not normed": replace(model.config, qk_norm=""),
        "q, k and v lack their biases": replace(model.config, attention_bias=False),
    }
    for mistake, config in mistakes.items():
        if config != model.config:
            was = off(model.attention(config), expected)
            assert was > 1e-5, f"these golden files cannot show: {mistake}"
            assert abs(got - was) > 1e-6, f"the result is that of a mistake: {mistake}"
    assert got < 1e-5


@pytest.mark.chapter("1.5")
def test_a_tied_head_is_the_embedding(model: Golden, off) -> None:
    embed = Embedding.take(model.weights, model.config)
    hidden = embed(model.seen["tokens"])
    assert mx.array_equal(hidden, model.seen["hidden.0"])
    table = model.weights["model.embed_tokens.weight"]
    assert off(embed.as_head()(hidden), mx.matmul(hidden, table.T)) < 1e-6


@pytest.mark.chapter("1.5")
def test_taken_and_named_tensors_are_the_same(model: Golden) -> None:
    """Each layer must find what its ``shapes`` name, and need all of it."""
    config, layer = model.config, "model.layers.0"
    frequencies = rope_frequencies(config.head_dim, config.rope_theta)
    takes = {
        f"{layer}.mlp": (MLP.shapes(config), lambda w, p: MLP.take(w, p, config)),
        f"{layer}.self_attn": (
            Attention.shapes(config),
            lambda w, p: Attention.take(w, p, config, 0, frequencies),
        ),
    }
    for prefix, (shapes, take) in takes.items():
        named = {f"{prefix}.{name}": model.weights[f"{prefix}.{name}"] for name in shapes}
        assert {name: array.shape for name, array in named.items()} == {
            f"{prefix}.{name}": shape for name, shape in shapes.items()
        }
        take(named, prefix)
        for missing in named:
            with pytest.raises(WeightError, match=f"tensor '{missing}' is missing"):
                take({name: array for name, array in named.items() if name != missing}, prefix)


@pytest.mark.parametrize(
    ("attention", "output", "norms", "expected"),
    [
        (False, False, False, set()),
        (True, False, False, {"q_proj.bias", "k_proj.bias", "v_proj.bias"}),
        (True, True, False, {"q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"}),
        (False, False, True, {"q_norm.weight", "k_norm.weight"}),
    ],
)
def test_facts_decide_the_tensors(
    golden: Path, attention: bool, output: bool, norms: bool, expected: set[str]
) -> None:
    config = load_config(golden / "qwen3")
    config = replace(config, attention_bias=attention, output_bias=output, qk_norm=norms)
    shapes = Attention.shapes(config)
    always = {f"{name}_proj.weight" for name in "qkvo"}
    assert set(shapes) == always | expected
    assert shapes["q_proj.weight"] == (64, 32), "head_dim stands apart from hidden_size / heads"


def test_a_norm_may_not_be_quantized() -> None:
    packed = QuantizedTensor(*mx.quantize(mx.zeros((1, 64)), group_size=64, bits=4), 64, 4)
    with pytest.raises(WeightError, match=r"tensor 'norm.weight' is quantized, expected a plain array"):
        RMSNorm.take({"norm.weight": packed}, "norm", 1e-6)


def test_a_bias_is_taken_only_where_asked() -> None:
    weights = {"x.weight": mx.zeros((2, 3)), "x.bias": mx.ones(2)}
    assert Linear.take(weights, "x", bias=False)(mx.zeros((1, 3))).tolist() == [[0, 0]]
    assert Linear.take(weights, "x", bias=True)(mx.zeros((1, 3))).tolist() == [[1, 1]]
