"""What llama.cpp and ik_llama.cpp share as sides of a benchmark: Q4_0 weights, the low-level API, one context
for each setting."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Config
from random_gguf import gguf_of

BATCH = 512


@dataclass
class Context:
    """One context of the library's, and how many tokens each of its sequences holds."""

    handle: Any
    length: int = 0


class Family(ABC):
    """A model with a context for each setting. ``lib`` has the C API's functions by their names."""

    lib: Any
    settings: Sequence[str]

    def __init__(self, shape: str, config: Config, threads: int, folder: str) -> None:
        self._threads, self._vocab_size = threads, int(str(config["vocab_size"]))
        self._contexts: dict[str, Context] = {}
        self._rows = 1
        self._tokens = np.random.default_rng(1).integers(0, self._vocab_size, 1 << 17)
        self._load(gguf_of(config, folder))

    @property
    @abstractmethod
    def about(self) -> dict[str, object]:
        """Version and bytes of the weights."""

    @abstractmethod
    def _load(self, path: Path) -> None:
        """Load the file's model."""

    @abstractmethod
    def _new(self, rows: int, room: int, setting: str) -> Any:
        """A context's handle."""

    @abstractmethod
    def _keep(self, handle: Any, length: int) -> bool:
        """Keep the first tokens of each sequence; False where that cannot be."""

    @abstractmethod
    def _copy(self, handle: Any, row: int) -> None:
        """Make a sequence what the first one is."""

    def open(self, rows: int, room: int) -> None:
        """Make the contexts anew."""
        for context in self._contexts.values():
            self.lib.llama_free(context.handle)
        self._rows = rows
        self._contexts = {setting: Context(self._new(rows, room, setting)) for setting in self.settings}
        self._batch = self.lib.llama_batch_init(BATCH, 0, 1)

    def prefill(self, setting: str, tokens: int) -> float:
        """All of the first sequence anew, in batches of ``BATCH``."""
        context = self._contexts[setting]
        self._cut(context, 0)
        began = time.perf_counter()
        self._extend(context, tokens)
        self._greedy(context, 1)
        return time.perf_counter() - began

    def decode(self, setting: str, context: int, steps: int) -> float:
        """One batch a step: a token of each sequence."""
        kept = self._contexts[setting]
        if kept.length < context or self._rows > 1:
            self._cut(kept, 0)
            self._extend(kept, context)
            for row in range(1, self._rows):
                self._copy(kept.handle, row)
        else:
            self._cut(kept, context)
        next_tokens = self._tokens[: self._rows]
        began = time.perf_counter()
        for _ in range(steps):
            self._run(kept, [(int(t), kept.length, row) for row, t in enumerate(next_tokens)], self._rows)
            next_tokens = self._greedy(kept, self._rows)
            kept.length += 1
        return time.perf_counter() - began

    def _cut(self, context: Context, length: int) -> None:
        assert self._keep(context.handle, length), "the cache would not be cut"
        context.length = length

    def _extend(self, context: Context, length: int) -> None:
        """Continue the first sequence to ``length`` tokens, with the last one's logits."""
        while context.length < length:
            end = min(context.length + BATCH, length)
            rows = [(int(self._tokens[i]), i, 0) for i in range(context.length, end)]
            self._run(context, rows, 1)
            context.length = end

    def _run(self, context: Context, rows: Sequence[tuple[int, int, int]], wanted: int) -> None:
        """Decode (token, position, sequence) rows; the last ``wanted`` of them get logits."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i >= len(rows) - wanted
        status = self.lib.llama_decode(context.handle, batch)
        assert status == 0, f"llama_decode returned {status}"

    def _greedy(self, context: Context, rows: int) -> np.ndarray:
        """The likeliest token of each of the last ``rows`` rows."""
        logits = self.lib.llama_get_logits_ith(context.handle, -rows)
        return np.ctypeslib.as_array(logits, (rows, self._vocab_size)).argmax(axis=-1)
