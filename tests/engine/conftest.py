"""The bundled model, loaded once for the engine's tests."""

from __future__ import annotations

import pytest

from tiny_llm.engine.llm import LLM


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM("demo")
