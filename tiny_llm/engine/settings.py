"""Owns what an operator may set about an engine, and how large a pool fits this machine."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from tiny_llm.config import ModelFacts
from tiny_llm.engine.memory import available_memory_bytes
from tiny_llm.errors import ConfigError
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.ops.kv_pool import KvFormat
from tiny_llm.scheduler.settings import SchedulerSettings

BLOCK_SIZE = 16
"""Tokens of a block, unless an operator says otherwise."""
BUFFER_POOL_BYTES = 2**29
"""What MLX may keep of buffers that it has freed, to be used again. Steps of many sizes fill it, whatever the
model: 0.54 GB, and 73 MB in use, after 40 prompts of the bundled one."""
KV_SLAB_BYTES = 2**26
"""The pool grows by this much at a time."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an operator may set. ``kv_blocks`` is the pool's limit in blocks of ``block_size`` tokens.

    ``async_scheduling``: where the next step is known but for its tokens, prepare it while this one runs.
    """

    kv_blocks: int
    block_size: int = BLOCK_SIZE
    slab_blocks: int = 256
    host_blocks: int = 0
    prefix_cache: bool = True
    async_scheduling: bool = True
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)

    @classmethod
    def fitting(
        cls,
        config: ModelFacts,
        kv_dtype: mx.Dtype,
        kv_memory: int | None = None,
        scheduler: SchedulerSettings | None = None,
    ) -> EngineSettings:
        """Settings for ``kv_memory`` bytes of keys and values; None: half of what the machine has free."""
        block = KvFormat.of(config, BLOCK_SIZE, kv_dtype).block_bytes
        memory = available_memory_bytes() // 2 if kv_memory is None else kv_memory
        if memory < block:
            raise ConfigError(
                f"kv_memory is {memory} bytes, but one block of {BLOCK_SIZE} tokens takes {block}."
            )
        return cls(
            kv_blocks=memory // block,
            slab_blocks=max(1, KV_SLAB_BYTES // block),
            scheduler=scheduler or SchedulerSettings(),
        )

    def block_manager(self) -> BlockManager:
        """The accounts of a pool as it is set here."""
        return BlockManager(
            self.block_size,
            self.kv_blocks,
            slab=self.slab_blocks,
            host_blocks=self.host_blocks,
            prefix_cache=self.prefix_cache,
        )
