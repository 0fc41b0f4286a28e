"""llama.cpp as a side of a benchmark: flash attention on and off."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import llama_cpp
from llama_family import BATCH, Family
from protocol import serve

FLASH: Mapping[str, int] = {"flash": 1, "no flash": 0}


class LlamaCpp(Family):
    """By llama-cpp-python."""

    lib = llama_cpp
    settings: Sequence[str] = tuple(FLASH)

    @property
    def about(self) -> dict[str, object]:
        """Version and bytes of the weights."""
        size = llama_cpp.llama_model_size(self._model)
        return {"version": f"llama-cpp-python {llama_cpp.__version__}", "weight_bytes": size}

    def _load(self, path: Path) -> None:
        llama_cpp.llama_log_set(_silent, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, f"llama.cpp cannot load {path}"

    def _new(self, rows: int, room: int, setting: str) -> llama_cpp.llama_context_p:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = rows * room, rows
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = FLASH[setting]
        handle = llama_cpp.llama_init_from_model(self._model, params)
        assert handle, f"llama.cpp made no context for {rows} x {room} tokens"
        return handle

    def _keep(self, handle: llama_cpp.llama_context_p, length: int) -> bool:
        return bool(llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(handle), -1, length, -1))

    def _copy(self, handle: llama_cpp.llama_context_p, row: int) -> None:
        llama_cpp.llama_memory_seq_cp(llama_cpp.llama_get_memory(handle), 0, row, -1, -1)


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Say nothing."""


if __name__ == "__main__":
    serve(LlamaCpp)
