"""Chapter 1.3: where heads that share their keys look, and what sharing saves. --svg draws.

python book/experiments/groups.py [--svg book/docs/img/groups.svg]
"""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
from attention import look
from command_line import parser_of

from tiny_llm.config import ModelConfig
from tiny_llm.ops.attention import causal_mask
from tiny_llm.weights.names import config_of

LAYER, KV_HEADS = 3, 2
NAMES = ("qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "qwen3-4b")
STARTS, CELL = (0, 4, 6, 9), 26


def looks() -> list[str]:
    """Of each head of one layer: the token that it looks at most, at the moment of chapter 1.1's picture."""
    seen = look()
    group = seen.weights.shape[1] // KV_HEADS
    lines = [f"layer {LAYER}  query head  key head  looks most at  weight"]
    for head, row in enumerate(seen.weights[LAYER]):
        place = int(mx.argmax(row).item())
        where = f"{seen.tokens[place]!r}, {place}"
        lines.append(f"{head:>19} {head // group:>9} {where:>14} {row[place].item():>7.0%}")
    return lines


def sizes() -> list[str]:
    """What keys and values of a token take in 16 bits, with shared heads and with one for each query head."""
    lines = ["model       H   K   KiB a token  if K were H  tokens in 4 GiB"]
    for name in NAMES:
        config = ModelConfig.from_hf(config_of(name))
        head = config.num_layers * config.head_dim * 2 * 2
        shared, own = head * config.num_kv_heads, head * config.num_heads
        heads = f"{config.num_heads:>3} {config.num_kv_heads:>3}"
        lines.append(f"{name:<10} {heads} {shared / 1024:>13.0f} {own / 1024:>12.0f} {2**32 // shared:>16,}")
    return lines


def picture() -> str:
    """What each row of a batch of three sequences may see: a square a pair of tokens."""
    size = STARTS[-1]
    parts = [
        '<text x="10" y="16">a batch of 4, 2 and 3 tokens: each row is a query, each column a key</text>'
    ]
    seen = {(row, column): False for row in range(size) for column in range(size)}
    for start, end in pairwise(STARTS):
        mask = causal_mask(end - start, end - start, offset=0).tolist()
        for t, row in enumerate(mask):
            for s, value in enumerate(row):
                seen[start + t, start + s] = value == 0
    names = [f"{'abc'[b]}{i}" for b, (s, e) in enumerate(pairwise(STARTS)) for i in range(e - s)]
    for (row, column), visible in seen.items():
        x, y = 60 + column * CELL, 50 + row * CELL
        parts.append(f'<rect class="{"seen" if visible else "not"}" x="{x}" y="{y}" width="24" height="24"/>')
    for i, name in enumerate(names):
        parts.append(
            f'<text x="{64 + i * CELL}" y="42">{name}</text><text x="34" y="{67 + i * CELL}">{name}</text>'
        )
    for head in range(4):
        x, y = 380, 80 + head * 56
        parts.append(
            f'<rect class="query" x="{x}" y="{y}" width="96" height="34"/>'
            f'<text x="{x + 12}" y="{y + 22}">query {head}</text>'
        )
        to = 108 + head // 2 * 112
        parts.append(f'<path d="M{x + 96} {y + 17}L560 {to + 17}"/>')
    for head in range(2):
        y = 108 + head * 112
        parts.append(
            f'<rect class="seen" x="560" y="{y}" width="120" height="34"/>'
            f'<text x="566" y="{y + 22}">key, value {head}</text>'
        )
    parts.append('<text x="380" y="42">4 query heads, 2 key/value heads</text>')
    style = (
        "svg{background:#fff}.seen{fill:#e6862b}.not{fill:#f3f3f3}.query{fill:#fdf3e7;stroke:#333}"
        "path{stroke:#333}text{font:12px monospace;fill:#222}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 300"><style>{style}</style>'
    return "\n".join([head, *parts, "</svg>\n"])


def main() -> None:
    """Print the tables, and draw."""
    arguments = parser_of(__doc__).parse_args()
    print("\n".join([*looks(), "", *sizes()]))
    if arguments.svg:
        arguments.svg.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
