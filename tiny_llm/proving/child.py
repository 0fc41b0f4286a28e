"""``python -m tiny_llm.proving.child``: tries ops' kernels in a process that may crash or hang.

Owns the way from a job, JSON on stdin, to lines of JSON on stdout: what it is about to do, and a proof as
each op is done. Whoever started it keeps the time.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median

import mlx.core as mx
import msgspec

from tiny_llm.ops.backend import active, use
from tiny_llm.proving.cases import Check, Sizes, TimedCall, cases
from tiny_llm.proving.choice import NEEDS
from tiny_llm.proving.record import KernelTiming, Proof, Shapes

TURNS, SLOW_TURNS = 5, 3
CHAIN = 100  # calls of one evaluation, at most
CHAIN_S = 0.02  # that such a chain takes, about; what takes longer gets fewer turns


@dataclass(frozen=True)
class KernelJob:
    """What to try: ``ops`` on ``backend``; ``small`` for what is simulated.

    The process ends after ``seconds``, whoever still waits for it: who started it may be gone.
    ``right`` are ops that are known to be right: those that ``NEEDS`` an op are ours when it is tried.
    """

    backend: str
    shapes: Shapes
    ops: tuple[str, ...]
    small: bool
    right: tuple[str, ...] = ()
    seconds: float = 600.0


class ChildLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a child's: what it is ``doing`` now, or the ``proof`` of an op that is done."""

    doing: str = ""
    proof: Proof | None = None


def main() -> None:
    """Try each op of the job."""
    job = msgspec.json.decode(sys.stdin.readline(), type=KernelJob)
    signal.setitimer(signal.ITIMER_REAL, job.seconds)  # no handler: it ends a kernel that hangs, too
    sizes = Sizes.small() if job.small else Sizes()
    right = set(job.right)
    for op in job.ops:
        with_it = {one for one, needed in NEEDS.items() if needed == op}
        with use(job.backend, frozenset({op} | with_it & right)):
            proof = prove(op, job.shapes, sizes, lambda what: _say(ChildLine(what)))
        if not proof.wrong:
            right.add(op)
        _say(ChildLine(proof=proof))


def _say(what: ChildLine) -> None:
    print(msgspec.json.encode(what).decode(), flush=True)


def prove(op: str, shapes: Shapes, sizes: Sizes, doing: Callable[[str], None]) -> Proof:
    """Try ``op``; ``doing`` is told what comes next. What is wrong is in the proof, and nothing is raised."""
    timings: list[KernelTiming] = []
    what = "making inputs"
    doing(what)
    try:
        for case in cases(op, shapes, sizes):
            what = case.name if isinstance(case, Check) else f"timing {case.shape}"
            doing(what)
            if isinstance(case, TimedCall):
                timings.append(timing(case))
            elif wrong := difference(case):
                return Proof(op, f"{what}: {wrong}")
    except Exception as error:  # a kernel's text may be wrong in any way
        return Proof(op, f"{what}: {_first_line(error)}")
    return Proof(op, "", tuple(timings))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def difference(case: Check) -> str:
    """What is wrong with what a check gets; empty if nothing is."""
    for got, expected in zip(case.got(), case.expected(), strict=True):
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            return f"got {got.dtype} {got.shape}, expected {expected.dtype} {expected.shape}"
        if not case.tolerance:
            if not mx.array_equal(got, expected).item():
                return "other bits" if mx.issubdtype(got.dtype, mx.floating) else "another token"
            continue
        largest = mx.max(mx.abs(expected.astype(mx.float32)))
        off = mx.abs(got.astype(mx.float32) - expected.astype(mx.float32)) / mx.maximum(largest, 1e-9)
        if not mx.all(off <= case.tolerance).item():  # a NaN is not
            return f"off by {mx.max(off).item():.2g} of the largest value, allowed {case.tolerance:g}"
    return ""


def timing(case: TimedCall) -> KernelTiming:
    """Ours and MLX's in turns, so that a machine that slows down does so for both; medians."""
    chains = [_Chain(case, nullcontext), _Chain(case, partial(use, active(), frozenset()))]
    seconds: list[list[float]] = [[], []]
    for _ in range(SLOW_TURNS if any(chain.is_slow for chain in chains) else TURNS):
        for chain, spent in zip(chains, seconds, strict=True):
            spent.append(chain.seconds())
    ours_us, mlx_us = (1e6 * median(spent) for spent in seconds)
    return KernelTiming(case.shape, ours_us, mlx_us)


class _Chain:
    """Calls of which each needs the one before, as many in an evaluation as take about ``CHAIN_S``.

    The first ones compile and are not counted. What a call costs the host is in the time.
    """

    def __init__(self, case: TimedCall, side: Callable[[], AbstractContextManager[object]]) -> None:
        self._case, self._side = case, side
        with self._side():
            self._state = case.make()
            mx.eval(*self._state)
        self._calls, self._number = 1, 0
        self.seconds()  # compiles
        call_s = self.seconds()
        self._calls = max(1, min(CHAIN, int(CHAIN_S / call_s)))
        self.is_slow = call_s > CHAIN_S

    def seconds(self) -> float:
        """Of a call."""
        with self._side():
            began = time.perf_counter()
            state = self._state
            for _ in range(self._calls):
                state = self._case.step(state, self._number)
                self._number += 1
            mx.eval(*state)
            return (time.perf_counter() - began) / self._calls


if __name__ == "__main__":
    main()
