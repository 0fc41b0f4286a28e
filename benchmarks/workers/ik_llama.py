"""ik_llama.cpp as a side of a benchmark: weights as they are stored, and repacked for rows side by side.

Flash attention is off, as its binding has it where the processor lacks AVX-VNNI; "flash" is with it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from ik_llama_cpp import _ctypes_api as api
from llama_family import BATCH, Family
from protocol import serve

POINTER, INT = ctypes.c_void_p, ctypes.c_int32


class Way(NamedTuple):
    """How a setting runs."""

    repacked: bool
    flash: bool


WAYS: Mapping[str, Way] = {
    "stored": Way(repacked=False, flash=False),
    "repacked": Way(repacked=True, flash=False),
    "repacked, flash": Way(repacked=True, flash=True),
}


class IkLlama(Family):
    """By ik-llama-cpp-python, and a few functions that it does not name."""

    lib = api
    settings: Sequence[str] = tuple(WAYS)

    @property
    def about(self) -> dict[str, object]:
        """Version and bytes of the weights, before they are repacked."""
        size = _function("llama_model_size", ctypes.c_uint64, POINTER)(self._models[False])
        return {"version": f"ik-llama-cpp-python {version('ik-llama-cpp-python')}", "weight_bytes": size}

    def _load(self, path: Path) -> None:
        self._seq_rm = _function("llama_kv_cache_seq_rm", ctypes.c_bool, POINTER, INT, INT, INT)
        self._seq_cp = _function("llama_kv_cache_seq_cp", None, POINTER, INT, INT, INT, INT)
        api.llama_backend_init()
        self._models = {}
        for repacked in (False, True):
            params = api.llama_model_default_params()
            params.repack_tensors = repacked
            params.use_mmap = not repacked  # what lies in a file is not repacked
            self._models[repacked] = api.llama_model_load_from_file(str(path).encode(), params)
            assert self._models[repacked], f"ik_llama.cpp cannot load {path}"

    def _new(self, rows: int, room: int, setting: str) -> int:
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = rows * room, rows
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn = WAYS[setting].flash
        handle = api.llama_init_from_model(self._models[WAYS[setting].repacked], params)
        assert handle, f"ik_llama.cpp made no context for {rows} x {room} tokens"
        return int(handle)

    def _keep(self, handle: int, length: int) -> bool:
        return bool(self._seq_rm(handle, -1, length, -1))

    def _copy(self, handle: int, row: int) -> None:
        self._seq_cp(handle, 0, row, -1, -1)


def _function(name: str, result: object, *arguments: object) -> ctypes._NamedFuncPointer:
    """A function of the library."""
    found = getattr(api._lib, name)
    found.restype, found.argtypes = result, arguments
    return found


if __name__ == "__main__":
    serve(IkLlama)
