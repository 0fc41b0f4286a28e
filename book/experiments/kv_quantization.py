"""Chapter 4.2: what 8 bits a key lose, and what they save. Prints two tables; --svg draws.

python book/experiments/kv_quantization.py [--svg book/docs/img/kv_quantization.svg]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from unittest.mock import patch

import mlx.core as mx
from command_line import parser_of

from tiny_llm.data import Batch
from tiny_llm.kv.dense import DenseCache
from tiny_llm.models.loading import load_model
from tiny_llm.ops import backend, paged_attention
from tiny_llm.ops.kv_pool import KvFormat
from tiny_llm.sampling.logprobs import log_probabilities
from tiny_llm.tokenizer.tokenizer import Tokenizer
from tiny_llm.weights.hub import resolve

TALKS = (
    ("The password of the red door is zimbro. Which password opens the red door?", "zimbro."),
    ("My name is Ada and I live in Oslo. Where do I live?", "You live in Oslo."),
    ("What is a KV cache?", "A KV cache keeps the keys and values of the tokens before."),
    ("Count from one to nine.", "one two three four five six seven eight nine"),
)
Rounded = tuple[mx.array, mx.array]
MODELS = (("qwen2.5-0.5b", 24, 2, 64), ("qwen2.5-7b", 28, 4, 128), ("llama-3.1-8b", 32, 8, 128))
MEMORY = 8 * 2**30


def rounded(x: mx.array, largest: mx.array, most: int) -> Rounded:
    """Vectors [T, K, D] in ``most`` steps up and down, for a ``largest`` [T, K] entry."""
    scales = (mx.broadcast_to(largest, x.shape[:2]) / most).astype(mx.float16)
    unit = scales.astype(mx.float32)[..., None]
    steps = mx.where(unit > 0, mx.round(x.astype(mx.float32) / unit), 0)
    return mx.clip(steps, -most, most).astype(mx.int8), scales


def largest(x: mx.array, axes: int | tuple[int, ...]) -> mx.array:
    """The largest absolute value over these axes, which stay."""
    found = mx.max(mx.abs(x.astype(mx.float32)), axis=axes, keepdims=True)
    return found[..., 0]


WAYS: Mapping[str, Callable[[mx.array], Rounded]] = {
    "8 bits, a token and head": paged_attention.quantized,
    "8 bits, a token": lambda x: rounded(x, largest(x, (1, 2)), 127),
    "8 bits, a pass and head": lambda x: rounded(x, largest(x, (0, 2)), 127),
    "8 bits, 64 is largest": lambda x: rounded(x, mx.full((1, 1), 64.0), 127),
    "4 bits, a token and head": lambda x: rounded(x, largest(x, 2), 7),
}


class Loss:
    """The bundled model's predictions of a few talks, with keys and values kept in some way."""

    def __init__(self) -> None:
        folder = resolve("demo")
        self.model, tokenizer = load_model(folder, dtype="float32"), Tokenizer.from_folder(folder)
        self.talks = [self._talk(tokenizer, *talk) for talk in TALKS]
        self.truth = self.predicted(None)

    @staticmethod
    def _talk(tokenizer: Tokenizer, asked: str, said: str) -> list[int]:
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        text = tokenizer.render_chat(talk, add_generation_prompt=False)
        return tokenizer.encode(text, add_special_tokens=False)

    def predicted(self, kept: mx.Dtype | None) -> mx.array:
        """Log-probabilities of what comes after each token: [tokens, V]."""
        found = []
        for tokens in self.talks:
            rows = mx.arange(len(tokens), dtype=mx.int32)
            batch = Batch(mx.array(tokens, mx.int32), rows, (0, len(tokens)), rows)
            cache = DenseCache(self.model.config.num_layers, kept)
            found.append(log_probabilities(self.model(batch, cache)))
        return mx.concatenate(found)

    def told(self) -> Iterator[str]:
        """For each way: bits of a number, KL divergence, and how often another token is likeliest."""
        yield f"{'keys and values':<26} bits   mean KL    worst   another"
        yield self._row("bfloat16", 16.0, self.predicted(mx.bfloat16))
        for name, way in WAYS.items():
            with patch.object(paged_attention, "quantized", way):
                bits = (4 if "4 bits" in name else 8) + 16 / self.model.config.head_dim
                yield self._row(name, bits, self.predicted(mx.int8))

    def _row(self, name: str, bits: float, found: mx.array) -> str:
        p, q = self.truth, found
        kl = mx.sum(mx.where(p > -mx.inf, mx.exp(p) * (p - q), 0), axis=-1)
        another = mx.mean(mx.argmax(p, axis=-1) != mx.argmax(q, axis=-1)).item()
        return f"{name:<26} {bits:>4.1f} {mx.mean(kl).item():>9.5f} {mx.max(kl).item():>8.4f} {another:>8.1%}"


