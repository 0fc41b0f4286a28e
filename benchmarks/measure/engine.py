"""An engine around a model with random weights, and a tokenizer that makes text of whatever it says."""

from __future__ import annotations

import os
from pathlib import Path

from tiny_llm.engine.engine import Engine
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.models.loading import kv_dtype
from tiny_llm.models.registry import Model
from tiny_llm.ops.backend import active
from tiny_llm.proving.choice import Kernels
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.tokenizer.tokenizer import Tokenizer
from tiny_llm.weights.hub import resolve

BITS, BLOCKS = 4, 8192


def data_folder() -> Path:
    """Where real data lies, if it does: $TINY_LLM_DATA, else ../shared/data."""
    return Path(os.environ.get("TINY_LLM_DATA", "../shared/data"))


def engine_of(
    model: Model, scheduler: SchedulerSettings | None = None, *, prefix_cache: bool = True
) -> Engine:
    """An engine for the backend in use; Qwen2's tokenizer if it is there, else the bundled model's."""
    config = model.config
    kept = kv_dtype(config, dtype=None, quantize=BITS)
    tokenizer = data_folder() / "tokenizers" / "qwen2"
    return Engine(
        model,
        Tokenizer.from_folder(tokenizer if tokenizer.is_dir() else resolve("demo")),
        EngineSettings(
            kv_blocks=BLOCKS,
            prefix_cache=prefix_cache,
            speculate="off",  # random weights repeat themselves, which is easily guessed
            scheduler=scheduler or SchedulerSettings(),
        ),
        kernels=Kernels(active()),
        kv_dtype=kept,
        end_ids=(),
        max_context=config.max_position_embeddings,
    )
