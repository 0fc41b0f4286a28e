"""tiny_llm as a side of a benchmark: random weights of 4 bits in groups of 64, the backend in use."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import mlx.core as mx
from protocol import Config, serve

from tiny_llm.data import Batch, KVCache, SamplingParams
from tiny_llm.decoding.generate import PREFILL_CHUNK, choose, prefill
from tiny_llm.engine.bench import Separate
from tiny_llm.kv.dense import DenseCache
from tiny_llm.models.registry import kv_dtype, load_dummy
from tiny_llm.ops.backend import active, isa, set_threads, use
from tiny_llm.sampling.sampler import sample

GREEDY = SamplingParams()
BITS = 4
STRIDE = 7919  # prompts' tokens are this far apart: all over the vocabulary, the same every time


class Ours:
    """A model and a cache a sequence."""

    settings: Sequence[str] = ("int8",)

    def __init__(self, shape: str, config: Config, threads: int, folder: str) -> None:
        set_threads(threads)
        self._model = load_dummy(shape, quantize=BITS)
        self._caches: list[DenseCache] = []
        self.about = {
            "version": f"{active()} {isa()}",
            "weight_bytes": _bytes_of(self._model, set()),
        }

    def open(self, rows: int, room: int) -> None:
        """Make empty caches; they grow by themselves."""
        self._caches = [self._cache() for _ in range(rows)]

    def prefill(self, setting: str, tokens: int) -> float:
        """A new sequence, in the pieces that a prompt is read in."""
        kv, prompt = self._cache(), self._prompt(0, tokens)
        began = time.perf_counter()
        choose(prefill(self._model, kv, prompt, PREFILL_CHUNK), GREEDY, tokens)
        return time.perf_counter() - began

    def decode(self, setting: str, context: int, steps: int) -> float:
        """A flat batch of all sequences a step."""
        for cache in self._caches:
            kept = min(cache.length, context)
            cache.truncate(kept)
            if kept < context:
                mx.eval(prefill(self._model, cache, self._prompt(kept, context), PREFILL_CHUNK))
        size = len(self._caches)
        tokens = mx.array(self._prompt(context, context + size), mx.int32)
        kv: KVCache = self._caches[0] if size == 1 else Separate(self._caches)
        starts, rows = tuple(range(size + 1)), mx.arange(size)
        began = time.perf_counter()
        for position in range(context, context + steps):
            batch = Batch(tokens, mx.full(size, position, mx.int32), starts, rows)
            chosen = sample(self._model(batch, kv), [GREEDY] * size, [position + 1] * size)
            tokens = mx.array(chosen.tolist(), mx.int32)
        return time.perf_counter() - began

    def _cache(self) -> DenseCache:
        config = self._model.config
        return DenseCache(config.num_layers, kv_dtype(config, dtype=None, quantize=BITS))

    def _prompt(self, start: int, end: int) -> list[int]:
        vocab = self._model.config.vocab_size
        return [i * STRIDE % vocab for i in range(start, end)]


def _bytes_of(part: object, seen: set[int]) -> int:
    """Bytes of all arrays and packed matrices in a tree of dataclasses, each counted once."""
    if id(part) in seen:
        return 0
    seen.add(id(part))
    if dataclasses.is_dataclass(part):
        return sum(_bytes_of(getattr(part, field.name), seen) for field in dataclasses.fields(part))
    if isinstance(part, tuple):
        return sum(_bytes_of(one, seen) for one in part)
    return int(getattr(part, "nbytes", 0))


if __name__ == "__main__":
    with use(None):  # decided once, as in an engine
        serve(Ours)
