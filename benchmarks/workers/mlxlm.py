"""mlx-lm as a side of a benchmark: random 4-bit weights in groups of 64, two activation types."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes
from protocol import Config, serve

DTYPES: Mapping[str, mx.Dtype] = {"bfloat16": mx.bfloat16, "float32": mx.float32}


class MlxLm:
    """A model of mlx-lm and one cache. ``threads`` is not its to choose."""

    settings: Sequence[str] = tuple(DTYPES)

    def __init__(self, shape: str, config: Config, threads: int, folder: str) -> None:
        mx.random.seed(0)
        model_class, arguments = _get_classes(dict(config))
        self._model = model_class(arguments.from_dict(dict(config)))
        nn.quantize(self._model, group_size=64, bits=4)
        self._kv_heads = int(str(config["num_key_value_heads"]))
        self._head_dim = int(str(config["hidden_size"])) // int(str(config["num_attention_heads"]))
        self._tokens = mx.random.randint(0, int(str(config["vocab_size"])), (1, 1 << 12))
        self._rows = 1
        self._use("bfloat16")
        self.about = {
            "version": f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}",
            "weight_bytes": sum(p.nbytes for _, p in tree_flatten(self._model.parameters())),
        }

    def open(self, rows: int, room: int) -> None:
        """Remember how many sequences; the cache grows by itself."""
        self._rows = rows

    def prefill(self, setting: str, tokens: int) -> float:
        """The whole prompt in one forward."""
        self._use(setting)
        cache = make_prompt_cache(self._model)
        began = time.perf_counter()
        self._step(self._tokens[:, :tokens], cache)
        return time.perf_counter() - began

    def decode(self, setting: str, context: int, steps: int) -> float:
        """Steps of one token a sequence after random keys and values: a prompt would take it hours."""
        self._use(setting)
        cache = make_prompt_cache(self._model)
        for layer in cache:
            shape = (self._rows, self._kv_heads, context, self._head_dim)
            mx.eval(layer.update_and_fetch(*(mx.random.normal(shape, DTYPES[setting]) for _ in "kv")))
        tokens = self._tokens[0, : self._rows, None]
        began = time.perf_counter()
        for _ in range(steps):
            tokens = self._step(tokens, cache)
        return time.perf_counter() - began

    def _use(self, setting: str) -> None:
        self._model.set_dtype(DTYPES[setting])
        mx.eval(self._model.parameters())

    def _step(self, tokens: mx.array, cache: Sequence[object]) -> mx.array:
        """Extend the cache by tokens [B, T] and return the likeliest next ones [B, 1]."""
        likeliest = self._model(tokens, cache=cache)[:, -1].argmax(-1, keepdims=True)
        mx.eval(likeliest)
        return likeliest


if __name__ == "__main__":
    serve(MlxLm)
