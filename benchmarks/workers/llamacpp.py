"""llama.cpp as a side of a benchmark: Q4_0 weights, its low-level API, flash attention on and off."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import llama_cpp
import numpy as np
from protocol import Config, serve
from random_gguf import gguf_of

BATCH = 512
FLASH: Mapping[str, int] = {"flash": 1, "no flash": 0}


@dataclass
class Context:
    """One llama.cpp context, and how many tokens each of its sequences holds."""

    handle: llama_cpp.llama_context_p
    length: int = 0

    def cut(self, length: int) -> None:
        """Keep the first ``length`` tokens of each sequence."""
        memory = llama_cpp.llama_get_memory(self.handle)
        assert llama_cpp.llama_memory_seq_rm(memory, -1, length, -1), "the cache would not be cut"
        self.length = length


class LlamaCpp:
    """A model with a context for each setting."""

    settings: Sequence[str] = tuple(FLASH)

    def __init__(self, shape: str, config: Config, threads: int, folder: str) -> None:
        llama_cpp.llama_log_set(_silent, None)
        llama_cpp.llama_backend_init()
        path = gguf_of(config, folder)
        params = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert model, f"llama.cpp cannot load {path}"
        self._model, self._threads = model, threads
        self._vocab_size = int(str(config["vocab_size"]))
        self._contexts: dict[str, Context] = {}
        self._rows = 1
        self._tokens = np.random.default_rng(1).integers(0, self._vocab_size, 1 << 17)
        self.about = {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "weight_bytes": llama_cpp.llama_model_size(model),
        }

    def open(self, rows: int, room: int) -> None:
        """Make both contexts anew."""
        for context in self._contexts.values():
            llama_cpp.llama_free(context.handle)
        self._rows = rows
        self._contexts = {setting: Context(self._new(rows, room, flash)) for setting, flash in FLASH.items()}
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def _new(self, rows: int, room: int, flash: int) -> llama_cpp.llama_context_p:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = rows * room, rows
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = flash
        handle = llama_cpp.llama_init_from_model(self._model, params)
        assert handle, f"llama.cpp made no context for {rows} x {room} tokens"
        return handle

    def prefill(self, setting: str, tokens: int) -> float:
        """All of the first sequence anew, in batches of ``BATCH``."""
        context = self._contexts[setting]
        context.cut(0)
        began = time.perf_counter()
        self._extend(context, tokens)
        self._greedy(context, 1)
        return time.perf_counter() - began

    def decode(self, setting: str, context: int, steps: int) -> float:
        """One batch a step: a token of each sequence."""
        kept = self._contexts[setting]
        if kept.length < context or self._rows > 1:
            kept.cut(0)
            self._extend(kept, context)
            memory = llama_cpp.llama_get_memory(kept.handle)
            for row in range(1, self._rows):
                llama_cpp.llama_memory_seq_cp(memory, 0, row, -1, -1)
        else:
            kept.cut(context)
        next_tokens = self._tokens[: self._rows]
        began = time.perf_counter()
        for _ in range(steps):
            self._run(kept, [(int(t), kept.length, row) for row, t in enumerate(next_tokens)], self._rows)
            next_tokens = self._greedy(kept, self._rows)
            kept.length += 1
        return time.perf_counter() - began

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
        status = llama_cpp.llama_decode(context.handle, batch)
        assert status == 0, f"llama_decode returned {status}"

    def _greedy(self, context: Context, rows: int) -> np.ndarray:
        """The likeliest token of each of the last ``rows`` rows."""
        logits = llama_cpp.llama_get_logits(context.handle)
        return np.ctypeslib.as_array(logits, (rows, self._vocab_size)).argmax(axis=-1)


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Say nothing."""


if __name__ == "__main__":
    serve(LlamaCpp)