def outliers() -> Iterator[str]:
    """How far attention is off where one number of each key is large, as biases make it."""
    q, k = mx.random.normal((2, 400, 1, 64), key=mx.random.key(0))
    yield "one number is   scores off   one scale   bits of the others"
    for size in (0, 10, 30, 100):
        keys = mx.concatenate([mx.full((400, 1, 1), float(size)), k[..., 1:]], axis=-1) if size else k
        steps, scales = paged_attention.quantized(keys)
        near = steps.astype(mx.float32) * scales.astype(mx.float32)[..., None]
        off = mx.std(mx.sum(q * (near - keys), axis=-1)).item() / 8
        step = mx.mean(scales).item()
        left = float(mx.log2(mx.array(2 * 2.5 / step)).item())
        yield f"{size or 'like all':>13} {off:>12.4f} {step:>11.4f} {left:>20.1f}"


def rooms() -> Iterator[str]:
    """Tokens that 8 GB hold."""
    yield "tokens in 8 GB        bfloat16       int8   times"
    for name, layers, heads, dim in MODELS:
        wide, narrow = (
            KvFormat(layers, heads, dim, 16, dtype, token_major=False).token_bytes
            for dtype in (mx.bfloat16, mx.int8)
        )
        yield f"{name:<18} {MEMORY // wide:>11,} {MEMORY // narrow:>10,} {wide / narrow:>7.2f}"


def picture() -> str:
    """One vector of two heads of eight: what comes, its scale, the integers, and what is read back."""
    x = mx.round(mx.array([[1.0], [12.0]]) * mx.random.normal((2, 8), key=mx.random.key(3)) * 100) / 100
    steps, scales = paged_attention.quantized(x[None])
    near = steps[0].astype(mx.float32) * scales[0].astype(mx.float32)[:, None]
    parts = ['<text class="n" x="20" y="20">what comes</text>', '<text class="n" x="652" y="20">scale</text>']
    for head in range(2):
        top = 30 + 130 * head
        scale = scales[0, head].item()
        rows = (
            (x[head].tolist(), "{:.2f}", "#e9eef5"),
            (steps[0, head].tolist(), "{}", "#f3c795"),
            (near[head].tolist(), "{:.3f}", "#b5d8b0"),
        )
        for line, (numbers, form, fill) in enumerate(rows):
            for place, number in enumerate(numbers):
                left, high = 20 + 78 * place, top + 34 * line
                parts.append(f'<rect fill="{fill}" x="{left}" y="{high}" width="74" height="28"/>')
                parts.append(f'<text x="{left + 66}" y="{high + 19}">{form.format(number)}</text>')
        parts.append(f'<rect fill="#e2b6d3" x="652" y="{top + 34}" width="90" height="28"/>')
        parts.append(f'<text x="734" y="{top + 53}">{scale:.5f}</text>')
        parts.append(f'<text class="n" x="652" y="{top + 19}">head {head}</text>')
        parts.append(f'<text class="n" x="652" y="{top + 87}">read back</text>')
    style = "svg{background:#fff}text{font:13px monospace;fill:#333;text-anchor:end}"
    style += ".n{fill:#777;text-anchor:start;font-size:12px}"
    head_tag = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 270">'
    return "\n".join([f"{head_tag}<style>{style}</style>", *parts, "</svg>\n"])


def main() -> None:
    """Print the tables, and draw."""
    arguments = parser_of(__doc__).parse_args()
    with backend.use("ref"):
        print("\n\n".join("\n".join(table) for table in (Loss().told(), outliers(), rooms())))
        if arguments.svg:
            arguments.svg.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
