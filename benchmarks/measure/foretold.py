"""A model of any shape whose text is known: behind a token comes the one ``STRIDE`` further, whoever runs it.

So engines with weights of their own answer alike, and what a look-up finds is a matter of the prompt alone.
Its layers compute what those of any model do, and add little; its head is the embedding, moved by ``STRIDE``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Unpack

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.layers.named import Weights
from tiny_llm.models.checkpoint import DummyCheckpoint, Reading
from tiny_llm.weights.names import config_of

STRIDE = 7919
"""No vocabulary's size is a multiple of it, so that a text repeats itself after all tokens only."""
LITTLE = 1 / 16
"""What layers add is scaled by this, the embedding to entries of about 1."""
BEGUN = 4  # tokens of the answer's beginning that end the prompt: something to look up
CHANGED = 8  # one token in so many


def foretold_facts(shape: str) -> dict[str, object]:
    """The facts of a short name's config.json, and what ``workers/random_gguf.py`` needs to know beside."""
    return {
        **config_of(shape),
        "tie_word_embeddings": False,
        "foretold": {"stride": STRIDE, "little": LITTLE},
    }


def loads(vocab: int, length: int) -> Mapping[str, tuple[list[int], list[int]]]:
    """By name, a prompt and the ``length`` tokens of its answer."""
    text = [(n * STRIDE + 17) % vocab for n in range(BEGUN + length)]
    rng = random.Random(0)
    noise = [rng.randrange(vocab) for _ in text]
    changed = [noise[n] if n % CHANGED == CHANGED - 1 else token for n, token in enumerate(text)]
    begun, answer = text[:BEGUN], text[BEGUN:]
    return {
        "repeats a text": (text + begun, answer),
        f"repeats all but one in {CHANGED}": (changed + begun, answer),
        "nothing to find": (noise + begun, answer),
    }


class ForetoldCheckpoint(DummyCheckpoint):
    """Such a model as ours loads it."""

    def __init__(self, shape: str) -> None:
        self.config = ModelConfig.from_hf(foretold_facts(shape))

    def tensors(self, **how: Unpack[Reading]) -> Weights:
        """Noise, with what a layer adds made little, and the head made of the embedding."""
        finish = how["finish"]
        noise = super().tensors(dtype=how["dtype"], quantize=how["quantize"], finish=lambda weight: weight)
        embedding = _scaled(noise["model.embed_tokens.weight"], self.config.hidden_size**0.5)
        ends = ("o_proj.weight", "down_proj.weight")
        little = {name: _scaled(weight, LITTLE) for name, weight in noise.items() if name.endswith(ends)}
        made = {
            **noise,
            **little,
            "model.embed_tokens.weight": embedding,
            "lm_head.weight": _moved(embedding),
        }
        return {name: finish(weight) for name, weight in made.items()}


def _scaled(weight: Matrix, by: float) -> Matrix:
    assert isinstance(weight, QuantizedTensor), "made to be measured with packed weights"
    return replace(weight, scales=weight.scales * by, biases=weight.biases * by)


def _moved(weight: Matrix) -> Matrix:
    assert isinstance(weight, QuantizedTensor)
    parts = (weight.packed, weight.scales, weight.biases)
    packed, scales, biases = (mx.roll(part, STRIDE, axis=0) for part in parts)
    return replace(weight, packed=packed, scales=scales, biases=biases)
