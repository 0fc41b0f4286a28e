"""What Apple's chips could do at most with our kernels: computed from published figures, measured on none."""

from __future__ import annotations

from dataclasses import dataclass

from tiny_llm.config import ModelConfig, Quantization
from tiny_llm.models.footprint import kv_token_bytes, parameter_count, weights_bytes

FOUR_BITS = Quantization(4, 64)
UNPACK = 4  # operations to make a number of 4 bits a float: shift, mask, convert, multiply-add


@dataclass(frozen=True)
class Chip:
    """GB/s of its memory and float32 TFLOP/s of its GPU, in the largest of the name."""

    name: str
    gb_s: float
    tflop_s: float


# Bandwidths: Apple's technical specifications. TFLOP/s: huggingface.co/hardware.
CHIPS = (
    Chip("M1", 68, 2.6),
    Chip("M1 Pro", 200, 5.2),
    Chip("M1 Max", 400, 10.4),
    Chip("M2", 100, 3.6),
    Chip("M2 Pro", 200, 6.8),
    Chip("M2 Max", 400, 13.5),
    Chip("M3", 100, 4.1),
    Chip("M3 Pro", 150, 7.4),
    Chip("M3 Max", 400, 14.2),
    Chip("M4", 120, 4.6),
    Chip("M4 Pro", 273, 9.2),
    Chip("M4 Max", 546, 18.4),
    Chip("M5", 153, 5.7),
    Chip("M5 Pro", 307, 11.4),
    Chip("M5 Max", 614, 22.8),
)


@dataclass(frozen=True)
class Work:
    """What a decode step of ``sequences`` costs: GB from and to memory, and G operations."""

    sequences: int
    gb: float
    gflop: float

    def tok_s(self, chip: Chip) -> float:
        """Tokens a second of all sequences, with memory and arithmetic both at their peak at once."""
        return self.sequences / max(self.gb / chip.gb_s, self.gflop / (1e3 * chip.tflop_s))

    def bound(self, chip: Chip) -> str:
        """Which of the two it waits for."""
        return "memory" if self.gb / chip.gb_s > self.gflop / (1e3 * chip.tflop_s) else "arithmetic"


def decode(
    config: ModelConfig, sequences: int, context: int, weights_moved: float, pages_moved: float
) -> Work:
    """A step of 4-bit weights and 16-bit pages, which our kernels move so many times (1: the least)."""
    weights = weights_bytes(config, 2, 2, FOUR_BITS) * weights_moved
    pages = sequences * context * kv_token_bytes(config, 2) * pages_moved
    count = parameter_count(config)
    scores = 4 * sequences * context * config.num_layers * config.num_heads * config.head_dim
    return Work(sequences, (weights + pages) / 1e9, (count * (2 * sequences + UNPACK) + scores) / 1e9)
