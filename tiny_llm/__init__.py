"""tiny_llm: an LLM serving runtime on MLX, small enough to read end to end.

from tiny_llm import LLM, SamplingParams
for completion in LLM("demo").generate(["What is a KV cache?"], SamplingParams(max_tokens=32)):
    print(completion.text)

A name is loaded when it is asked for: the scheduler's side of the house, the command line's help and the
calculators need no MLX, which takes most of the time that an import takes.
"""

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if _learner := os.environ.get("TINY_LLM_COURSE"):  # a learner's definitions, before any module loads
    try:
        from book.course.overlay import install as _install
    except ModuleNotFoundError as error:
        raise ImportError(
            "TINY_LLM_COURSE is set, but tiny_llm/ has no book/course/ beside it: it needs a checkout."
        ) from error
    _install(_learner)

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamParams",
    "CapacityError",
    "Chunk",
    "Completion",
    "ConfigError",
    "Conversation",
    "RequestError",
    "SamplingParams",
    "TinyLLMError",
    "WeightError",
]

if TYPE_CHECKING:
    from tiny_llm.chat.conversation import Conversation
    from tiny_llm.data import Chunk, Completion
    from tiny_llm.engine.async_llm import AsyncLLM
    from tiny_llm.engine.llm import LLM
    from tiny_llm.errors import CapacityError, ConfigError, RequestError, TinyLLMError, WeightError
    from tiny_llm.sampling_params import BeamParams, SamplingParams
    from tiny_llm.version import __version__ as __version__
else:
    _HOMES: Mapping[str, str] = {
        "LLM": "tiny_llm.engine.llm",
        "AsyncLLM": "tiny_llm.engine.async_llm",
        "Conversation": "tiny_llm.chat.conversation",
        **dict.fromkeys(["BeamParams", "SamplingParams"], "tiny_llm.sampling_params"),
        "__version__": "tiny_llm.version",
        "Chunk": "tiny_llm.data",
        "Completion": "tiny_llm.data",
        **dict.fromkeys(
            ["CapacityError", "ConfigError", "RequestError", "TinyLLMError", "WeightError"], "tiny_llm.errors"
        ),
    }

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
