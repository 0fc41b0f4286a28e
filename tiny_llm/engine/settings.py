"""Owns what an operator may set about an engine, and how large a pool fits this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

import mlx.core as mx

from tiny_llm.config import ModelFacts
from tiny_llm.engine.budget import KV_SLAB_BYTES, Share
from tiny_llm.errors import ConfigError
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.kv.disk import BlockStore
from tiny_llm.limits import check_whole
from tiny_llm.memory import available_memory_bytes, narrowest_limit
from tiny_llm.models.checkpoint import Checkpoint
from tiny_llm.models.footprint import activation_bytes, widest_window
from tiny_llm.models.registry import Model
from tiny_llm.ops.backend import GPU_KERNELS, active, isa
from tiny_llm.ops.kv_pool import KvFormat
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.version import __version__

Speculation = Literal["off", "ngram", "draft"]
BLOCK_SIZE = 16  # tokens of a block, unless an operator says otherwise
GPU_BLOCK_SIZE = 32
"""On a GPU: a lane scores a token of a block, and half of a smaller one's lanes would have none."""
BLOCK_SIZES = (16, 32, 64)  # what the kernels of attention can read
MAX_HOST_BLOCKS = 10**7  # each is listed from the start


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an operator may set. ``kv_blocks`` is the pool's limit in blocks of ``block_size`` tokens.

    ``async_scheduling``: where the next step is known but for its tokens, prepare it while this one runs.
    ``speculate``: check guesses of coming tokens, "ngram" what such tokens were followed by before, "draft"
    those of a draft model. None: "ngram", but "off" where how many are checked might change what is drawn.
    ``share``: the pool may grow beyond ``kv_blocks`` into what others leave; a request has these.
    """

    kv_blocks: int
    block_size: int = BLOCK_SIZE
    slab_blocks: int = 256
    host_blocks: int = 0
    prefix_cache: bool = True
    async_scheduling: bool = True
    speculate: Speculation | None = None
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    share: Share | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that cannot work."""
        check_whole("kv_blocks", self.kv_blocks)
        if self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise ConfigError(f"block_size is {self.block_size!r}, but must be one of {sizes}.")
        if self.speculate not in (None, *get_args(Speculation)):
            ways = ", ".join(map(repr, get_args(Speculation)))
            raise ConfigError(f"speculate is {self.speculate!r}, but must be one of {ways}.")
        check_whole("slab_blocks", self.slab_blocks)
        check_whole("host_blocks", self.host_blocks, least=0, most=MAX_HOST_BLOCKS)

    @classmethod
    def fitting(
        cls,
        config: ModelFacts,
        kv_dtype: mx.Dtype,
        kv_memory: int | Share | None = None,
        scheduler: SchedulerSettings | None = None,
        *,
        swap_memory: int = 0,
        speculate: Speculation | None = None,
        draft: ModelFacts | None = None,
        max_context: int | None = None,
    ) -> EngineSettings:
        """Settings for ``kv_memory`` bytes of keys and values, those of a ``draft`` model included.

        None: half of the memory that can be had now. A share: its part of a budget, and what others leave.

        Those of sequences that had to make room may take ``swap_memory`` bytes more.
        A step has no more tokens than a quarter of it holds the intermediate results of, what attention
        gathers for contexts of up to ``max_context`` tokens included; None: as many as the model can have.

        Raises ConfigError if that is not enough for a block, or more than there can ever be: an amount that
        was mistyped shows here, and not in requests that fail when memory has run out.
        """
        models = [config] if draft is None else [config, draft]
        size = usual_block_size(active())
        formats = [KvFormat.of(one, size, kv_dtype) for one in models]
        block = sum(format.block_bytes for format in formats)
        available = available_memory_bytes()
        share, slab_bytes = None, KV_SLAB_BYTES
        if isinstance(kv_memory, Share):
            share, slab_bytes, kv_memory = kv_memory, kv_memory.budget.slab_bytes, kv_memory.budget.part
        memory = available // 2 if kv_memory is None else kv_memory
        if memory < block:
            what = "half of the memory that is left" if kv_memory is None else "kv_memory"
            raise ConfigError(f"{what} is {memory} bytes, but one block of {size} tokens takes {block}.")
        if 0 < swap_memory < block:
            raise ConfigError(
                f"swap_memory is {swap_memory} bytes, but one block of {size} tokens takes {block}."
            )
        limit = narrowest_limit()
        if memory + swap_memory > limit.most:
            names = "kv_memory and swap_memory are" if swap_memory else "kv_memory is"
            raise ConfigError(
                f"{names} {memory + swap_memory:,} bytes, but {limit.name} allows {limit.most:,} in all; "
                "give less."
            )
        longest = min(max_context or config.max_position_embeddings, memory // block * size)
        step = partial(activation_bytes, config, gathered=formats[0].gathered_bytes(longest))
        slab, most = max(1, slab_bytes // block), memory // block
        return cls(
            kv_blocks=most - most % slab if share else most,
            block_size=size,
            host_blocks=swap_memory // block,
            slab_blocks=slab,
            speculate=speculate,
            scheduler=_with_steps_within(available // 4, step, scheduler or SchedulerSettings()),
            share=share,
        )

    def block_manager(self, store: BlockStore | None = None, *models: Model) -> BlockManager:
        """The accounts of a pool as it is set here, which ``models`` share.

        With a draft model all blocks stay: it goes back to what it has missed, which the large one has left.
        """
        return BlockManager(
            self.block_size,
            self.kv_blocks,
            slab=self.slab_blocks,
            host_blocks=self.host_blocks,
            prefix_cache=self.prefix_cache,
            store=store,
            window=widest_window(models[0].config) if len(models) == 1 else 0,
        )


def usual_block_size(backend: str) -> int:
    """Tokens of a block, where nobody says otherwise."""
    return GPU_BLOCK_SIZE if backend in GPU_KERNELS else BLOCK_SIZE


def _with_steps_within(
    memory: int, step_bytes: Callable[[int, int], int], scheduler: SchedulerSettings
) -> SchedulerSettings:
    """Fewer tokens a step, where the largest step would take more; each running sequence still gets one."""
    tokens, least = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
    while tokens > least and step_bytes(tokens, least) > memory:
        tokens = max(tokens // 2, least)
    return replace(scheduler, max_num_batched_tokens=tokens)


def open_store(
    folder: str | Path | None, size: int, model: Checkpoint, how: tuple[object, ...]
) -> tuple[Callable[[], bytes], BlockStore | None]:
    """The fingerprint of keys and values of ``model``, computed so and by this version: none else's will do.

    It is to be called, which reads all weights. And where they go that leave the pool: perhaps nowhere.
    """

    def fingerprint() -> bytes:
        return sha256(model.digest() + repr((__version__, isa(), *how)).encode()).digest()

    return fingerprint, None if folder is None else BlockStore(Path(folder), size, fingerprint())


def context_limit(asked: int | None, most: int) -> int:
    """Tokens that prompt and answer may have, of the ``most`` that the model knows. Raises ConfigError."""
    if asked is None:
        return most
    if not isinstance(asked, int) or not 2 <= asked <= most:
        raise ConfigError(
            f"max_context (--max-model-len) is {asked!r}, but must be from 2 to {most}, the model's own."
        )
    return asked
