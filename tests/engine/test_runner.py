"""What the runner lets go of before a step."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm import LLM, SamplingParams


def kept_after_a_prompt(llm: LLM, tokens: int, kept: int) -> int:
    """MLX keeps ``kept`` bytes of one buffer; bytes that it keeps after a prompt of so many tokens."""
    mx.clear_cache()
    buffer = mx.zeros(kept, mx.uint8) + 1
    mx.eval(buffer)
    del buffer
    assert mx.get_cache_memory() >= kept
    llm.generate([7] * tokens, SamplingParams(max_tokens=1))
    return mx.get_cache_memory()


def test_a_step_of_another_size_takes_nothing_beside_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tokens of a long prompt took 0.25 GB beside the 0.54 that the step before had left."""
    monkeypatch.setattr("tiny_llm.engine.runner.BUFFER_POOL_BYTES", 2**26)
    llm = LLM("demo")
    mx.set_cache_limit(2**28)
    large = 2**26 - 2**20
    assert kept_after_a_prompt(llm, 400, large) < large, "what no operation can use was there until the end"
    assert kept_after_a_prompt(llm, 4, 2**24) >= 2**24, "it was let go of, though there was room for both"
