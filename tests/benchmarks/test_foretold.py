"""The model whose text is known says that text, whatever it is asked, with look-up and without."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from measure.foretold import BEGUN, CHANGED, STRIDE, ForetoldCheckpoint, loads

from tiny_llm import LLM, SamplingParams
from tiny_llm.config import ModelConfig

VOCAB, LENGTH = 4096, 40


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Two layers of it."""
    checkpoint = ForetoldCheckpoint("qwen2-0.5b")
    assert isinstance(checkpoint.config, ModelConfig)
    checkpoint.config = replace(checkpoint.config, num_layers=2, vocab_size=VOCAB)
    return LLM(checkpoint, quantize=4)


@pytest.mark.parametrize("load", loads(VOCAB, LENGTH))
@pytest.mark.parametrize("speculate", [True, False])
def test_its_answer_is_the_one_that_was_foretold(llm: LLM, load: str, speculate: bool) -> None:
    prompt, answer = loads(VOCAB, LENGTH)[load]
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, speculate=speculate)
    (completion,) = llm.generate([prompt], params)
    assert list(completion.token_ids) == answer


def test_loads_differ_in_what_of_the_answer_stands_in_the_prompt() -> None:
    shares = {}
    for load, (prompt, answer) in loads(VOCAB, LENGTH).items():
        assert all((b - a) % VOCAB == STRIDE % VOCAB for a, b in pairwise(answer))
        shares[load] = sum(token in prompt[:-BEGUN] for token in answer) / LENGTH
    assert shares["repeats a text"] == 1 and shares["nothing to find"] < 0.05
    assert shares[f"repeats all but one in {CHANGED}"] == pytest.approx(1 - 1 / CHANGED, abs=0.03)
