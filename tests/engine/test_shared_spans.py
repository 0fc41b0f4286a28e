"""Sequences that begin alike have what they share read once: each gets the tokens that it gets alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_llm import LLM, SamplingParams
from tiny_llm.engine.settings import EngineSettings

COMMON = [5 + i * 7 % 900 for i in range(600)]  # more than two of the spans that attention is cut into
PROMPTS = [COMMON[: 600 - 40 * (i % 3)] + [i + 1] * (3 + 5 * i) for i in range(6)]
"""Groups inside groups: all share the first 520 tokens, two of each three more."""


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["auto", "int8"])
def test_those_who_begin_alike_get_the_tokens_of_each_alone(demo: Path, backend: str, kept: str) -> None:
    llm = LLM(demo, backend=backend, kv_dtype=kept)
    prompts = PROMPTS[:3] if backend == "ref" else PROMPTS  # it is slow, and reads for each what it needs
    params = [
        SamplingParams(max_tokens=24, temperature=i % 2 * 1.0, seed=i, ignore_eos=True, n=1 + (i == 2))
        for i in range(len(prompts))
    ]
    apart = llm.with_engine(EngineSettings(kv_blocks=512, prefix_cache=False))
    want = [one.token_ids for p, own in zip(prompts, params, strict=True) for one in apart.generate([p], own)]
    llm.generate([COMMON], SamplingParams(max_tokens=1))
    got = [one.token_ids for one in llm.generate(prompts, params)]
    assert got == want
