"""Owns how keys and values lie in memory: the arrays of a layer, cut into blocks of tokens. Chapter 3.1.

A pool is a layer's arrays, as many as its format has; the first axis of each is the block. They are made,
grown and copied here. What is in them only attention knows, and whose a block is only the block manager.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import mlx.core as mx

from tiny_llm.config import ModelFacts
from tiny_llm.memory import forget_end
from tiny_llm.ops.backend import active, cpu, on_mlx, runs_ours

GATHER_BYTES = 2**26
"""The most that a call of MLX's attention gathers; a sequence alone may take more, as it cannot be cut."""

Pool = tuple[mx.array, ...]
"""One layer's arrays, in the order of ``KvFormat.arrays``: each [N, ...], N blocks.

Where a kernel writes them as they lie, one more comes last: what their last reader gave, and who would write
them waits for. Everybody else asks for ``settled``.
"""


class KvArray(NamedTuple):
    """One of a layer's arrays: what it holds, the ``shape`` of a block in it, and what that is stored in."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in it."""
        return prod(self.shape) * self.dtype.size


def is_token_major() -> bool:
    """Whether a pool is laid out for MLX's attention, which is then the one to read it.

    It takes a sequence's tokens one after the other, whole; our kernels score a block's tokens side by side.
    """
    return on_mlx() and not runs_ours("paged_attention")


def may_run_ahead(device: mx.DeviceType) -> bool:
    """Whether a step may be launched while the one before it runs on ``device``, without a second pool.

    A GPU holds what its commands read until they are done, and MLX's scatter writes nothing in place that
    is held: it would copy each layer's pool. Our own kernel does.
    """
    return device == mx.cpu or (runs_ours("kv_write") and runs_ours("paged_attention"))


@dataclass(frozen=True, slots=True)
class KvFormat:
    """Keys and values of a model: ``heads`` K vectors of ``head_dim`` D of each, a token and layer.

    They lie in blocks of ``block_size`` S tokens, and are stored in ``dtype``. Of int8 each vector has a
    float16 scale beside it: half of what float32 would take, and what it rounds off is far below a step of
    the integers, which are found after it is rounded. ``token_major`` is as the backend in use, where this
    is made, wants it.
    """

    num_layers: int
    heads: int
    head_dim: int
    block_size: int
    dtype: mx.Dtype
    token_major: bool = field(default_factory=is_token_major)

    @classmethod
    def of(cls, config: ModelFacts, block_size: int, dtype: mx.Dtype) -> KvFormat:
        """The format of a model's keys and values."""
        major = dtype != mx.int8 and is_token_major()
        return cls(config.num_layers, config.num_kv_heads, config.head_dim, block_size, dtype, major)

    @property
    def arrays(self) -> tuple[KvArray, ...]:
        """What each layer has. A block's S keys lie side by side for each d, to be scored all at once.

        ``token_major`` has both as [S, K, D]: consecutive blocks are then consecutive tokens.
        """
        if self.token_major:
            shape = (self.block_size, self.heads, self.head_dim)
            return KvArray("keys", shape, self.dtype), KvArray("values", shape, self.dtype)
        keys = KvArray("keys", (self.heads, self.head_dim, self.block_size), self.dtype)
        values = KvArray("values", (self.heads, self.block_size, self.head_dim), self.dtype)
        if self.dtype != mx.int8:
            return keys, values
        scales = (self.heads, self.block_size)
        return (
            *(keys, values),
            *(KvArray(f"{name} scales", scales, mx.float16) for name in ("keys", "values")),
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of a block over all layers."""
        return self.num_layers * sum(array.block_bytes for array in self.arrays)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's place in a block, over all layers: ``footprint.kv_token_bytes``, and scales."""
        return self.block_bytes // self.block_size

    @property
    def scale_bytes(self) -> int:
        """Of these, what scales take."""
        scales = sum(array.block_bytes for array in self.arrays[2:])
        return self.num_layers * scales // self.block_size

    def gathered_bytes(self, longest: int) -> int:
        """The most bytes that attention gathers at once, for contexts of up to ``longest`` tokens."""
        each = longest * self.token_bytes // self.num_layers
        return max(GATHER_BYTES, each) if self.token_major else 0

    def empty_pool(self, blocks: int, max_blocks: int) -> Pool:
        """A layer's arrays with ``blocks`` blocks, all 0.

        Backend "cpu" maps ``max_blocks`` at once: memory that was never written to costs nothing there.
        """
        if active() == "cpu":
            return tuple(cpu.untouched_zeros((max_blocks, *shape), dtype) for _, shape, dtype in self.arrays)
        return tuple(mx.zeros((blocks, *shape), dtype) for _, shape, dtype in self.arrays)


def num_blocks(pool: Pool) -> int:
    """Blocks that a pool has."""
    return pool[0].shape[0]


def parted(pool: Pool) -> tuple[Pool, Pool]:
    """The arrays alone; and where a kernel writes them as they lie, what their last reader gave."""
    return (pool, ()) if pool[-1].ndim else (pool[:-1], pool[-1:])


def settled(pool: Pool) -> Pool:
    """The arrays alone; where a kernel writes them as they lie, done is all that was to read or write."""
    arrays, last = parted(pool)
    if last:
        mx.eval(*pool)
    return arrays


def resize_pool(pool: Pool, blocks: int) -> Pool:
    """The same pool with more blocks; the new ones are 0."""
    more = blocks - num_blocks(pool)
    grown = tuple(
        mx.concatenate([array, mx.zeros((more, *array.shape[1:]), array.dtype)]) for array in settled(pool)
    )
    mx.eval(*grown)  # a layer at a time, so that only one is in memory twice
    return grown


def cut_pool(pool: Pool, blocks: int) -> bool:
    """Let go of what lies behind the first ``blocks`` blocks, where that can be; all is to be evaluated."""
    ends = [(array, blocks * array.nbytes // array.shape[0]) for array in settled(pool)]
    return active() == "cpu" and all(forget_end(array, end) for array, end in ends)


def copy_blocks(source: Pool, target: Pool, pairs: mx.array) -> Pool:
    """``target`` with ``source``'s blocks ``pairs[:, 0]`` in its blocks ``pairs[:, 1]``; perhaps in place.

    On backend "cpu" it is to be evaluated before anything else is told to write ``source``.
    """
    if active() == "cpu":
        return tuple(cpu.copy_blocks(old, new, pairs) for old, new in zip(source, target, strict=True))
    source, target = settled(source), settled(target)
    for old, new in zip(source, target, strict=True):
        blocks = old[pairs[:, 0]]
        mx.eval(blocks)  # whoever has yet to read a pool keeps it from being written where it lies
        new[pairs[:, 1]] = blocks
        mx.eval(new)
    return target
