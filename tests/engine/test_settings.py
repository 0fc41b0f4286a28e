"""Every number of an engine's settings works, or is refused by an error that names it."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest

from tiny_llm import LLM, SamplingParams
from tiny_llm.engine.settings import EngineSettings, usual_block_size
from tiny_llm.errors import CapacityError, ConfigError


@pytest.mark.parametrize("name", ["kv_blocks", "block_size", "slab_blocks", "host_blocks"])
@pytest.mark.parametrize("value", [-1, 0, 1, 3, 1.5, 10**6, 10**9, 10**30, inf, nan, True, "2"], ids=repr)
def test_an_engine_works_with_any_number_that_it_takes(name: str, value: Any, llm: LLM) -> None:
    try:
        settings = EngineSettings(**{"kv_blocks": 64, name: value})
        (answer,) = llm.with_engine(settings).generate([[5] * 20], SamplingParams(max_tokens=3))
    except ConfigError as error:
        assert name in str(error) and "but must be" in str(error)
    except CapacityError as error:
        assert "needs" in str(error), "a pool that is too small for the request"
    else:
        assert answer.error is None, answer.error


def test_a_gpus_blocks_have_a_token_for_each_lane() -> None:
    assert [usual_block_size(name) for name in ("ref", "cpu", "mlx")] == [16] * 3
    assert [usual_block_size(name) for name in ("metal", "metalsim", "cuda")] == [32] * 3
