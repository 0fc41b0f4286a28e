"""Owns the answer to "how fast could it be here?": three speeds of this machine, and what a model needs.

The speeds are measured on our own operations, large ones, alone: reading weights, a matrix product of many
rows, attention of many tokens. What a model then does worse than predicted is lost between operations.
What travels between ranks that share a model, and how long published links take for it, is by formula.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from tiny_llm.config import ModelFacts, Quantization
from tiny_llm.data import Batch, Matrix
from tiny_llm.kv.dense import DenseCache
from tiny_llm.models.cost import Step, least_seconds, step_of
from tiny_llm.models.footprint import kv_token_bytes, read_bytes, tensor_bytes
from tiny_llm.models.ranks import gathered_bytes
from tiny_llm.ops.linear import linear, pack
from tiny_llm.planning.rounds import seconds_of
from tiny_llm.weights.dummy import dummy_weights

FORMAT = Quantization(4, 64)
MATRICES, SHAPE, ROWS = 12, (4096, 4096), 512  # 113 MB: more than caches hold
HEADS, KV_HEADS, HEAD_DIM, TOKENS = 14, 2, 64, 1024


@dataclass(frozen=True, slots=True)
class Machine:
    """Units a second: bytes of weights read, operations of matrix products, operations of attention."""

    bytes_s: float
    matrix_flops_s: float
    attention_flops_s: float

    def seconds(self, step: Step) -> float:
        """The least time of a step: its parts follow one another."""
        matrices = least_seconds(step.matrices, self.matrix_flops_s, self.bytes_s)
        return matrices + least_seconds(step.attention, self.attention_flops_s, self.bytes_s)


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second."""

    prefill: float
    decode: float


def measure_machine(rounds: int = 5, format: Quantization | None = FORMAT) -> Machine:
    """Measure this machine with matrices of ``format`` (None: bfloat16), on the backend in use: medians of
    ``rounds``. Takes seconds.
    """
    shapes = {f"{i}.weight": SHAPE for i in range(MATRICES)}
    tensors = dummy_weights(
        shapes,
        dtype=mx.bfloat16,
        quantize=format,
        quantizable=shapes,
        finish=lambda weight: pack(weight, exact=False),
    )
    weights = list(tensors.values())
    size, entries = tensor_bytes(SHAPE, 2, format), SHAPE[0] * SHAPE[1]
    read = _seconds(lambda: _products(weights, 1), rounds)
    product = _seconds(lambda: _products(weights[:2], ROWS), rounds)
    attend = _seconds(_attention, rounds)
    pairs = TOKENS * (TOKENS + 1) // 2
    return Machine(
        MATRICES * size / read, 2 * 2 * ROWS * entries / product, 4 * HEADS * HEAD_DIM * pairs / attend
    )


def predict(
    config: ModelFacts,
    machine: Machine,
    *,
    quantize: Quantization | None,
    prompt: int,
    answer: int,
    batch: int = 1,
) -> Speed:
    """Tokens a second: of one ``prompt`` at once, then of ``batch`` answers together, in their middle."""
    kv = kv_token_bytes(config, 2)
    weights = read_bytes(config, 2, 4, quantize, tokens=prompt)
    first = machine.seconds(step_of(config, weights, kv, start=0, tokens=prompt))
    weights = read_bytes(config, 2, 4, quantize, tokens=batch)
    middle = step_of(config, weights, kv, start=prompt + answer // 2, tokens=1, sequences=batch)
    return Speed(prompt / first, batch / machine.seconds(middle))


def _products(weights: list[Matrix], rows: int) -> list[mx.array]:
    x = mx.ones((rows, SHAPE[1]))
    return [linear(x, weight, None) for weight in weights]


def _attention() -> list[mx.array]:
    q = mx.ones((TOKENS, HEADS, HEAD_DIM))
    k = mx.ones((TOKENS, KV_HEADS, HEAD_DIM))
    positions = mx.arange(TOKENS)
    batch = Batch(positions, positions, (0, TOKENS), positions[-1:])
    return [DenseCache(1, mx.bfloat16).attend(0, q, k, k, batch)]


def _seconds(make: Callable[[], list[mx.array]], rounds: int) -> float:
    """The median time, after one that is not counted."""
    return statistics.median([seconds_of(make) for _ in range(rounds + 1)][1:])


class Cable(NamedTuple):
    """A link between two machines: seconds that a message takes at least, and bytes a second."""

    name: str
    latency_s: float
    bytes_s: float


CABLES: Sequence[Cable] = (Cable("10 GbE, TCP", 300e-6, 1.25e9), Cable("Thunderbolt 5, RDMA", 9e-6, 7.4e9))
"""As others report them: 300 us a message over TCP between Macs; 5-9 us and 7.4 GB/s by RDMA over Thunderbolt
5 (macOS 26.2, December 2025 and April 2026). 10 GbE's bytes by its name."""


class StepTraffic(NamedTuple):
    """Of one step of ``rows`` sequences, which each get a token: what a rank receives, and how often."""

    ranks: int
    rows: int
    layer_bytes: int  # a token
    step_bytes: int
    gathers: int

    def seconds(self, cable: Cable) -> float:
        """What the step waits for a link. Each gather is as late as its latest message."""
        return self.gathers * cable.latency_s + self.step_bytes / cable.bytes_s


def traffic(config: ModelFacts, ranks: int, rows: int, item_bytes: int) -> StepTraffic:
    """What ``ranks`` tell each other of a step, activations being of ``item_bytes``."""
    found = gathered_bytes(config, ranks, item_bytes)
    return StepTraffic(ranks, rows, found.layer, rows * (found.token + found.logits), found.gathers)


def traffic_lines(found: StepTraffic) -> list[str]:
    """It, for people: what travels, and what each link would allow at most."""
    lines = [
        f"on {found.ranks} ranks: {found.layer_bytes / 1e3:,.1f} KB a layer and token, "
        f"{found.step_bytes / found.rows / 1e3:,.1f} KB a token in all, {found.gathers} gathers a step"
    ]
    for cable in CABLES:
        took = found.seconds(cable)
        lines.append(
            f"  {cable.name} ({1e6 * cable.latency_s:g} us, {cable.bytes_s / 1e9:g} GB/s): "
            f"{1e3 * took:.1f} ms a step of {found.rows}, so at most {found.rows / took:,.0f} tokens a second"
        )
    return lines
