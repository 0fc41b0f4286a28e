"""Chapter 4.5: one model on several ranks, and what a cut sum would change. Prints tables; --svg draws.

python book/experiments/tensor_parallel.py [--mistakes] [--svg book/docs/img/tensor_parallel.svg]
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from by_mistakes import show, told_with

from tiny_llm.config import ModelConfig
from tiny_llm.data import Batch
from tiny_llm.distributed.group import ALONE, Group
from tiny_llm.kv.dense import DenseCache
from tiny_llm.layers.linear import Linear
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.ranks import gathered_bytes, lacking, layer_lacks, rank_parts
from tiny_llm.ops.backend import use
from tiny_llm.ops.linear import linear

SIZES: dict[str, Any] = {"model_type": "qwen2", "hidden_size": 96, "intermediate_size": 250}
SIZES |= {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
CONFIG = ModelConfig.from_hf({**SIZES, "vocab_size": 1001, "tie_word_embeddings": False})
KNOWN = {
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152_064),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128_256),
}
SHOWN = (
    "rows-mixed",
    "one-head-further",
    "a-key-head-a-rank",
    "the-rest-is-lost",
    "own-rows-counted",
    "halved-on-the-way",
)


class Thread:
    """A rank that is a thread of this process; what it gets from others is counted."""

    def __init__(self, rank: int, table: list[mx.array], meet: threading.Barrier) -> None:
        self.rank, self.size, self.received = rank, len(table), 0
        self._table, self._meet = table, meet

    def all_gather(self, x: mx.array) -> mx.array:
        """Lay it down, wait for all, take all up."""
        mx.eval(x)
        self._table[self.rank] = x
        self._meet.wait()
        whole = mx.concatenate(self._table)
        mx.eval(whole)
        self.received += x.nbytes * (self.size - 1)
        self._meet.wait()
        return whole

    send = receive = None  # of a pipeline


def on_ranks(size: int, call: Callable[[Any], Any]) -> list[Any]:
    """What ``call`` returns on each rank."""
    table, meet = [mx.zeros(1)] * size, threading.Barrier(size, timeout=20)

    def run(rank: int) -> Any:
        try:
            with mx.stream(mx.new_stream(mx.cpu)), use("ref"):
                return call(Thread(rank, table, meet))
        except BaseException:
            meet.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    faults = [fault for fault in (future.exception() for future in futures) if fault is not None]
    for fault in faults:
        if not isinstance(fault, threading.BrokenBarrierError):
            raise fault
    return [future.result() for future in futures]


def weights() -> dict[str, mx.array]:
    """Noise in place of a checkpoint."""
    shapes = Decoder.shapes(CONFIG).items()
    keys = mx.random.split(mx.random.key(4), len(shapes))
    return {
        name: mx.random.normal(shape, key=key) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        + (0 if len(shape) > 1 or "bias" in name else 1)
        for (name, shape), key in zip(shapes, keys, strict=True)
    }


def part(group: Group, dtype: mx.Dtype = mx.float32) -> tuple[Decoder, int]:
    """A rank's model, and the bytes of its weights."""
    parts = rank_parts(CONFIG, Decoder.shapes(CONFIG), group.rank, group.size)
    own = {
        name: (whole[parts[name].start : parts[name].stop] if name in parts else whole).astype(dtype)
        for name, whole in weights().items()
    }
    return Decoder.take(CONFIG, own, group), sum(array.nbytes for array in own.values())


TOKENS = 48


def logits_of(model: Decoder) -> mx.array:
    """Of all tokens of a text made up, and of eight tokens one by one behind it."""
    cache, found = DenseCache(CONFIG.num_layers), list[mx.array]()
    text = [(7 * n * n + 3) % CONFIG.vocab_size for n in range(TOKENS)]
    for first, end in ((0, TOKENS - 8), *((at, at + 1) for at in range(TOKENS - 8, TOKENS))):
        rows = mx.arange(end - first)
        batch = Batch(mx.array(text[first:end]), rows + first, (0, end - first), rows)
        found.append(model(batch, cache))
        mx.eval(found[-1])
    whole = mx.concatenate(found)
    mx.eval(whole)
    return whole


def told_on(size: int, alone: mx.array) -> tuple[int, int, int, int, int]:
    """Of a rank of ``size``: bytes of weights, of a token's KV, received, foretold; logits that are off."""

    def run(group: Thread) -> tuple[mx.array, int, int, int]:
        model, held = part(group) if size > 1 else part(ALONE)
        found = logits_of(model)
        kept = 2 * 4 * CONFIG.num_layers * model.config.num_kv_heads * CONFIG.head_dim
        return found, held, kept, group.received

    ranks, told = on_ranks(size, run), gathered_bytes(CONFIG, size)
    off = max(int(mx.sum(found != alone).item()) for found, *_ in ranks)
    most = max(held for _, held, *_ in ranks)
    return most, ranks[0][2], ranks[0][3], TOKENS * (told.token + told.logits), off


@dataclass(frozen=True, slots=True)
class CutLinear(Linear):
    """A map whose sums are cut in two, and the halves added."""

    def __call__(self, x: mx.array) -> mx.array:
        flat = x.reshape(x.shape[0], -1)
        middle = flat.shape[1] // 2
        assert isinstance(self.weight, mx.array)
        first = linear(flat[:, :middle], self.weight[:, :middle])
        return first + linear(flat[:, middle:], self.weight[:, middle:])


