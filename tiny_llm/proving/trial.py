"""Owns the trial of our kernels on this machine: a child process that tries them, and who keeps its time.

A kernel that does not compile, gives a wrong value, ends its process or does not end is not used; the child
is started again behind it. No error of the trial keeps a model from being served: MLX's kernels are there.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import msgspec

from tiny_llm.ops.backend import GPU_KERNELS
from tiny_llm.proving.cases import ops_of
from tiny_llm.proving.child import ChildLine, KernelJob
from tiny_llm.proving.choice import Kernels, all_on_mlx, check, choose
from tiny_llm.proving.record import Proof, Record, Shapes

Progress = Callable[[float, str], None]  # told which part of 1 is done, and what is being done
STARTING = "starting"
_REAPED_S = 1.0
_ORPHAN_S = 5.0  # beyond its time, after which a child ends by itself


@dataclass(frozen=True)
class Limits:
    """Seconds that a case may take, and all of them; what is not tried by then is MLX's for now."""

    case_s: float = 5.0
    total_s: float = 10.0

    @classmethod
    def of(cls, backend: str) -> Limits:
        """Those of a device; what simulates one is slow."""
        return cls(60.0, 600.0) if backend == "metalsim" else cls()


def kernels_for(
    backend: str,
    shapes: Shapes,
    asked: str | None = None,
    *,
    draft: Shapes | None = None,
    same_tokens: bool = False,
    progress: Progress | None = None,
) -> Kernels:
    """Which ops of a model of these ``shapes`` run on our kernels; tried now, if that is not known yet.

    ``asked`` is one of ``KERNELS``; None: "auto" on a GPU, and on "metalsim", which is for running our
    kernels, all of them untried. A ``draft`` model's shapes are tried too: an op runs on the same kernels in
    both. Raises ConfigError for a wish that cannot be granted.
    """
    check(backend, asked, same_tokens)
    if backend not in GPU_KERNELS or (backend == "metalsim" and asked is None):
        return Kernels(backend, same_tokens=backend != "mlx")
    if asked == "mlx":
        return all_on_mlx(backend)
    limits = Limits.of(backend)
    proofs = proved(backend, shapes, limits, progress)
    if draft is not None:
        for op, other in proved(backend, draft, limits, progress).items():
            proofs[op] = proofs.get(op, Proof(op)).joined(other, " of the draft model")
    return choose(backend, proofs, asked or "auto", same_tokens, dense=shapes.dense)


def proved(
    backend: str, shapes: Shapes, limits: Limits, progress: Progress | None = None
) -> dict[str, Proof]:
    """A proof of each op that such a model uses: as it is kept, or tried now and kept."""
    record = Record.of(backend, shapes)
    ops = ops_of(shapes)
    known = record.read()
    missing = tuple(op for op in ops if op not in known)
    if missing:
        right = tuple(op for op, proof in known.items() if not proof.wrong)
        job = KernelJob(backend, shapes, missing, backend == "metalsim", right)
        found = {proof.op: proof for proof in tried(job, limits, progress)}
        record.add(found.values())
        known |= found
    untried = f"not tried within {limits.total_s:g} s; it is at the next start"
    return {op: known.get(op, Proof(op, untried)) for op in ops}


def tried(job: KernelJob, limits: Limits, progress: Progress | None = None) -> Iterator[Proof]:
    """The proofs of a job's ops as they are made, within ``limits``; an op that was not reached has none."""
    end = time.monotonic() + limits.total_s
    left, right = list(job.ops), list(job.right)
    while left and time.monotonic() < end:
        try:
            seconds = end - time.monotonic() + _ORPHAN_S
            child = _Child(replace(job, ops=tuple(left), right=tuple(right), seconds=seconds))
        except OSError:  # no process can be started
            return
        try:
            for proof in _heard(child, left, len(job.ops), end, limits, progress):
                if not proof.wrong:
                    right.append(proof.op)
                yield proof
        except _Over:
            return
        finally:
            child.end()


class _Over(Exception):
    """The time for all is over, or the child does not even start."""


def _heard(
    child: _Child, left: list[str], total: int, end: float, limits: Limits, progress: Progress | None
) -> Iterator[Proof]:
    """Proofs as a child tells them, up to the op that it does not survive; each is taken off ``left``."""
    doing = STARTING
    while left:
        if progress is not None:
            progress(1 - len(left) / total, f"{left[0]}: {doing}")
        case_end = time.monotonic() + limits.case_s
        said = child.hear(min(end, case_end))
        if isinstance(said, ChildLine):
            if said.proof is None:
                doing = said.doing
                continue
            proof = said.proof
        elif doing == STARTING:
            raise _Over  # which says nothing of the op
        elif said is not None:
            proof = Proof(left[0], f"{doing}: {said}")
        elif time.monotonic() >= case_end:
            proof = Proof(left[0], f"{doing}: no answer within {limits.case_s:g} s")
        elif len(left) == total:  # it had all the time, and would have no more at the next start
            proof = Proof(left[0], f"{doing}: not done within {limits.total_s:g} s")
        else:
            raise _Over
        left.remove(proof.op)
        doing = "going on"
        yield proof
        if not isinstance(said, ChildLine):
            return


class _Child:
    """A process that tries a job's ops."""

    def __init__(self, job: KernelJob) -> None:
        place = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [place, os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            # -P: no module of the folder that we are called in.
            [sys.executable, "-P", "-m", "tiny_llm.proving.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # with all that it starts, it can be ended
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
        with suppress(BrokenPipeError):
            self._process.stdin.write(msgspec.json.encode(job).decode() + "\n")
            self._process.stdin.close()

    def _listen(self, lines: IO[str]) -> None:
        with lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def hear(self, until: float) -> ChildLine | str | None:
        """What it says next; or how it ended, in words; or None: nothing came until then."""
        try:
            line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return None
        try:
            return msgspec.json.decode(line or "", type=ChildLine)
        except ValueError:
            return self._ending()

    def _ending(self) -> str:
        """How it ended. A line that is none of ours is of a kernel that writes where it must not."""
        try:
            code = self._process.wait(_REAPED_S)
        except subprocess.TimeoutExpired:
            return "the process that tried it said what it should not"
        if code >= 0:
            return f"the process that tried it ended with exit code {code}"
        with suppress(ValueError):
            return f"the process that tried it was ended by {signal.Signals(-code).name}"
        return f"the process that tried it was ended by signal {-code}"

    def end(self) -> None:
        """End it, and what it has started. One that waits for a GPU may go later."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_REAPED_S)
