"""Owns how long a simulated step takes: measured on a machine, or computed from a device's published speeds.

Refuses to know who is in the step. Times in milliseconds.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from tiny_llm.config import ModelConfig
from tiny_llm.data import StepCosts
from tiny_llm.errors import ConfigError, did_you_mean
from tiny_llm.models.cost import attention_flops, matrix_flops
from tiny_llm.weights.names import config_of, short_names

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_BANDWIDTH, _FLOPS = 0.8, 0.5  # of what is published are reached
_OVERHEAD_MS = 2.0  # of a step, beside what the device does


class Device(NamedTuple):
    """A device as its maker describes it: bytes and operations (16 bits, dense) a second, bytes of memory."""

    bytes_s: float
    flops_s: float
    memory: float


DEVICES: Mapping[str, Device] = {
    "a100-40gb": Device(1.555e12, 312e12, 40e9),
    "a100-80gb": Device(2.039e12, 312e12, 80e9),
    "h100": Device(3.35e12, 989e12, 80e9),
    "h200": Device(4.8e12, 989e12, 141e9),
    "l4": Device(300e9, 121e12, 24e9),
    "rtx-4090": Device(1.008e12, 165e12, 24e9),
    "m4-max": Device(546e9, 34e12, 64e9),
}
"""Source: the makers' data sheets."""


@dataclass(frozen=True, slots=True)
class StepMs:
    """What a step takes: ``rows_ms`` by ``rows``, and between those in proportion; then for each row whose
    logits are wanted, each token of the decodes' contexts and each of the chunks'.

    A token's keys and values take ``kv_token_bytes``, and there is room for those of ``kv_tokens``.
    """

    what: str
    rows: Sequence[int]
    rows_ms: Sequence[float]
    logits_ms: float
    decode_context_ms: float
    chunk_context_ms: float
    kv_token_bytes: int
    kv_tokens: int

    def ms(self, rows: int, logits: int, decode_context: int, chunk_context: int) -> float:
        """A step of so many rows."""
        at = min(max(bisect_right(self.rows, rows), 1), len(self.rows) - 1)
        low, high = self.rows[at - 1], self.rows[at]
        low_ms, high_ms = self.rows_ms[at - 1], self.rows_ms[at]
        return (
            low_ms
            + (high_ms - low_ms) * (rows - low) / (high - low)
            + self.logits_ms * logits
            + self.decode_context_ms * decode_context
            + self.chunk_context_ms * chunk_context
        )

    @property
    def guess(self) -> StepCosts:
        """The same in a scheduler's five costs, roughly."""
        row = (self.rows_ms[-1] - self.rows_ms[0]) / (self.rows[-1] - self.rows[0])
        return StepCosts(
            self.rows_ms[0], row + self.logits_ms, self.decode_context_ms, row, self.chunk_context_ms
        )

    def save(self, path: Path) -> None:
        """Write it as JSON, for ``read_costs``."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_costs(path: Path) -> StepMs:
    """What ``bench --fit`` has written. Raises ConfigError for anything else."""
    try:
        return StepMs(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read as costs of steps: {error}. Make it by bench --fit."
        ) from None


def costs_of(model: str, device: str) -> StepMs:
    """Computed: the longer of what its operations and its bytes take, for a dense model in 16 bits.

    Raises ConfigError for a model or a device that is unknown.
    """
    if device not in DEVICES:
        known = ", ".join(DEVICES)
        raise ConfigError(
            f"There is no device {device!r}; known are {known}.{did_you_mean(device, DEVICES)} "
            "Of another, measure with bench --fit."
        )
    speed, config = DEVICES[device], ModelConfig.from_hf(config_of(model))
    weights = 2 * short_names()[model].parameters
    kv = 4 * config.num_layers * config.num_kv_heads * config.head_dim
    byte_ms, flop_ms = 1e3 / (speed.bytes_s * _BANDWIDTH), 1e3 / (speed.flops_s * _FLOPS)
    room = int((0.9 * speed.memory - weights) / kv)
    if room < 1:
        raise ConfigError(f"{model} does not fit {device}: its weights take {weights / 1e9:.0f} GB.")
    pair_ms = flop_ms * attention_flops(config, 0, 1)
    return StepMs(
        f"{model} in 16 bits on {device}, computed",
        ROWS,
        [_OVERHEAD_MS + max(weights * byte_ms, matrix_flops(config, n, 0) * flop_ms) for n in ROWS],
        matrix_flops(config, 0, 1) * flop_ms,
        max(kv * byte_ms, pair_ms),
        pair_ms,
        kv,
        room,
    )
