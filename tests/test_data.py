"""The types that cross floors refuse what they cannot mean."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tiny_llm.errors import RequestError
from tiny_llm.sampling_params import SamplingParams


@pytest.mark.parametrize(
    "wrong",
    [
        {"stop": None},
        {"stop": 5},
        {"stop": [1]},
        {"stop": b"end"},
        {"stop": [""]},
        {"stop_token_ids": None},
        {"stop_token_ids": 5},
        {"stop_token_ids": "12"},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [2**31]},
        {"top_k": 2**63},
        {"min_tokens": 2**31},
        {"temperature": None},
        {"temperature": "1"},
        {"temperature": math.nan},
        {"temperature": 10**400},
        {"top_p": -math.inf},
        {"min_p": math.nan},
        {"max_tokens": True},
        {"seed": 1.0},
        {"logprobs": True},
    ],
    ids=str,
)
def test_a_parameter_of_the_wrong_kind_is_a_request_error(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(RequestError, match=rf"^{name} is .* but must be"):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_stops_may_come_in_any_collection() -> None:
    params = SamplingParams(stop="end", stop_token_ids={3})  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("end",), (3,))
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_a_bias_that_the_caller_changes_later_is_not_taken_over() -> None:
    own = {3: 1.0}
    params = SamplingParams(logit_bias=own)
    own[10**9] = 1.0
    assert params.logit_bias == {3: 1.0}


@pytest.mark.parametrize("zero", [0, 0.0])
def test_a_top_p_of_zero_is_greedy(zero: float) -> None:
    """OpenAI's API allows it; no token is as likely as none of the mass, so the likeliest is taken."""
    params = SamplingParams(temperature=1.5, top_p=zero, top_k=7)
    assert params.temperature == 0
    assert replace(params, max_tokens=5).temperature == 0
