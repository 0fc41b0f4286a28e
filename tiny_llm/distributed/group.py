"""What a model asks of the processes that it is split over. Owns no way in which bytes travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx


class Group(Protocol):
    """``size`` processes, of which this is number ``rank``. All call the same, in the same order."""

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def all_gather(self, x: mx.array) -> mx.array:
        """What all have, by rank: x [n, ...], of one shape and dtype on each, to [size * n, ...]."""

    def send(self, x: mx.array, to: int) -> mx.array:
        """Give ``x`` to rank ``to``; what is returned is done when it is on its way."""

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype, source: int) -> mx.array:
        """What rank ``source`` sends."""


@dataclass(frozen=True, slots=True)
class Alone:
    """A group of one."""

    rank: int = 0
    size: int = 1

    def all_gather(self, x: mx.array) -> mx.array:
        """``x`` itself."""
        return x

    def send(self, x: mx.array, to: int) -> mx.array:
        """Nobody is there."""
        raise AssertionError(f"rank {to} of a group of one")

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype, source: int) -> mx.array:
        """Nobody is there."""
        raise AssertionError(f"rank {source} of a group of one")


ALONE = Alone()
