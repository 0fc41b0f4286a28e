"""Chapter 2.7: what fusing kernels saves, by counting and on the whole model. Prints tables; --svg draws.

python book/experiments/fused.py [--mistakes] [--svg book/docs/img/fused.svg]
python book/experiments/fused.py --speed [--rows 128] [--shape qwen2-0.5b] [--rounds 40]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import mlx.core as mx
from by_mistakes import told_with
from command_line import parser_of

import tiny_llm.layers.attention
import tiny_llm.layers.linear
import tiny_llm.layers.norm
from tiny_llm.config import ModelConfig
from tiny_llm.data import Matrix, SamplingParams
from tiny_llm.decoding.generate import generate, one_sequence
from tiny_llm.kv.dense import DenseCache
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.models.loading import kv_dtype, load_model
from tiny_llm.ops.linear import linears
from tiny_llm.ops.rms_norm import rms_norm
from tiny_llm.ops.rope import rope
from tiny_llm.ops.swiglu import swiglu
from tiny_llm.planning.rounds import Trial, interleave
from tiny_llm.tokenizer.tokenizer import Tokenizer
from tiny_llm.weights.names import config_of

DEMO = Path(__file__).resolve().parents[2] / "tiny_llm" / "demo"
ASKED, END = "What is 48 + 35?", 2045  # a token that ends an answer of the bundled model
SHAPE, STEPS, BEFORE = "qwen2-0.5b", 4, 16
CALL_US, GB_S = 2.0, 25.0
"""What a call of a small kernel costs, and how fast memory gives and takes: about, by two cores."""
SHOWN = (
    "norm-of-x",
    "first-rows-residual",
    "silu-of-up",
    "first-tokens-position",
    "turned-without-the-norm",
)


class Fusion(NamedTuple):
    """What a token brings of it, apart and fused: numbers through memory, and calls; how often in a model."""

    name: str
    apart: tuple[int, int]
    fused: tuple[int, int]
    times: int

    def saves_ms(self, tokens: int) -> float:
        """What is foretold for the whole model. A token's numbers alone never leave the caches."""
        calls, numbers = self.apart[1] - self.fused[1], self.apart[0] - self.fused[0]
        moved = 4 * tokens * numbers if tokens > 1 else 0
        return self.times * (calls * CALL_US * 1e-3 + moved / GB_S * 1e-6)


def fusions(config: ModelConfig) -> list[Fusion]:
    """The chapter's three, and one that only looks like one."""
    E, F, layers = config.hidden_size, config.intermediate_size, config.num_layers
    heads = (config.num_heads + config.num_kv_heads) * config.head_dim
    return [
        # x and residual, the sum and it again, its norm
        Fusion("a sum and its norm", (5 * E, 2), (4 * E, 1), 2 * layers - 1),
        Fusion("rotation of q and of k", (2 * heads, 2), (2 * heads, 1), layers),
        # gate and up to memory and back, what is made of them
        Fusion("SwiGLU in the product", (5 * F, 1), (F, 0), layers),
        # before the rotation put together; after it cut in two
        Fusion("q and k put together", (2 * heads, 2), (6 * heads, 4), layers),
    ]


def counted(config: ModelConfig) -> Iterator[str]:
    """The table of what is saved, by counting."""
    yield f"{'':<24} numbers, a token of a layer   calls   foretold, the whole model"
    yield f"{'':<24} {'apart':>13} {'fused':>14}{'':>10} {'1 token':>12} {'128 tokens':>14}"
    for it in fusions(config):
        calls = f"{it.apart[1]} -> {it.fused[1]}"
        foretold = f"{-it.saves_ms(1):>+9.2f} ms {-it.saves_ms(128):>+11.1f} ms"
        yield f"{it.name:<24} {it.apart[0]:>13,} {it.fused[0]:>14,} {calls:>9} {foretold}"


