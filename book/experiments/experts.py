"""Chapter 3.3: what a step reads of the experts, and how many rows each of them gets. --svg draws.

python book/experiments/experts.py [--svg book/docs/img/experts.svg]
python book/experiments/experts.py --mistakes
"""

from __future__ import annotations

import mlx.core as mx
from by_mistakes import show, told_with

from tiny_llm.config import ModelConfig, Quantization
from tiny_llm.models.footprint import read_bytes
from tiny_llm.ops.experts import Routing, by_expert, experts_mlx, route_ref
from tiny_llm.weights.names import config_of

MODEL, FORMAT = "qwen3-30b-a3b", Quantization(4, 64)
TOKENS = (1, 4, 16, 64, 256, 1024)
POPULAR = 1.0  # how uneven a router's likings are, in logits
SHOWN = (
    "softmax-of-the-chosen",
    "correction-weighs-too",
    "equals-from-the-end",
    "one-sum-for-all",
    "whose-by-tokens",
    "experts-not-sorted",
    "never-comes-back",
)
HUES = ("#4878a8", "#e6862b", "#5a9e5a", "#b05a8f", "#8a7340", "#5fa8a8", "#c9534a", "#7f7f7f")


def chosen(config: ModelConfig, tokens: int, uneven: float) -> list[int]:
    """The experts of so many tokens, by logits drawn by chance; some experts are liked more than others."""
    assert config.experts is not None
    N, k = config.experts.count, config.experts.per_token
    liked = uneven * mx.random.normal((N,), key=mx.random.key(1))
    logits = mx.random.normal((tokens, N), key=mx.random.key(2)) + liked
    found, _ = route_ref(logits, Routing(k, normalised=True))
    return [expert for row in found.tolist() for expert in row]  # type: ignore[union-attr]


def table() -> str:
    """Bytes of a step, and the load of experts where all are liked alike, and where they are not."""
    config = ModelConfig.from_hf(config_of(MODEL))
    assert config.experts is not None
    lines = [
        "             read in a step      liked alike          some liked more",
        "tokens       GB  GB a token    met  rows  most      met  rows  most",
    ]
    for tokens in TOKENS:
        read = read_bytes(config, 2, 2, FORMAT, tokens=tokens) / 1e9
        line = f"{tokens:>6} {read:>8.2f} {read / tokens:>11.2f}"
        for uneven in (0.0, POPULAR):
            experts = chosen(config, tokens, uneven)
            loads = [experts.count(expert) for expert in range(config.experts.count)]
            met = sum(load > 0 for load in loads)
            line += f"  {met:>5} {len(experts) / met:>5.1f} {max(loads):>5}"
            line += "" if uneven else "  "
        lines.append(line)
    return "\n".join(lines)


def off(tokens: int, routing: Routing) -> str:
    """How far a layer of eight experts is off what it should be, as a share: against each row by itself."""
    N, E, F = 8, 32, 64
    keys = mx.random.split(mx.random.key(3), 5)
    x = mx.random.normal((tokens, E), key=keys[0])
    logits = mx.round(2 * mx.random.normal((tokens, N), key=keys[1]))  # whole numbers: some are equal
    gate, up = (mx.random.normal((N, F, E), key=key) / E**0.5 for key in keys[2:4])
    down = mx.random.normal((N, E, F), key=keys[4]) / F**0.5
    got = experts_mlx(x, logits, routing, gate, up, down)
    shares = mx.softmax(logits, axis=-1)
    score = shares if routing.correction is None else shares + routing.correction
    rows = []
    for t in range(tokens):
        order = sorted(range(N), key=lambda e, t=t: (-score[t, e].item(), e))[: routing.per_token]  # type: ignore[misc]
        total = sum(shares[t, e].item() for e in order) if routing.normalised else 1.0
        row = mx.zeros(E)
        for e in order:
            h = x[t] @ gate[e].T
            row = row + shares[t, e].item() / total * ((h * mx.sigmoid(h) * (x[t] @ up[e].T)) @ down[e].T)
        rows.append(row)
    right = mx.stack(rows)
    return f"{(mx.linalg.norm(got - right) / mx.linalg.norm(right)).item():>10.1%}"


