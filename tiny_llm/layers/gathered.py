"""Maps of which each rank of a group has some outputs, and how those of all become one array again.

No sum is cut: a rank's outputs are sums over all inputs, as a lone process would make them, and only their
bits travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import mlx.core as mx

from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.distributed.group import ALONE, Group
from tiny_llm.layers.linear import Linear
from tiny_llm.ops.linear import linear


def share_of(count: int, rank: int, size: int) -> range:
    """Which of ``count`` outputs a rank of ``size`` has: the same number each, and what is left the last."""
    each = -(-count // size)
    return range(min(rank * each, count), min((rank + 1) * each, count))


def gathered(x: mx.array, group: Group, width: int) -> mx.array:
    """Return [T, width] of what all ranks have of it: x [T, W], as ``share_of`` says."""
    if group.size == 1:
        return x
    T, each = x.shape[0], -(-width // group.size)
    if x.shape[1] < each:  # who gathers wants as much of each
        x = mx.pad(x, [(0, 0), (0, each - x.shape[1])])
    parts = group.all_gather(x).reshape(group.size, T, each)
    return parts.swapaxes(0, 1).reshape(T, group.size * each)[:, :width]


def columns(matrix: Matrix) -> int:
    """How many inputs a matrix [out, in], or each of a stack, has."""
    if isinstance(matrix, QuantizedTensor):
        return matrix.scales.shape[-1] * matrix.group_size
    return matrix.shape[-1]


@dataclass(frozen=True, slots=True)
class GatheredLinear(Linear):
    """A Linear to ``outputs`` O, of which this rank has some: x [T, I], or what it has of that, to [T, O]."""

    group: Group = ALONE
    outputs: int = 0

    def __call__(self, x: mx.array) -> mx.array:
        x, inputs = x.reshape(x.shape[0], prod(x.shape[1:])), columns(self.weight)
        whole = gathered(x, self.group, inputs) if x.shape[1] < inputs else x
        return gathered(linear(whole, self.weight, self.bias), self.group, self.outputs)


def gathering(own: Linear, group: Group, outputs: int) -> Linear:
    """A map that gives all its ``outputs``, of which this rank has its own."""
    return own if group.size == 1 else GatheredLinear(own.weight, own.bias, group, outputs)
