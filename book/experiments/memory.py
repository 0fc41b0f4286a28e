"""Chapter 0.2: what models take, and how many tokens fit beside them. Prints a table; --svg draws.

python book/experiments/memory.py [--svg book/docs/img/memory.svg]
"""

from __future__ import annotations

from command_line import parser_of

from tiny_llm.config import Quantization
from tiny_llm.memory import kept_bytes
from tiny_llm.models.footprint import (
    activation_bytes,
    kv_token_bytes,
    parameter_count,
    training_bytes,
    weights_bytes,
)
from tiny_llm.planning.memory import find_config
from tiny_llm.planning.memory_report import size

MACHINE = 16 * 10**9
MODELS = ("qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "llama-3-8b", "qwen2.5-32b")
LINES = (("llama-3-8b", "#e6862b"), ("qwen2-7b", "#3b7dd8"), ("qwen2-1.5b", "#4a9a5b"))
MOST = 160_000  # tokens, in the picture


def packed_bytes(model: str) -> int:
    """A model's weights in 4 bits."""
    return weights_bytes(find_config(model), 2, 4, Quantization(4, 64))


def row(model: str) -> str:
    """A model's line: weights in 16 and in 4 bits, a token's KV, tokens beside the weights, training."""
    config = find_config(model)
    step = activation_bytes(config, 2048, 1)
    kv = kv_token_bytes(config, 2)
    tokens = max(0, MACHINE - packed_bytes(model) - step - kept_bytes(MACHINE)) // kv
    training = sum(training_bytes(config, 2048)) / parameter_count(config)
    return (
        f"{model:<13}{size(weights_bytes(config, 2, 4)):>10}{size(packed_bytes(model)):>10}"
        f"{size(step):>10}{size(kv):>9}{tokens:>11,}{training:>10.1f}"
    )


def table() -> str:
    """All models on a machine of 16 GB."""
    head = (
        f"{'':<13}{'weights':>10}{'4 bits':>10}{'a step':>10}{'a token':>9}{'tokens':>11}{'training':>10}\n"
        f"{'':<52}{'in 16 GB':>11}{'B/param.':>10}"
    )
    return "\n".join([head, *map(row, MODELS)])


def picture() -> str:
    """Memory against tokens in the cache: where each line starts are the weights, its slope is KV a token."""
    left, top, wide, high = 52, 14, 520, 250
    most = 24e9

    def at(tokens: float, count: float) -> str:
        return f"{left + wide * tokens / MOST:.1f} {top + high * (1 - count / most):.1f}"

    drawn = [f'<path class="axis" d="M{at(0, most)}L{at(0, 0)}L{at(MOST, 0)}"/>']
    for gigabytes in (0, 8, 16, 24):
        drawn.append(
            f'<text x="{left - 6}" y="{at(0, gigabytes * 1e9).split()[1]}" class="y">{gigabytes} GB</text>'
        )
    for thousands in (0, 40, 80, 120, 160):
        x = at(thousands * 1000, 0).split()[0]
        drawn.append(f'<text x="{x}" y="{top + high + 16}" class="x">{thousands},000</text>')
    drawn[-5] = drawn[-5].replace("0,000", "0")
    drawn.append(f'<text x="{left + wide / 2}" y="{top + high + 33}" class="x">tokens in the cache</text>')
    drawn.append(f'<path class="end" d="M{at(0, MACHINE)}L{at(MOST, MACHINE)}"/>')
    for model, color in LINES:
        config, start = find_config(model), packed_bytes(model)
        end = min(MOST, (most - start) / kv_token_bytes(config, 2))
        count = start + end * kv_token_bytes(config, 2)
        drawn.append(f'<path d="M{at(0, start)}L{at(end, count)}" stroke="{color}" stroke-width="2.5"/>')
        x, y = at(end, count).split()
        label = f"{model}, {size(kv_token_bytes(config, 2))} a token"
        drawn.append(f'<text x="{float(x) + 6}" y="{float(y) + 4}" fill="{color}">{label}</text>')
    style = (
        "svg{background:#fff}text{font:11px sans-serif}path{fill:none}.axis{stroke:#555}"
        ".x{text-anchor:middle}.y{text-anchor:end}.end{stroke:#c22;stroke-dasharray:4 3}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 306"><style>{style}</style>',
            *drawn,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Print the table, and draw."""
    arguments = parser_of(__doc__).parse_args()
    print(table())
    if arguments.svg:
        arguments.svg.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
