"""The decoder with both caches, ragged batches, other dtypes, and the real 260K-parameter LLaMA."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from tiny_llm.config import Quantization
from tiny_llm.data import QuantizedTensor
from tiny_llm.kv.dense import DenseCache
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models import registry
from tiny_llm.models.decoder import Decoder, DecoderLayer
from tiny_llm.models.loading import load_model
from tiny_llm.ops.backend import use
from tiny_llm.weights.checkpoint import load_weights

PROMPT = [5, 17, 44, 3, 29, 8, 60, 31, 2, 9, 51]
KINDS = ("qwen2_untied_sharded", "qwen3", "llama_llama3")


def unpack(w: QuantizedTensor) -> mx.array:
    return mx.dequantize(w.packed, w.scales, w.biases, group_size=w.group_size, bits=w.bits)


@pytest.mark.usefixtures("backend")
@pytest.mark.chapter("1.5")
@pytest.mark.parametrize("case", KINDS)
def test_sequences_in_one_batch_do_not_see_each_other(golden: Path, make_batch, case: str, off) -> None:
    model = load_model(golden / case, dtype="float32")
    together = model(make_batch(PROMPT, PROMPT[3:7], [1]), NoCache())
    alone = [model(make_batch(part), NoCache()) for part in (PROMPT, PROMPT[3:7], [1])]
    assert off(together, mx.concatenate(alone)) < 1e-5, "a row saw another sequence"


@pytest.mark.usefixtures("backend")
@pytest.mark.chapter("1.6")
@pytest.mark.parametrize("case", KINDS)
def test_greedy_tokens_are_the_same_with_and_without_a_cache(
    golden: Path, make_batch, greedy, case: str
) -> None:
    model = load_model(golden / case, dtype="float32")
    tokens = list(PROMPT)
    for _ in range(20):
        logits = model(make_batch(tokens), NoCache())
        tokens.append(int(mx.argmax(logits[-1]).item()))
    answer = tokens[len(PROMPT) :]
    assert len(set(answer)) > 2, f"a model that repeats itself shows little: {answer}"
    assert greedy(model, PROMPT, 20) == answer


@pytest.mark.usefixtures("backend")
@pytest.mark.chapter("1.6")
def test_a_real_model_gives_its_published_tokens(stories260k: Path, greedy) -> None:
    """200 greedy ids of the 260K-parameter LLaMA, from BOS, in float32."""
    expected = json.loads((stories260k / "expected_greedy_200.json").read_text())
    ids = expected["greedy_ids_reproduced_here"]
    got = greedy(load_model(stories260k, dtype="float32"), expected["prompt_ids"], 200)
    same = next((i for i, (a, b) in enumerate(zip(got, ids, strict=True)) if a != b), 200)
    assert got == ids, f"the first {same} ids are right"


@pytest.mark.usefixtures("ref")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(golden: Path, make_batch, dtype: str, off) -> None:
    got = load_model(golden / "qwen3", dtype=dtype)(make_batch(PROMPT), NoCache())
    assert got.dtype == getattr(mx, dtype)
    expected = load_model(golden / "qwen3", dtype="float32")(make_batch(PROMPT), NoCache())
    assert off(got.astype(mx.float32), expected) < (0.05 if dtype == "bfloat16" else 0.006)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_is_the_model_of_its_unpacked_matrices(
    golden: Path, make_batch, bits: int, off
) -> None:
    folder = golden / "qwen2_tied"
    config = registry.load_config(folder)
    weights = load_weights(
        folder,
        registry.expected_tensors(config),
        dtype=mx.float32,
        quantization=None,
        quantize=Quantization(bits, 64),
        quantizable=registry.quantizable_tensors(config),
    )
    unpacked = {name: unpack(w) if isinstance(w, QuantizedTensor) else w for name, w in weights.items()}
    with use("ref"):
        expected = registry.build(config, unpacked)(make_batch(PROMPT), NoCache())
    model = load_model(folder, dtype="float32", quantize=bits, activations="exact")
    assert off(model(make_batch(PROMPT), NoCache()), expected) < 1e-5
    cache = DenseCache(config.num_layers)
    steps = [model(make_batch([token], start=i), cache) for i, token in enumerate(PROMPT)]
    assert off(mx.concatenate(steps), expected) < 1e-5


@pytest.mark.usefixtures("ref")
def test_groups_of_64_fall_to_32_where_they_do_not_fit(golden: Path) -> None:
    model = load_model(golden / "llama_linear", dtype="float32", quantize=4)
    assert isinstance(model, Decoder)
    weight = model.layers[0].mlp.down_proj.weight
    assert isinstance(weight, QuantizedTensor)
    assert weight.group_size == 32


@pytest.mark.chapter("1.5")
def test_a_layer_leaves_what_its_mlp_adds_for_the_next_one() -> None:
    class Norm:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def after(self, x: mx.array, residual: mx.array | None) -> tuple[mx.array, mx.array]:
            x = x if residual is None else x + residual
            return x, self.factor * x

    layer = SimpleNamespace(
        input_layernorm=Norm(10),
        post_attention_layernorm=Norm(100),
        self_attn=lambda x, batch, kv: x + 1,
        mlp=lambda x: -x,
    )
    x, waits = DecoderLayer.__call__(layer, mx.array([1.0]), mx.array([2.0]), None, None)  # type: ignore[arg-type]
    assert (x.item(), waits.item()) == (34, -3400), "the stream first, then what is still to be added"
