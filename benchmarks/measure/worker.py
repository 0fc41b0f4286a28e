"""A side of a benchmark from outside: its process, and one method a request of workers/protocol.py."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).resolve().parents[1] / "workers"


class WorkerError(RuntimeError):
    """A side could not do what it was asked; the message says why, in its own words."""


class Worker:
    """One engine in a process of its own, with its weights, until ``close``.

    ``command`` starts it: a Python and a file of workers/. ``about`` and ``settings`` are known once loaded.
    """

    def __init__(self, name: str, command: Sequence[str | Path], threads: int) -> None:
        self.name, self.threads = name, threads
        self.settings: tuple[str, ...] = ()
        self.about: Mapping[str, Any] = {}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close
        # The engines' own thread pools must not be larger than what is compared, whatever the machine.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TINY_LLM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [*map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def load(self, shape: str, config: Mapping[str, object], folder: Path) -> None:
        """Make random weights of a short name's ``config``; ``folder`` is where they may be kept."""
        facts = {"shape": shape, "config": dict(config)}
        answer = self._ask("load", **facts, threads=self.threads, folder=str(folder))
        self.settings = tuple(answer.pop("settings"))
        self.about = answer

    def open(self, rows: int, room: int) -> None:
        """Make caches for ``rows`` sequences of ``room`` tokens."""
        self._ask("open", rows=rows, room=room)

    def figures(self) -> Mapping[str, float]:
        """What the engine says of what it did last, perhaps nothing."""
        return self._ask("figures")

    def prefill(self, setting: str, tokens: int) -> float:
        """Seconds for a prompt of ``tokens``."""
        return float(self._ask("prefill", setting=setting, tokens=tokens)["seconds"])

    def decode(self, setting: str, context: int, steps: int) -> float:
        """Seconds for ``steps`` tokens a sequence, after ``context`` tokens."""
        return float(self._ask("decode", setting=setting, context=context, steps=steps)["seconds"])

    def streams(self, setting: str, rows: int, context: int, steps: int) -> float:
        """Seconds for ``rows`` prompts of ``context`` tokens at once, and ``steps`` tokens after each."""
        return float(
            self._ask("streams", setting=setting, rows=rows, context=context, steps=steps)["seconds"]
        )

    def answer(self, setting: str, prompt: Sequence[int], tokens: int) -> Mapping[str, Any]:
        """The greedy ``answer`` to a prompt; ``seconds`` and ``steps`` from its first token to its last."""
        return self._ask("answer", setting=setting, prompt=list(prompt), tokens=tokens)

    def _ask(self, do: str, **arguments: object) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise WorkerError(f"{self.name} ended ({status}) when asked to {do}: {self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name} failed to {do}: {answer['error']}")
        return answer

    def _tail(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
