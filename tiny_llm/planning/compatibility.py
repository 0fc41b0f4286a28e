"""Owns which of a model's ops have kernels here, found by running one layer of it. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tiny_llm.config import ModelConfig, ModelFacts
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import ConfigError
from tiny_llm.metrics import fallbacks
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.sampling_params import SamplingParams

OPS = ("linear", "paged_attention", "rms_norm", "rope", "swiglu", "argmax", "sample")
"""Those of backend "cpu" that have kernels."""
VOCAB = 1024  # a larger head would take longer, and is the same kernel's


class _OneLayer(DummyCheckpoint):
    """Random weights in one layer of a model's shapes."""

    def __init__(self, config: ModelConfig) -> None:
        experts = config.experts and replace(config.experts, layers=frozenset({0}))
        self.config = replace(
            config,
            num_layers=1,
            experts=experts,
            vocab_size=min(config.vocab_size, VOCAB),
            max_position_embeddings=min(config.max_position_embeddings, 64),
        )


def ops_of(config: ModelFacts) -> list[str]:
    """Which of OPS a model runs, and which it has in their place."""
    if not isinstance(config, ModelConfig):
        return list(OPS)
    others = {
        "rms_norm": "layer_norm" if config.norm == "layer" else "rms_norm",
        "rope": "" if config.learned_positions else "rope",
        "swiglu": "swiglu" if config.mlp == "swiglu" else "gelu",
    }
    return [name for op in OPS if (name := others.get(op, op))] + ["experts"] * (config.experts is not None)


def fallen_back(
    config: ModelFacts, backend: str, *, dtype: str | None, quantize: int | None
) -> Mapping[str, int]:
    """How often each op had no kernel, from prompt to drawn tokens. Raises ConfigError for a plug-in's."""
    if not isinstance(config, ModelConfig):
        raise ConfigError(
            f"{config.model_type!r} is a plug-in's architecture: give it to bench, which runs it."
        )
    before = fallbacks().read()
    with LLM(_OneLayer(config), backend=backend, dtype=dtype, quantize=quantize, kv_memory=2**26) as llm:
        for temperature in (0.0, 0.8):
            params = SamplingParams(max_tokens=3, temperature=temperature, top_p=0.9, seed=1, ignore_eos=True)
            llm.generate([[1] * 20, [2] * 3], params)
    return {op: count - before.get(op, 0) for op, count in fallbacks().read().items()}
