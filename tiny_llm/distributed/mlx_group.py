"""A group by MLX's own collectives: a ring over TCP, or jaccl over Thunderbolt, started by ``mlx.launch``.

They are operations of a graph, without a time-out and without a number: each is made to depend on the one
before it, as two that are evaluated in another order on another rank would be mixed unseen.
"""

from __future__ import annotations

import faulthandler
from typing import Literal

import mlx.core as mx

from tiny_llm.errors import GroupError

_BEGIN_S = 60.0  # to connect, once all ranks are there; then the process ends
MlxBackend = Literal["ring", "jaccl"]


class MlxGroup:
    """The processes that ``mlx.launch`` started for ``backend``. Raises GroupError where it cannot begin."""

    def __init__(self, backend: MlxBackend) -> None:
        # It waits for its neighbours without an end, and no thread of ours runs meanwhile: this one is C's.
        faulthandler.dump_traceback_later(_BEGIN_S, exit=True)
        try:
            self._group = mx.distributed.init(strict=True, backend=backend)
        except (RuntimeError, ValueError) as error:
            raise GroupError(f"MLX's {backend} cannot begin: {error}") from None
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.rank: int = self._group.rank()
        self.size: int = self._group.size()
        self._last: mx.array | None = None

    def all_gather(self, x: mx.array) -> mx.array:
        """What all have, by rank: x [n, ...] to [size * n, ...], lazily. Of nothing, nothing is sent."""
        if not x.size:
            return mx.concatenate([x] * self.size)
        self._last = mx.distributed.all_gather(self._next(x), group=self._group)
        return self._last

    def send(self, x: mx.array, to: int) -> mx.array:
        """Give ``x`` to rank ``to``: it is on its way when what is returned is evaluated."""
        self._last = mx.distributed.send(self._next(x), to, group=self._group)
        return self._last

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype, source: int) -> mx.array:
        """What rank ``source`` sends. What came before is done by then: it depends on nothing."""
        if self._last is not None:
            mx.eval(self._last)
        self._last = mx.distributed.recv(shape, dtype, source, group=self._group)
        return self._last

    def abort(self, why: str) -> None:
        """Nothing ends a collective that waits: the process must leave."""

    def close(self) -> None:
        """MLX keeps its group until the process ends."""

    def _next(self, x: mx.array) -> mx.array:
        """``x``, to be used when the collective before is done."""
        if self._last is None:
            return x
        after: mx.array = mx.depends(x, self._last)
        return after
