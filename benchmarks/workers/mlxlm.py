"""mlx-lm as a side of a benchmark: random 4-bit weights in groups of 64, two activation types."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes
from protocol import Config, serve

CHUNK = 2048  # tokens of a prompt that it reads at a time
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
        self.figures: dict[str, float] = {}
        self._use("bfloat16")
        self.about = {
            "version": f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}",
            "weight_bytes": sum(p.nbytes for _, p in tree_flatten(self._model.parameters())),
        }

    def open(self, rows: int, room: int) -> None:
        """Remember how many sequences; the cache grows by itself."""
        self._rows = rows

    def prefill(self, setting: str, tokens: int) -> float:
        """As its ``generate_step`` reads a prompt: in chunks without logits, then the last token."""
        self._use(setting)
        cache = make_prompt_cache(self._model)
        prompt = self._prompt(0, tokens)
        mx.reset_peak_memory()
        began = time.perf_counter()
        for start in range(0, tokens - 1, CHUNK):
            self._model(prompt[:, start : min(start + CHUNK, tokens - 1)], cache=cache)
            mx.eval([layer.state for layer in cache])
        mx.eval(self._step(prompt[:, -1:], cache))
        return self._done(began)

    def decode(self, setting: str, context: int, steps: int) -> float:
        """Steps of one token a sequence after random keys and values: a prompt would take it hours."""
        self._use(setting)
        cache = make_prompt_cache(self._model)
        for layer in cache:
            shape = (self._rows, self._kv_heads, context, self._head_dim)
            mx.eval(layer.update_and_fetch(*(mx.random.normal(shape, DTYPES[setting]) for _ in "kv")))
        mx.reset_peak_memory()
        began = time.perf_counter()
        tokens = self._step(self._tokens[0, : self._rows, None], cache)
        for _ in range(steps - 1):  # as its generate_step does it: one step ahead of what is read
            following = self._step(tokens, cache)
            tokens.tolist()
            tokens = following
        tokens.tolist()
        return self._done(began)

    def streams(self, setting: str, rows: int, context: int, steps: int) -> float:
        """Its ``BatchGenerator``, which its server uses."""
        self._use(setting)
        prompts = [self._prompt(row, context)[0].tolist() for row in range(rows)]
        mx.reset_peak_memory()
        began = time.perf_counter()
        generator = BatchGenerator(self._model, max_tokens=steps)
        generator.insert(prompts, [steps] * rows)
        made = 0
        while responses := generator.next_generated():
            made += len(responses)
        seconds = self._done(began)
        generator.close()
        assert made == rows * steps, f"{made} tokens of {rows} x {steps}"
        return seconds

    def _done(self, began: float) -> float:
        seconds = time.perf_counter() - began
        self.figures = {"peak_bytes": mx.get_peak_memory()}
        return seconds

    def _prompt(self, row: int, tokens: int) -> mx.array:
        """[1, T], of any length."""
        return mx.take(self._tokens, (mx.arange(tokens) + 7919 * row) % self._tokens.size, axis=1)

    def _use(self, setting: str) -> None:
        self._model.set_dtype(DTYPES[setting])
        mx.eval(self._model.parameters())

    def _step(self, tokens: mx.array, cache: Sequence[object]) -> mx.array:
        """Extend the cache by tokens [B, T]; the likeliest next ones [B, 1] are under way."""
        likeliest = self._model(tokens, cache=cache)[:, -1].argmax(-1, keepdims=True)
        mx.async_eval(likeliest)
        return likeliest


if __name__ == "__main__":
    serve(MlxLm)
