"""mlx-lm's batch_generate on a folder's model in float32: a line of JSON in, a line out.

In: {"folder": "...", "prompts": [[ids], ...], "max_tokens": 64}. Out: {"seconds": ..., "tokens": ...}.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time

import mlx.core as mx
from mlx_lm import batch_generate, load


def main() -> None:
    """Load at the first line; answer each line."""
    model = tokenizer = None
    for line in sys.stdin:
        asked = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            if model is None:
                model, tokenizer = load(asked["folder"])
                model.set_dtype(mx.float32)
                mx.eval(model.parameters())
            began = time.perf_counter()
            answer = batch_generate(model, tokenizer, asked["prompts"], max_tokens=asked["max_tokens"])
            seconds = time.perf_counter() - began
        tokens = answer.stats.generation_tokens
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