def norm_apart(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """Two calls: a sum, and its norm."""
    total = x + residual
    return total, rms_norm(total, weight, eps)


Given = mx.array | None


def _normed(x: mx.array, weight: Given, eps: float) -> mx.array:
    return x if weight is None else rms_norm(x, weight, eps)


def rope_apart(
    q: mx.array, k: mx.array, places: mx.array, freq: mx.array, qn: Given, kn: Given, eps: float, _: Given
) -> tuple[mx.array, mx.array]:
    """A call for queries, one for keys."""
    return rope(_normed(q, qn, eps), places, freq), rope(_normed(k, kn, eps), places, freq)


def rope_together(
    q: mx.array, k: mx.array, places: mx.array, freq: mx.array, qn: Given, kn: Given, eps: float, _: Given
) -> tuple[mx.array, mx.array]:
    """One call, of queries and keys put together."""
    both = mx.concatenate([_normed(q, qn, eps), _normed(k, kn, eps)], axis=1)
    turned = rope(both, places, freq)
    return turned[:, : q.shape[1]], turned[:, q.shape[1] :]


def gate_apart(x: mx.array, gate: Matrix, up: Matrix, gate_bias: Given, up_bias: Given) -> mx.array:
    """One call for both products, one for what is made of them."""
    return swiglu(*linears(x, [gate, up], [gate_bias, up_bias]))


NORM = (tiny_llm.layers.norm, "add_rms_norm", norm_apart)
ROPE = (tiny_llm.layers.attention, "rope_qk", rope_apart)
GATE = (tiny_llm.layers.linear, "gated", gate_apart)
TOGETHER = (tiny_llm.layers.attention, "rope_qk", rope_together)
BASE, APART = "all three fused", "q and k apart"
WAYS: Mapping[str, Sequence[tuple[object, str, Callable[..., object]]]] = {
    BASE: (),
    "a sum and its norm apart": (NORM,),
    APART: (ROPE,),
    "SwiGLU apart": (GATE,),
    "all three apart": (NORM, ROPE, GATE),
    "q and k put together": (TOGETHER,),
}


def speed_table(shape: str, rows: int, rounds: int) -> str:
    """The whole model, each way in turn, round after round: medians, and how often it was the slower one."""
    model = load_model(DummyCheckpoint(shape), quantize=4)
    kv = DenseCache(model.config.num_layers, kv_dtype(model.config, dtype=None, quantize=4))
    mx.eval(model(one_sequence([0] * BEFORE, 0), kv))
    spent = {name: list[float]() for name in WAYS}

    def run(name: str) -> float:
        with ExitStack() as stack:
            for module, op, other in WAYS[name]:
                stack.enter_context(mock.patch.object(module, op, other))
            began = time.perf_counter()
            for _ in range(STEPS if rows == 1 else 1):
                kv.truncate(BEFORE)
                mx.eval(model(one_sequence(range(rows), BEFORE), kv))
            spent[name].append(time.perf_counter() - began)
        return spent[name][-1]

    steps = STEPS if rows == 1 else 1
    rates = interleave([Trial((it,), steps, partial(run, it)) for it in WAYS], rounds, warm_up=2, pause=0)
    lines = [f"{f'{shape}, {rows} a step':<26} ms   more than   by      slower in"]
    for (name,), rate in rates.items():
        against = APART if name == list(WAYS)[-1] else BASE
        pairs = [*zip(spent[name][-rounds:], spent[against][-rounds:], strict=True)]
        more, slower = statistics.median(a / b for a, b in pairs) - 1, sum(a > b for a, b in pairs)
        said = (
            f"   {'apart' if against == APART else 'fused':<9} {more:>+6.1%} {slower:>6} of {rounds} rounds"
        )
        lines.append(f"{name:<25}{1e3 / rate.median:>6.1f}{said if name != BASE else ''}")
    return "\n".join(lines)


def story() -> str:
    """What the bundled model answers, on this process's learner's kernels."""
    tokenizer, model = Tokenizer.from_folder(DEMO), load_model(DEMO, dtype="float32")
    prompt = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": ASKED}]))
    cache = DenseCache(model.config.num_layers)
    ids = [token.id for token in islice(generate(model, cache, prompt, SamplingParams()), 10)]
    return " ".join(tokenizer.decode(ids[: ids.index(END)] if END in ids else ids).split())


def mistakes() -> Iterator[str]:
    """The answer with mistakes of this chapter, each in a process of its own."""
    yield f"{'mistake':<26} {ASKED}"
    for name, told in told_with(__file__, "2.7", SHOWN):
        yield f"{name:<26} {told}"


def picture(config: ModelConfig) -> str:
    """What passes through memory for a token of a layer, apart and fused, and in how many calls."""
    parts, most = list[str](), max(max(it.apart[0], it.fused[0]) for it in fusions(config))
    for number, it in enumerate(fusions(config)):
        top = 24 + 74 * number
        parts.append(f'<text x="20" y="{top}">{it.name}</text>')
        for row, (how, (numbers, calls)) in enumerate((("apart", it.apart), ("fused", it.fused))):
            y, width = top + 8 + 24 * row, 400 * numbers / most
            parts.append(f'<text class="n" x="20" y="{y + 14}">{how}</text>')
            parts.append(f'<rect class="{how}" x="80" y="{y}" width="{width:.0f}" height="18"/>')
            parts.append(f'<text class="n" x="{88 + width:.0f}" y="{y + 14}">{numbers:,}</text>')
            parts += [f'<circle cx="{600 + 18 * call}" cy="{y + 9}" r="6"/>' for call in range(calls)]
            if not calls:
                parts.append(f'<text class="n" x="594" y="{y + 14}">in the product\'s</text>')
    parts.append('<text class="n" x="80" y="322">numbers to memory and from it, a token of a layer</text>')
    parts.append('<text class="n" x="594" y="322">calls</text>')
    style = "svg{background:#fff}text{font:13px monospace;fill:#333}.n{font-size:12px;fill:#666}"
    style += ".apart{fill:#a9c8e6}.fused{fill:#e6862b}circle{fill:#888}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 332">'
    return "\n".join([f"{head}<style>{style}</style>", *parts, "</svg>\n"])


def main() -> None:
    """Print the tables, and draw."""
    parser = parser_of(__doc__)
    parser.add_argument("--speed", action="store_true", help="the whole model, with and without")
    parser.add_argument("--mistakes", action="store_true", help="what the bundled model says with mistakes")
    parser.add_argument("--story", action="store_true", help="what it says, alone")
    parser.add_argument("--shape", default=SHAPE)
    parser.add_argument("--rows", type=int, default=1, help="tokens a step")
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    config = ModelConfig.from_hf(config_of(SHAPE))
    if arguments.speed:
        print(speed_table(arguments.shape, arguments.rows, arguments.rounds))
    elif arguments.mistakes or arguments.story:
        print("\n".join(mistakes()) if arguments.mistakes else story())
    else:
        print("\n".join(counted(config)))
    if arguments.svg:
        arguments.svg.write_text(picture(config), encoding="utf-8")


if __name__ == "__main__":
    main()
