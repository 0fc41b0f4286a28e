"""Owns how much work a step is, from a model's config alone: operations, bytes, and the least time for both.

Counts the matrix products and attention; norms, RoPE and the gate are a hundredth of these. A multiplication
and an addition are two operations. Refuses to know any machine's speed. Chapter 0.3.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from tiny_llm.config import ModelConfig, ModelFacts
from tiny_llm.data import StepCosts, hidden_pairs

SLOW_PAIRS = 4  # how much longer an operation of attention may take than one of a large matrix product


class Work(NamedTuple):
    """A part of a step: floating-point operations, and bytes that must come from memory."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / self.bytes


class Step(NamedTuple):
    """A step's two parts, which run one after the other in each layer."""

    matrices: Work
    attention: Work


def matrix_flops(config: ModelFacts, tokens: int, rows: int) -> int:
    """Operations of all matrix products for ``tokens`` T in, and logits of ``rows`` out.

    A matrix [O, I] takes 2 O I for each token. A layer has those of queries [H D, E], keys and values
    [K D, E], the output [E, H D], gate and up [F, E] and down [E, F]; the head is [V, E], for ``rows`` only.
    """
    E, D = config.hidden_size, config.head_dim
    attention = 2 * E * D * (config.num_heads + config.num_kv_heads)
    layers = config.num_layers * attention + _mlp_entries(config)
    return 2 * tokens * layers + 2 * rows * config.vocab_size * E


def _mlp_entries(config: ModelFacts) -> int:
    """Entries that a token meets in all MLPs: of two matrices where there is no gate, of some experts, and of
    the matrix that chooses them."""
    E, layers = config.hidden_size, config.num_layers
    if not isinstance(config, ModelConfig):
        return layers * 3 * E * config.intermediate_size
    matrices = 2 if config.mlp == "gelu" else 3
    if (facts := config.experts) is None:
        return layers * matrices * E * config.intermediate_size
    mixed = len(facts.layers) * (matrices * E * facts.active_width + E * facts.count)
    return mixed + (layers - len(facts.layers)) * matrices * E * facts.dense_width


def attention_flops(config: ModelFacts, start: int, tokens: int) -> int:
    """Operations of attention for ``tokens`` T from position ``start`` on, each on itself and all before it.

    A pair of tokens takes 2 D for its score and 2 D for its part of the values, in each head and layer, but
    for those that a layer's window hides.
    """
    pairs = tokens * start + tokens * (tokens + 1) // 2
    hidden = sum(hidden_pairs(window, start, tokens) for window in config.windows)
    return 4 * config.num_heads * config.head_dim * (config.num_layers * pairs - hidden)


def step_of(
    config: ModelFacts, weights: int, kv_token: int, *, start: int, tokens: int, sequences: int = 1
) -> Step:
    """The work of a step of ``sequences``, each with ``tokens`` new ones from ``start`` on and one row out.

    ``weights`` bytes are read once for all of them; ``kv_token`` bytes for each token of each one's context,
    where a window does not hide it from all of the new ones.
    """
    hidden = sum(max(0, start + 1 - window) for window in config.windows if window) / config.num_layers
    read = sequences * (start + tokens) * kv_token - round(sequences * hidden * kv_token)
    return Step(
        Work(matrix_flops(config, sequences * tokens, sequences), weights),
        Work(sequences * attention_flops(config, start, tokens), read),
    )


def step_costs(config: ModelFacts, weights: int, kv_token: int) -> StepCosts:
    """How a step's parts compare before anything is measured, in bytes read: on the slow side, for safety.

    How much arithmetic the machine does while it reads is not known, so a token is taken to cost as much as
    reading all ``weights`` bytes: on no machine more, on a graphics card a hundredth of it. A pair of tokens
    is to a token as their operations are, and in a chunk ``SLOW_PAIRS`` times that.
    """
    token = float(weights)
    operation = token / matrix_flops(config, 1, 0)
    pair = operation * attention_flops(config, 0, 1)
    windows = Counter(config.windows)
    return StepCosts(
        step=token,
        decode=operation * matrix_flops(config, 1, 1),
        decode_context=kv_token + pair,
        chunk=token,
        chunk_context=SLOW_PAIRS * pair,
        windows=tuple((window, count / config.num_layers) for window, count in windows.items() if window),
    )


def least_seconds(work: Work, flops_s: float, bytes_s: float) -> float:
    """The roofline: the longer of what the operations take at ``flops_s`` and the bytes at ``bytes_s``."""
    return max(work.flops / flops_s, work.bytes / bytes_s)
