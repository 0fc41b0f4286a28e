"""A draft model: its guesses are the large model's tokens, mostly, and no answer depends on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tiny_llm import LLM, ConfigError, SamplingParams
from tiny_llm.decoding.grammar import regex_grammar
from tiny_llm.engine.settings import EngineSettings, Speculation
from tiny_llm.proving.record import Proof, Shapes

ASKS = ("What is paged attention?", "Tell me a story about a fox.", "What is 34 + 25?", "What is prefill?")


@pytest.fixture(scope="module")
def drafting(demo: Path) -> LLM:
    return LLM(demo, draft="demo-draft")


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_most_of_its_guesses_are_right_at_any_temperature(
    drafting: LLM, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It draws with the noise of the position: without that, sampling would rarely agree."""
    monkeypatch.setattr("tiny_llm.scheduler.drafts.Worth.length", lambda self, share, most: min(most, 3))
    params = [SamplingParams(max_tokens=60, temperature=temperature, seed=n) for n in range(len(ASKS))]
    prompts = [drafting.chat_prompt([{"role": "user", "content": ask}]) for ask in ASKS]
    plain = drafting.with_engine(EngineSettings(kv_blocks=512, speculate="off"))
    expected = [answer.token_ids for answer in plain.generate(prompts, params)]
    answers = drafting.with_engine(EngineSettings(kv_blocks=512, speculate="draft")).generate(prompts, params)
    assert [answer.token_ids for answer in answers] == expected
    drafted = sum(answer.drafted_tokens for answer in answers)
    accepted = sum(answer.accepted_tokens for answer in answers)
    assert accepted > 0.4 * drafted > 30


def test_it_reads_nothing_while_no_guess_pays(drafting: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It took in the tokens of every step, also where it was never asked for a guess."""
    monkeypatch.setattr("tiny_llm.scheduler.drafts.Worth.length", lambda self, share, most: 0)
    own = drafting.with_engine(EngineSettings(kv_blocks=64, speculate="draft"))
    prompts = [own.chat_prompt([{"role": "user", "content": ask}]) for ask in ASKS[:2]]
    own.generate(prompts, SamplingParams(max_tokens=12))
    draft = own.engine.runner.draft
    assert draft is not None and not any(draft._read)
    monkeypatch.setattr("tiny_llm.scheduler.drafts.Worth.length", lambda self, share, most: min(most, 3))
    later = own.generate(prompts, SamplingParams(max_tokens=12))
    assert any(draft._read) and any(answer.accepted_tokens for answer in later), "it catches up"


@pytest.mark.parametrize("speculate", ["ngram", "draft"])
def test_what_the_form_forbids_is_not_checked(
    drafting: LLM, speculate: Speculation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiny_llm.scheduler.drafts.Worth.length", lambda self, share, most: most)
    own = drafting.with_engine(EngineSettings(kv_blocks=64, speculate=speculate))
    form = regex_grammar("[0-9]{24}")
    held = own.grammars.constrain(SamplingParams(max_tokens=40, temperature=1.0, seed=3), form)
    expected = own.generate("Say a number: ", replace(held, speculate=False))[0].token_ids
    guessed = (*expected[:4], *own.tokenizer.encode(" is the number"))
    assert own.generate("Say a number: ", replace(held, prediction=guessed))[0].token_ids == expected
    stats = own.engine.stats()
    assert stats.drafted_tokens["prediction"] == stats.accepted_tokens["prediction"] == 3


def test_its_pages_are_in_the_accounts(drafting: LLM) -> None:
    with_draft = drafting.with_engine(EngineSettings(kv_blocks=64, speculate="draft")).engine
    alone = drafting.with_engine(EngineSettings(kv_blocks=64)).engine
    draft = with_draft.runner.draft
    assert draft is not None and alone.runner.draft is None
    assert with_draft.block_bytes == alone.block_bytes + draft.cache.format.block_bytes
    assert with_draft.stats().block_bytes == with_draft.block_bytes


def test_no_guess_leaves_a_block(drafting: LLM) -> None:
    own = drafting.with_engine(EngineSettings(kv_blocks=64, speculate="draft", prefix_cache=False))
    own.generate(["Once upon a time"] * 4, SamplingParams(max_tokens=40, ignore_eos=True))
    usage = own.engine.scheduler.usage()
    assert usage.used == usage.cached == 0
    own.engine.scheduler.check_integrity()


def test_another_vocabulary_is_refused(demo_copy: Path) -> None:
    file = demo_copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="tokens are not the model's"):
        LLM(demo_copy, draft="demo-draft")


def test_wishes_that_contradict_each_other_are_refused(demo: Path) -> None:
    with pytest.raises(ConfigError, match="no draft model is named"):
        LLM(demo, speculate="draft")
    with pytest.raises(ConfigError, match="a draft model is named"):
        LLM("demo", speculate="off", draft="demo-draft")
    with pytest.raises(ConfigError, match="must be one of 'off', 'ngram', 'draft'"):
        EngineSettings(kv_blocks=8, speculate="guess")  # type: ignore[arg-type]


def test_the_kernels_are_tried_on_its_shapes(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Shapes] = []

    def known(_: str, shapes: Shapes, *__: object) -> dict[str, Proof]:
        asked.append(shapes)
        return {"swiglu": Proof("swiglu", "off" if len(asked) > 1 else "")}

    monkeypatch.setattr("tiny_llm.proving.trial.proved", known)
    with LLM(demo, backend="metalsim", kernels="auto", draft="demo-draft") as own:
        assert own.kernels.ours == frozenset() and own._draft is not None
        of_target, of_draft = asked
        assert of_target.hidden == own.config.hidden_size != of_draft.hidden == own._draft.config.hidden_size
        assert (of_draft.bits, of_draft.block_size) == (8, of_target.block_size)
