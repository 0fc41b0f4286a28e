"""Our own agent on our own server: its actions keep to the schema that it asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tiny_llm.agent.action import Actions
from tiny_llm.agent.calculator import calculator
from tiny_llm.agent.history import RunHistory
from tiny_llm.agent.model import ServerModel
from tiny_llm.errors import ConfigError
from tiny_llm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tests.server.conftest import Running

WILD = SamplingParams(max_tokens=120, temperature=2.0)


@pytest.mark.slow
def test_actions_by_the_server_are_valid_or_cut(running: Running) -> None:
    actions = Actions([calculator()])
    model = ServerModel(f"{running.url}/v1", "demo", "none", actions, WILD, 800)
    read = 0
    for _ in range(4):
        made = model.propose(RunHistory("What is 12 * 7?"), 600)
        assert 0 < made.tokens <= 120 and made.prompt_tokens > 0
        if made.fault:
            assert "cut at --max-tokens" in made.fault
        elif made.action is not None:
            actions.find(made.action)  # raises for one that is none
        read += made.cached_tokens
    assert read, "the prompt is found again"
    running.wait_until_idle()


def test_what_the_server_refuses_is_told(running: Running) -> None:
    model = ServerModel(f"{running.url}/v1", "other", "none", Actions([]), WILD, 800)
    with pytest.raises(ConfigError, match=r"refused: 404 .*other"):
        model.propose(RunHistory("?"), 60)
