"""Two ranks that work in turns, the other one a process of its own: the tokens of one, in traffic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.test_same_tokens import SETTINGS, alone, together, traffic
from tiny_llm import LLM, ConfigError, SamplingParams
from tiny_llm.config import ModelConfig
from tiny_llm.distributed.meeting import Ranks
from tiny_llm.models.registry import load_config
from tiny_llm.models.stages import stage_layers
from tiny_llm.weights.names import config_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one(demo: Path) -> Iterator[LLM]:
    """The bundled model in one process."""
    with LLM(demo, threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def two(demo: Path) -> Iterator[LLM]:
    """The same by two that have some layers each."""
    with LLM(demo, threads=1, ranks=Ranks(2, shares=())) as llm:
        yield llm


@pytest.mark.parametrize("name", ["small chunks", "recompute", "swap"])
def test_traffic_gets_the_tokens_of_one_rank(one: LLM, two: LLM, name: str) -> None:
    asks = traffic(one, seed=23, count=9, searches=0.25)
    assert together(two, SETTINGS[name], asks) == alone(one, asks)


def test_two_steps_are_under_way(one: LLM, two: LLM) -> None:
    prompts = [[40 + 7 * i + n for n in range(12)] for i in range(8)]
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=3, ignore_eos=True, speculate=False)
    engine, decodes, beside = two.engine, list[int](), 0
    numbers = [engine.add(prompt, params) for prompt in prompts]
    answers: dict[int, list[int]] = {}
    while len(engine):
        for number, chunk in engine.step():
            if chunk.completion is not None:
                answers[number] = chunk.completion.token_ids
        decodes += [batch.plan.decodes for batch in engine._ahead]
        beside += len(engine._ahead)
    assert [answers[number] for number in numbers] == [a.token_ids for a in one.generate(prompts, params)]
    assert beside > 20 and max(decodes) == 4, "all are in one step"


def test_texts_become_the_vectors_of_one_rank(one: LLM, two: LLM) -> None:
    texts = ["A fox met a wolf.", "Paged attention reads a pool of blocks.", "34 + 25"]
    vectors = [[found.vector for found in llm.embed(texts)] for llm in (one, two)]
    assert vectors[0] == vectors[1]


def test_who_cancels_leaves_the_others_as_they_are(one: LLM, two: LLM) -> None:
    prompts, params = [[50 + i, 60, 70] for i in range(4)], SamplingParams(max_tokens=16, ignore_eos=True)
    engine = two.engine
    numbers = [engine.add(prompt, params) for prompt in prompts]
    answers: dict[int, list[int]] = {}
    for _ in range(200):
        events = engine.step()
        if numbers[0] not in answers and len(engine._ahead):
            engine.cancel(numbers[0])
            answers[numbers[0]] = []
        answers |= {n: chunk.completion.token_ids for n, chunk in events if chunk.completion is not None}
        if not len(engine):
            break
    (alone_,) = one.generate([prompts[3]], params)
    assert answers[numbers[3]] == alone_.token_ids


def test_layers_are_cut_by_the_work_of_a_token() -> None:
    config = ModelConfig.from_hf(config_of("qwen2-0.5b"))  # of which the head is 9 layers' work
    assert stage_layers(config, (1, 1)) == [range(17, 24), range(17)]
    assert [len(layers) for layers in stage_layers(config, (2, 1))] == [13, 11]
    assert [len(layers) for layers in stage_layers(config, (1, 1, 1, 1))] == [1, 6, 9, 8]
    for shares in ((1, 1), (1, 5), (5, 1), (1, 1, 1), (3, 2, 1, 1)):
        layers = stage_layers(config, shares)
        assert [layer for own in reversed(layers) for layer in own] == list(range(24)), shares


def test_what_cannot_be_cut_is_refused(demo: Path) -> None:
    config = load_config(demo)
    with pytest.raises(ConfigError, match="no more ranks than the model has layers"):
        stage_layers(config, (1.0,) * (config.num_layers + 1))
    with pytest.raises(ConfigError, match="a number above 0"):
        stage_layers(config, (1, 0))
    with pytest.raises(ConfigError, match=r"3 shares are given .* 2 ranks"):
        Ranks(2, shares=(1, 1, 1)).shares_of(2)
