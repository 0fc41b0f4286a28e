"""Who is compared: our own engine and the peers named by ``--against``, started and loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from measure.environments import PEERS, PeerMissing, default_folder, python_of
from measure.worker import WORKERS, Worker, WorkerError
from tiny_llm.weights.names import config_of

OURS = "tiny_llm"


def numbers(text: str) -> tuple[int, ...]:
    """Read "1,2,4" as whole numbers of at least 1, for argparse."""
    found = tuple(int(word) for word in text.split(","))
    if not all(number >= 1 for number in found):
        raise ValueError(text)
    return found


def parser(about: str, *, context: int, rounds: int) -> argparse.ArgumentParser:
    """The options that all comparisons share."""
    made = argparse.ArgumentParser(description=about.splitlines()[0])
    made.add_argument("--against", default=",".join(PEERS), help="peers, with commas between; '' for none")
    made.add_argument("--peers-only", action="store_true", help="leave our own engine out")
    made.add_argument("--shape", default="qwen2-0.5b", help="short name of a model, whose shapes to use")
    made.add_argument("--layers", type=int, help="so many of the model's layers, where memory is short")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--context", type=numbers, default=(context,), help="tokens, with commas between")
    made.add_argument("--folder", type=Path, default=default_folder(), help="where peers.py put the peers")
    return made


@dataclass
class Sides:
    """The workers that are ready, ours first if it is, and the reason for each that is missing."""

    threads: int
    ready: list[Worker] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def pids(self) -> list[int]:
        """Of the ready ones' processes."""
        return [worker.pid for worker in self.ready]

    def open(self, rows: int, room: int) -> None:
        """Make caches in every worker; one that cannot is missing from here on."""
        for worker in list(self.ready):
            try:
                worker.open(rows, room)
            except WorkerError as error:
                self.lose(worker.name, error)

    def lose(self, name: str, reason: Exception) -> None:
        """Go on without a side, and say so."""
        self.missing[name] = str(reason)
        self.ready = [worker for worker in self.ready if worker.name != name]
        print(f"{name} is missing: {reason}", file=sys.stderr)


@contextmanager
def start(options: argparse.Namespace) -> Iterator[Sides]:
    """Start ours and the peers of ``options`` and load their weights; end them with the block."""
    names = [*([] if options.peers_only else [OURS]), *filter(None, options.against.split(","))]
    with ExitStack() as stack:
        sides = Sides(options.threads)
        for name in names:
            try:
                worker = Worker(name, _command(name, options.folder), options.threads)
                stack.enter_context(closing(worker))
                worker.load(options.shape, _config(options), options.folder / "models")
                sides.ready.append(worker)
            except (PeerMissing, WorkerError) as error:
                sides.lose(name, error)
        yield sides


def _config(options: argparse.Namespace) -> dict[str, object]:
    config = config_of(options.shape)
    return config if options.layers is None else config | {"num_hidden_layers": options.layers}


def is_slow(name: str) -> bool:
    """Whether to ask this side for a few tokens only, once: here, without a GPU."""
    return name in PEERS and PEERS[name].slow and mx.default_device().type == mx.cpu


def _command(name: str, folder: Path) -> list[str | Path]:
    if name == OURS:
        return [sys.executable, WORKERS / "ours.py"]
    return [python_of(name, folder), WORKERS / PEERS[name].worker]
