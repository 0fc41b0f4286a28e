"""torch with transformers as a side of a benchmark: random bfloat16 weights, its default attention."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import transformers
from protocol import Config, serve


class Torch:
    """A model of transformers and one cache of its."""

    settings: Sequence[str] = ("bfloat16",)

    def __init__(self, shape: str, config: Config, threads: int, folder: str) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        facts = {name: value for name, value in config.items() if name not in ("model_type", "torch_dtype")}
        built = transformers.AutoConfig.for_model(str(config["model_type"]), **facts)
        self._model = transformers.AutoModelForCausalLM.from_config(built, dtype=torch.bfloat16).eval()
        self._tokens = torch.randint(0, built.vocab_size, (1, 1 << 17))
        self._rows = 1
        self._cache = transformers.DynamicCache()
        self.about = {
            "version": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "weight_bytes": sum(p.numel() * p.element_size() for p in self._model.parameters()),
        }

    def open(self, rows: int, room: int) -> None:
        """An empty cache; it grows by itself."""
        self._rows = rows
        self._cache = transformers.DynamicCache()

    def prefill(self, setting: str, tokens: int) -> float:
        """The whole prompt in one forward."""
        self._cache = transformers.DynamicCache()
        began = time.perf_counter()
        self._step(self._tokens[:, :tokens])
        return time.perf_counter() - began

    def decode(self, setting: str, context: int, steps: int) -> float:
        """Steps of one token a sequence, through the cache."""
        if self._rows > 1 or self._cache.get_seq_length() < context:
            self._cache = transformers.DynamicCache()
            self._step(self._tokens[:, :context])
            if self._rows > 1:
                self._cache.batch_repeat_interleave(self._rows)
        else:
            self._cache.crop(context - self._cache.get_seq_length())
        tokens = self._tokens[0, : self._rows, None]
        began = time.perf_counter()
        for _ in range(steps):
            tokens = self._step(tokens)
        return time.perf_counter() - began

    @torch.inference_mode()
    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Extend the cache by tokens [B, T] and return the likeliest next ones [B, 1]."""
        out = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)


if __name__ == "__main__":
    serve(Torch)