def story() -> str:
    """A line: one token, forty of a model whose weights add up to 1, of one whose do not, and of ERNIE's."""
    plain, normalised = Routing(3, normalised=False), Routing(3, normalised=True)
    corrected = Routing(3, True, mx.array([0.0, 0.4, 0.0, -0.4, 0.2, 0.0, -0.2, 0.0]))
    cases = ((1, normalised), (40, normalised), (40, plain), (40, corrected))
    return "".join(off(tokens, routing) for tokens, routing in cases)


def mistakes() -> str:
    """The same with mistakes of this chapter, each in a process of its own."""
    lines = [f"{'mistake':<23} {'one':>9} {'normed':>9} {'not':>9} {'corrected':>9}"]
    for name, told in told_with(__file__, "3.3", SHOWN):
        lines.append(f"{name:<23}{told}")
    return "\n".join(lines)


def picture() -> str:
    """Twelve tokens with three of eight experts each: pairs by token, then by expert, and the way of some."""
    T, N, k, side = 12, 8, 3, 19
    logits = mx.random.normal((T, N), key=mx.random.key(5)) + mx.array([1.2, 0, 0, 0.8, 0, -0.5, 0, -2.0])
    picked, _ = route_ref(logits, Routing(k, normalised=True))
    rows, experts, places = by_expert(mx.arange(T)[:, None], picked)
    left, top, below = 40, 62, 214
    parts = [
        '<text x="10" y="18">above: token by token, the three experts of each.'
        " Below: expert by expert, whose each row is</text>",
    ]
    owners = [expert for row in picked.tolist() for expert in row]  # type: ignore[union-attr]
    ways = [place for row in places.tolist() for place in row]  # type: ignore[union-attr]
    for pair, (expert, place) in enumerate(zip(owners, ways, strict=True)):
        x, to = left + side * pair, left + side * place
        if pair % k == 0:
            parts.append(
                f'<text x="{x}" y="{top - 24}">token {pair // k}</text>' if pair % (2 * k) == 0 else ""
            )
        parts.append(f'<path d="M{x + 9} {top + 18}L{to + 9} {below}" stroke="{HUES[expert]}"/>')
        parts.append(cell(x + pair // k % 2, top, HUES[expert], str(expert)))
    tokens = [row[0] for row in rows.tolist()]  # type: ignore[index,union-attr]
    for place, (token, expert) in enumerate(zip(tokens, experts.tolist(), strict=True)):
        parts.append(cell(left + side * place, below, HUES[expert], str(token)))  # type: ignore[index]
    seen = list[int](experts.tolist())  # type: ignore[arg-type]
    for expert in sorted(set(seen)):
        first, count = seen.index(expert), seen.count(expert)
        x, width = left + side * first, side * count - 3
        parts.append(f'<path d="M{x} {below + 24}h{width}" stroke="{HUES[expert]}" class="wide"/>')
        parts.append(f'<text x="{x}" y="{below + 42}">{f"{expert}: {count}" if count > 1 else expert}</text>')
    parts.append(
        f'<text x="10" y="{below + 62}">expert: rows that share one reading of its weights.'
        " Expert 7 is not read at all</text>"
    )
    style = (
        "svg{background:#fff}text{font:11px monospace;fill:#333}.in{fill:#fff}path{fill:none;opacity:.55}"
        ".wide{stroke-width:4;opacity:1}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 290"><style>{style}</style>'
    return "\n".join([head, *(part for part in parts if part), "</svg>\n"])


def cell(x: int, y: int, colour: str, text: str) -> str:
    """A square with a number in it."""
    inside = f'<text class="in" x="{x + 8 - 3 * len(text)}" y="{y + 13}">{text}</text>'
    return f'<rect x="{x}" y="{y}" width="17" height="18" fill="{colour}"/>{inside}'


def main() -> None:
    """Print a table, and draw."""
    show(__doc__, table, picture, mistakes, story)


if __name__ == "__main__":
    main()
