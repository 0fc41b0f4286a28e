"""Log-probabilities are the model's own, before temperature and filters."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from tiny_llm.sampling.logprobs import log_probabilities, top_logprobs

pytestmark = pytest.mark.chapter("1.7")


def test_log_probabilities_are_a_log_softmax() -> None:
    logits = [[0.0, math.log(3.0), -math.inf], [1000.0, 1000.0, 1000.0]]
    logp = log_probabilities(mx.array(logits))
    assert logp[0].tolist() == pytest.approx([math.log(0.25), math.log(0.75), -math.inf])
    assert logp[1].tolist() == pytest.approx([-math.log(3)] * 3), "large logits must not overflow"


def test_chosen_token_first_then_the_likeliest() -> None:
    logits = mx.array([0.0, 2.0, 1.0, -1.0])
    assert list(top_logprobs(logits, 3, 2)) == [3, 1, 2]
    assert list(top_logprobs(logits, 1, 2)) == [1, 2], "the chosen one is not reported twice"
    assert list(top_logprobs(logits, 2, 0)) == [2]
    assert list(top_logprobs(logits, 0, 99)) == [0, 1, 2, 3], "asking for more than there are gives all"


def test_values_agree_with_the_whole_row() -> None:
    logits = mx.random.normal((501,), key=mx.random.key(3)) * 3
    row = log_probabilities(logits[None])[0].tolist()
    reported = top_logprobs(logits, 7, 5)
    assert reported == {i: row[i] for i in reported}
    assert list(reported.values())[1:] == sorted(row, reverse=True)[:5]
