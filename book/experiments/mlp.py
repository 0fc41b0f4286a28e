"""Chapter 1.4: what norms and MLPs do in the bundled model, and what it loses without one. --svg draws.

python book/experiments/mlp.py [--svg book/docs/img/mlp.svg]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp

import mlx.core as mx
from command_line import parser_of
from rope import DEMO, Case, batch_of, cases

from tiny_llm.kv.no_cache import NoCache
from tiny_llm.layers.linear import gated_by
from tiny_llm.layers.mlp import MLP
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.loading import load_model
from tiny_llm.tokenizer.tokenizer import Tokenizer

LEFT, MIDDLE, SCALE, BINS, SPREAD = 60, 190, 40, 48, 6.0


@dataclass(frozen=True)
class Layer:
    """What one layer was seen to do: sizes of its input, of what its MLP adds, and all its gates."""

    size: float
    added: float
    gates: mx.array
    units: mx.array


class Silent(MLP):
    """Adds nothing."""

    def __init__(self) -> None:
        """It has no maps."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return zeros [T, E]."""
        return mx.zeros_like(x)


def sums(tokenizer: Tokenizer) -> list[Case]:
    """Twenty additions; the result is what must be right."""
    found = []
    for number in range(20):
        a, b = 23 + 3 * number, 64 - 2 * number
        chat = [{"role": "user", "content": f"What is {a} + {b}?"}]
        prompt = tokenizer.encode(tokenizer.render_chat(chat), add_special_tokens=False)
        begun = tokenizer.encode(f"{a} + {b} =", add_special_tokens=False)
        answer = tokenizer.encode(f"{a} + {b} = {a + b}", add_special_tokens=False)
        found.append(Case(prompt, answer, len(answer) - len(begun)))
    return found


def hits(model: Decoder, those: Sequence[Case]) -> int:
    """How many of the answers the model would write."""
    got = mx.argmax(model(batch_of(those, lambda place, _: place), NoCache()), axis=-1).tolist()
    right, at = 0, 0
    for case in those:
        right += got[at : at + case.password] == list(case.answer[-case.password :])
        at += case.password
    return right


def watched(model: Decoder, those: Sequence[Case]) -> list[Layer]:
    """Run the layers one by one."""
    batch, cache, seen = batch_of(those, lambda place, _: place), NoCache(), []
    x = model.embed_tokens(batch.tokens)
    for layer in model.layers:
        middle = x + layer.self_attn(layer.input_layernorm(x), batch, cache)
        normed = layer.post_attention_layernorm(middle)
        added = layer.mlp(normed)
        units = gated_by(normed, layer.mlp.gate_proj, layer.mlp.up_proj)
        seen.append(Layer(size(middle), size(added), layer.mlp.gate_proj(normed), units))
        x = middle + added
    return seen


def size(x: mx.array) -> float:
    """The root mean square of a row, averaged over rows."""
    return float(mx.mean(mx.sqrt(mx.mean(x * x, axis=-1))).item())


def without(model: Decoder, number: int) -> Decoder:
    """The model with one MLP that adds nothing."""
    layers = list(model.layers)
    layers[number] = replace(layers[number], mlp=Silent())
    return replace(model, layers=tuple(layers))


def table(model: Decoder, seen: Sequence[Layer], recall: Sequence[Case], added: Sequence[Case]) -> str:
    """A row a layer."""
    lines = [
        f"with all MLPs: {hits(model, recall)} of 20 passwords and {hits(model, added)} of 20 sums are right",
        "",
        "layer  size of x  MLP adds  gates below 0  best tenth  passwords  sums without it",
    ]
    for number, layer in enumerate(seen):
        closed = mx.mean(layer.gates < 0).item()
        strong = mx.sort(mx.square(layer.units), axis=-1)
        tenth = mx.mean(mx.sum(strong[:, -strong.shape[1] // 10 :], axis=-1) / mx.sum(strong, axis=-1)).item()
        less = without(model, number)
        lines.append(
            f"{number:>5} {layer.size:>10.1f} {layer.added:>9.1f} {closed:>14.0%} {tenth:>11.0%}"
            f" {hits(less, recall):>10} {hits(less, added):>16}"
        )
    return "\n".join(lines)


def picture(gates: mx.array) -> str:
    """The curve of silu over a histogram of one layer's gates."""

    def across(value: float) -> float:
        return LEFT + (value + SPREAD) * 50

    def curve(f: object) -> str:
        assert callable(f)
        points = (x / 10 for x in range(-60, 41))
        return "M" + "L".join(f"{across(x):.1f} {MIDDLE - SCALE * f(x):.1f}" for x in points)

    values, width = gates.flatten(), 2 * SPREAD / BINS
    parts = []
    for number in range(BINS):
        low = -SPREAD + number * width
        share = mx.mean((values >= low) & (values < low + width)).item()
        tall = 900 * share
        parts.append(f'<rect x="{across(low):.1f}" y="{330 - tall:.1f}" width="11" height="{tall:.1f}"/>')
    parts.append(f'<path class="axis" d="M{LEFT} {MIDDLE}H{across(6):.0f}M{across(0):.0f} 20V330"/>')
    parts.append(f'<path class="relu" d="{curve(lambda x: max(x, 0.0))}"/>')
    parts.append(f'<path class="silu" d="{curve(lambda x: x / (1 + exp(-x)))}"/>')
    for x in (-6, -3, 3, 6):
        parts.append(f'<text class="middle" x="{across(x):.0f}" y="{MIDDLE + 16}">{x}</text>')
    parts.append(f'<text x="{across(-5.8):.0f}" y="40">silu(x), thick; max(x, 0), thin</text>')
    parts.append(f'<text x="{across(2.2):.0f}" y="300">gates of layer 3, by value</text>')
    style = (
        "svg{background:#fff}rect{fill:#e6862b;fill-opacity:.6}path{fill:none;stroke:#333}.silu{stroke-width:3}"
        ".axis{stroke:#bbb}text{font:12px monospace;fill:#333}.middle{text-anchor:middle}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 350"><style>{style}</style>'
    return "\n".join([head, *parts, "</svg>\n"])


def main() -> None:
    """Print the table, and draw."""
    arguments = parser_of(__doc__).parse_args()
    tokenizer = Tokenizer.from_folder(DEMO)
    recall, added = cases(tokenizer), sums(tokenizer)
    model = load_model(DEMO, dtype="float32")
    assert isinstance(model, Decoder)
    seen = watched(model, [*recall, *added])
    print(table(model, seen, recall, added))
    if arguments.svg:
        arguments.svg.write_text(picture(seen[3].gates), encoding="utf-8")


if __name__ == "__main__":
    main()
