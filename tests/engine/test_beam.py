"""Beam search: transformers' sequences and scores, in a batch with others, and no block left behind."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from tiny_llm import LLM, BeamParams, RequestError, SamplingParams
from tiny_llm.decoding.grammar import regex_grammar
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.models.checkpoint import FolderCheckpoint
from tiny_llm.tokenizer.files import TokenizerFiles
from tiny_llm.tokenizer.tokenizer import Tokenizer

A_PROMPT = list(range(3, 515))


def character(token: int) -> str:
    return chr(0x4E00 + token)


class Spelled(FolderCheckpoint):
    """A golden model, each of whose tokens is a character; none ends an answer by itself."""

    end_ids = frozenset()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        vocab = {character(token): token for token in range(self.config.vocab_size)}
        backend = Backend(models.WordLevel(vocab, character(0)))
        backend.decoder = decoders.Fuse()
        return Tokenizer(TokenizerFiles(backend, {}, {}, add_bos=None))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3", "llama"])
def test_sequences_and_scores_are_those_of_transformers(golden: Path, name: str) -> None:
    """By every rule, with end tokens inside, stop strings, n below the width: all in one batch."""
    cases = json.loads((golden / name / "beams.json").read_text())
    llm = LLM(Spelled(golden / name), dtype="float32")
    params = [
        BeamParams(
            **{option: case[option] for option in ("width", "n", "max_tokens")},
            length_penalty=case["length_penalty"],
            early_stopping=case["early_stopping"],
            stop_token_ids=case["end_ids"],
            stop=["".join(map(character, case["stop"]))] if case["stop"] else [],
        )
        for case in cases
    ]
    found = llm.beam_search([case["prompt"] for case in cases], params)
    for case, answers in zip(cases, found, strict=True):
        assert [answer.token_ids for answer in answers] == case["answers"], case
        assert [answer.score for answer in answers] == pytest.approx(case["scores"], abs=2e-4), case
    assert llm.engine.scheduler.usage().used == 0


@pytest.mark.slow
def test_memory_of_beams_is_what_parts_them(llm: LLM) -> None:
    """At width 8, 512 shared tokens and 64 new ones: at most 1.3 times the blocks that hold those."""
    own = llm.with_engine(EngineSettings(kv_blocks=512, prefix_cache=False))
    engine, size, most = own.engine, own.engine.settings.block_size, 0
    engine.add(A_PROMPT, BeamParams(width=8, max_tokens=64, ignore_eos=True))
    while len(engine):
        engine.step()
        engine.scheduler.check_integrity()
        most = max(most, engine.scheduler.usage().used)
        assert engine.scheduler.num_running <= 8, "those left behind end within the step"
    assert 512 // size < most <= 1.3 * (512 + 8 * 64) / size, most
    assert engine.scheduler.usage().used == 0


@pytest.mark.parametrize("end", ["cancel", "deadline", "failure"])
def test_a_search_that_ends_early_leaves_nothing(llm: LLM, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends one of its beams ends all of them, with as many answers as were asked for."""
    now = 0.0
    own = llm.with_engine(EngineSettings(kv_blocks=64))
    engine = own.engine
    monkeypatch.setattr(engine, "_clock", lambda: now)
    number = engine.add([5, 6, 7], BeamParams(width=4, n=3, max_tokens=40, ignore_eos=True), timeout_s=9.0)
    other = engine.add([8, 9], SamplingParams(max_tokens=30, ignore_eos=True))
    for _ in range(6):
        assert not [event for event in engine.step() if event.request_id == number]
    assert engine.scheduler.num_running == 5
    if end == "cancel":
        events = engine.cancel(number)
    elif end == "deadline":
        now = 10.0
        events = engine.step()
    else:
        with monkeypatch.context() as broken:
            broken.setattr(engine.runner.cache, "prepare", lambda plan: 1 / 0)
            events = engine.step()
    ended = [event.chunk.completion for event in events if event.request_id == number]
    reason = {"cancel": "cancelled", "deadline": "timeout", "failure": "error"}[end]
    assert [(one.index, one.finish_reason, len(one.token_ids)) for one in ended if one] == [
        (index, reason, 6) for index in range(3)
    ]
    engine.scheduler.check_integrity()
    while len(engine):
        assert {event.request_id for event in engine.step()} <= {other}
    assert engine.scheduler.usage().used == 0 and not engine._open._answers


def test_a_search_of_a_form_finds_all_it_allows(llm: LLM) -> None:
    """Fewer answers than beams: the list is shorter. What no token fits ends with an error that says so."""
    form = llm.grammars.constrain(BeamParams(width=4, n=4, max_tokens=20), regex_grammar("yes|no"))
    (found,) = llm.beam_search("Is it so?", form)
    assert sorted(answer.text for answer in found) == ["no", "yes"]
    assert found[0].score is not None and found[1].score is not None and found[0].score > found[1].score
    banned = BeamParams(width=2, n=2, max_tokens=4, processors=(lambda _, logits: logits - mx.inf,))
    (failed,) = llm.beam_search([5], banned)
    assert [answer.finish_reason for answer in failed] == ["error", "error"]
    assert failed[0].error is not None and "No token may come next" in failed[0].error


def test_log_probabilities_add_up_to_the_score(llm: LLM) -> None:
    (found,) = llm.beam_search([5, 6], BeamParams(width=3, n=3, max_tokens=8, logprobs=5, length_penalty=0.0))
    for answer in found:
        assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids)
        chosen = [row[token] for row, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        assert answer.score == pytest.approx(sum(chosen)) and all(
            5 <= len(row) <= 6 for row in answer.logprobs
        )


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"width": 0}, "width is 0"),
        ({"n": 5}, "n is 5, but must be at most the beams' width, which is 4"),
        ({"temperature": 0.7}, "temperature is 0.7, but must be 0 in a beam search"),
        ({"top_p": 0.9}, "top_p is 0.9, but must be 1"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"early_stopping": "always"}, "early_stopping is 'always', but must be True, False or \"never\""),
    ],
)
def test_what_a_search_has_no_use_for_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=re.escape(told)):
        BeamParams(**wrong)


def test_a_search_wants_its_own_params(llm: LLM) -> None:
    with pytest.raises(RequestError, match="must be BeamParams"):
        llm.beam_search([5], SamplingParams())  # type: ignore[arg-type]