def cut(model: Decoder) -> Decoder:
    """The model whose layers' last maps add halves, as two ranks would that have half of the inputs each."""
    layers = tuple(
        replace(
            layer,
            self_attn=replace(layer.self_attn, o_proj=CutLinear(layer.self_attn.o_proj.weight)),  # type: ignore[union-attr]
            mlp=replace(layer.mlp, down_proj=CutLinear(layer.mlp.down_proj.weight)),  # type: ignore[union-attr, type-var]
        )
        for layer in model.layers
    )
    return replace(model, layers=layers)


def table() -> str:
    """Ranks, cut sums, and bytes by two ways to cut."""
    lines = ["ranks   weights   KV a token   received   by formula   logits that differ"]
    with use("ref"):
        alone = logits_of(part(ALONE)[0])
        for size in (1, 2, 6):
            held, kept, got, told, off = told_on(size, alone)
            bytes_ = f"{held / 1e3:>6,.0f} KB {kept:>8,} B {got:>12,} {told:>12,}"
            lines.append(f"{size:>5} {bytes_} {off:>10,} of {alone.size:,}")
        lines += ["", "sums cut in two   logits that differ     by up to   another token likeliest"]
        for name, dtype in (("float32", mx.float32), ("bfloat16", mx.bfloat16)):
            model = part(ALONE, dtype)[0]
            whole, halves = (logits_of(one).astype(mx.float32) for one in (model, cut(model)))
            differ = mx.mean(whole != halves).item()
            most = mx.max(mx.abs(whole - halves)).item()
            another = mx.mean(mx.argmax(whole, axis=-1) != mx.argmax(halves, axis=-1)).item()
            lines.append(f"{name:<17} {differ:>18.0%} {most:>12.1g} {another:>25.0%}")
    lines += ["", "KB a token, 2 bytes a number   by outputs   by inputs"]
    for name, (E, F, L, H, _, _) in KNOWN.items():
        config = replace(CONFIG, hidden_size=E, num_heads=H, head_dim=128, num_layers=L)
        for ranks in (2, 4):
            ours, theirs = 2 * L * layer_lacks(config, F, ranks), 2 * L * 2 * 2 * lacking(E, ranks)
            lines.append(f"{name + f' on {ranks}':<27} {ours / 1e3:>13,.0f} {theirs / 1e3:>11,.0f}")
    return "\n".join(lines)


def story() -> str:
    """On two ranks and on six, in a line: what differs from one."""
    with use("ref"):
        alone = logits_of(Decoder.take(CONFIG, weights()))
    told = []
    for size in (2, 6):
        try:
            *_, got, wanted, off = told_on(size, alone)
            kept = f"{off / alone.size:.0%} differ" if off else "the same"
            told.append(f"{kept if got == wanted else kept + ', other bytes':<26}")
        except Exception as error:
            told.append(f"{type(error).__name__:<26}")
    return "".join(told).rstrip()


def mistakes() -> str:
    """The story with mistakes of this chapter, each in a process of its own."""
    lines = ["mistake              logits on 2 ranks         on 6 ranks"]
    lines += [f"{name:<20} {told}" for name, told in told_with(__file__, "4.5", SHOWN)]
    return "\n".join(lines)


ORANGE, BLUE = "#f3c795", "#a9c8e6"


def picture() -> str:
    """A matrix cut by outputs, and one cut by inputs, on two ranks."""
    parts = []
    for left, title in (
        (0, "cut by outputs: what is gathered are bits"),
        (390, "cut by inputs: what is added is rounded"),
    ):
        by_outputs = not left
        parts.append(f'<text x="{left + 20}" y="24">{title}</text>')
        for index in range(8):
            x = left + 20 + 22 * index
            fill = "#ddd" if by_outputs else (ORANGE if index < 4 else BLUE)
            parts.append(f'<rect x="{x}" y="50" width="20" height="20" fill="{fill}"/>')
        parts.append(f'<text class="n" x="{left + 204}" y="65">x: 8 inputs</text>')
        for row in range(4):
            for index in range(8):
                own = row < 2 if by_outputs else index < 4
                place = f'x="{left + 20 + 22 * index}" y="{92 + 22 * row}"'
                parts.append(f'<rect {place} width="20" height="20" fill="{ORANGE if own else BLUE}"/>')
            y = 92 + 22 * row
            parts.append(f'<path d="M{left + 200} {y + 10}h24m-5 -4l5 4l-5 4"/>')
            for rank in (0, 1):
                if by_outputs and (row < 2) != (not rank):
                    continue
                at = left + 230 + (0 if by_outputs else 52 * rank)
                parts.append(f'<rect x="{at}" y="{y}" width="20" height="20" fill="{(ORANGE, BLUE)[rank]}"/>')
            if not by_outputs:
                parts.append(f'<text x="{left + 261}" y="{y + 15}">+</text>')
        told = "a sum of 8, made by one rank" if by_outputs else "two sums of 4, and one more to add"
        parts.append(f'<text class="n" x="{left + 20}" y="204">{told}</text>')
    parts.append(
        f'<rect x="20" y="222" width="16" height="16" fill="{ORANGE}"/><text x="44" y="235">rank 0</text>'
    )
    parts.append(
        f'<rect x="120" y="222" width="16" height="16" fill="{BLUE}"/><text x="144" y="235">rank 1</text>'
    )
    style = "svg{background:#fff}text{font:14px sans-serif;fill:#333}.n{font-size:13px;fill:#666}"
    style += "path{stroke:#555;fill:none}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 254">'
    return "\n".join([f"{head}<style>{style}</style>", *parts, "</svg>\n"])


if __name__ == "__main__":
    show(__doc__, table, picture, mistakes, story)
