"""tiny_llm: an LLM serving runtime on MLX, small enough to read end to end.

from tiny_llm import LLM, SamplingParams
for completion in LLM("demo").generate(["What is a KV cache?"], SamplingParams(max_tokens=32)):
    print(completion.text)
"""

import os

if _learner := os.environ.get("TINY_LLM_COURSE"):  # a learner's definitions, before any module loads
    from tiny_llm.course.overlay import install as _install

    _install(_learner)

from tiny_llm.data import Chunk, Completion, SamplingParams
from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.conversation import Conversation
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import CapacityError, ConfigError, RequestError, TinyLLMError, WeightError

__all__ = [
    "LLM",
    "AsyncLLM",
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
