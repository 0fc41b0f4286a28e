"""Chapter 1.1: where the bundled model looks when it recalls a password. Prints a table; --svg draws.

python book/experiments/attention.py [--svg book/docs/img/attention.svg]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import mlx.core as mx
from command_line import parser_of

from tiny_llm.data import Batch
from tiny_llm.decoding.generate import one_sequence
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.loading import load_model
from tiny_llm.ops.backend import use
from tiny_llm.ops.softmax import softmax
from tiny_llm.tokenizer.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "tiny_llm" / "demo"
CHAT = (
    {"role": "user", "content": "The password of the red door is zimbro."},
    {"role": "assistant", "content": "I will remember that."},
    {"role": "user", "content": "Which password opens the red door?"},
)
BEGUN = "The password of the red door is"


@dataclass(frozen=True)
class Watching(NoCache):
    """No cache, but it notes the last row's attention weights: ``rows[layer]`` is [H, S]."""

    rows: dict[int, mx.array]

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, batch: Batch, *, window: int = 0
    ) -> mx.array:
        """Attend as NoCache does."""
        heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
        keys = mx.repeat(k, heads // kv_heads, axis=1)
        self.rows[layer] = softmax(mx.sum(q[-1] * keys, axis=-1).T * dim**-0.5)
        return super().attend(layer, q, k, v, batch, window=window)


@dataclass(frozen=True)
class Seen:
    """The tokens of the conversation, the token that came next, and all heads' weights [layers, H, S]."""

    tokens: Sequence[str]
    next_token: str
    weights: mx.array


def look() -> Seen:
    """Run the model up to where the password must come."""
    tokenizer = Tokenizer.from_folder(DEMO)
    ids = tokenizer.encode(tokenizer.render_chat(list(CHAT)) + BEGUN, add_special_tokens=False)
    watching = Watching({})
    with use("ref"):
        logits = load_model(DEMO, dtype="float32")(one_sequence(ids, start=0), watching)
        weights = mx.stack([watching.rows[layer] for layer in sorted(watching.rows)])
        mx.eval(logits, weights)
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    return Seen(texts, tokenizer.decode([int(mx.argmax(logits[-1]).item())]), weights)


def strongest(seen: Seen, count: int) -> list[tuple[float, int, int, int]]:
    """The ``count`` heads that look hardest at where the next token was said: weight, layer, head, where."""
    at = max(i for i, text in enumerate(seen.tokens) if text == seen.next_token)
    layers, heads, _ = seen.weights.shape
    rows = [(seen.weights[j, h, at].item(), j, h, at) for j in range(layers) for h in range(heads)]
    return sorted(rows, reverse=True)[:count]


def table(seen: Seen) -> str:
    """For each layer, the head that looks hardest at the fact."""
    lines = [f"next token: {seen.next_token!r}; tokens to look at: {len(seen.tokens)}"]
    lines += [
        f"an even look gives each {1 / len(seen.tokens):.1%}",
        "",
        "layer  head  weight on it in the fact",
    ]
    every = sorted((layer, head, weight) for weight, layer, head, _ in strongest(seen, seen.weights.size))
    for layer in range(seen.weights.shape[0]):
        _, head, weight = max((row for row in every if row[0] == layer), key=lambda row: row[2])
        lines.append(f"{layer:>5} {head:>5} {weight:>24.1%}")
    return "\n".join(lines)


def picture(seen: Seen) -> str:
    """One head's weights as bars over the tokens, as an SVG."""
    _, layer, head, _ = strongest(seen, 1)[0]
    row = seen.weights[layer, head].tolist()
    step, height = 15, 120
    width = step * len(row) + 20
    bars = []
    for i, (weight, token) in enumerate(zip(row, seen.tokens, strict=True)):
        x, tall = 10 + i * step, max(1.0, weight * height)
        bars.append(f'<rect x="{x}" y="{height + 20 - tall:.1f}" width="{step - 3}" height="{tall:.1f}"/>')
        label = escape(token.replace("\n", "\\n"))
        place = f'transform="translate({x + 9},{height + 28}) rotate(90)"'
        bars.append(f"<text {place}>{label}</text>")
    style = "svg{background:#fff}rect{fill:#e6862b}text{font:10px monospace;fill:#333;white-space:pre}"
    about = f"weights of head {head}, layer {layer}, while {seen.next_token!r} is chosen"
    title = f'<text x="10" y="12">{about}</text>'
    view = f'viewBox="0 0 {width} {height + 130}"'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {view}><style>{style}</style>', title, *bars, "</svg>\n"]
    )


def main() -> None:
    """Print the table, and draw."""
    arguments = parser_of(__doc__).parse_args()
    seen = look()
    print(table(seen))
    if arguments.svg:
        arguments.svg.write_text(picture(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
