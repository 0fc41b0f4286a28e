"""Which layers have experts, and where checkpoints keep these. Knows no model_type."""

from __future__ import annotations

from collections.abc import Collection

from tiny_llm.families.family import DecoderSizes, Places, Stored

MLP = "model.layers.{}.mlp"


def every(step: int, layers: int, first: int = 0, last: int | None = None) -> frozenset[int]:
    """Of so many layers each ``step``-th, from ``first`` to ``last`` (None: the last one)."""
    end = layers if last is None else min(last + 1, layers)
    return frozenset(i for i in range(first, end) if (i + 1) % step == 0)


def expert_places(sizes: DecoderSizes, names: Collection[str]) -> Places:
    """Where experts lie in a checkpoint with these names: each by itself, gate and up of all in one, or,
    as mlx-lm keeps them and we want them, stacked.
    """
    facts = sizes.experts
    if facts is None or any(".mlp.switch_mlp." in name for name in names):
        return {}
    F, fused = facts.width, f"{MLP}.experts.gate_up_proj"
    if any(name.endswith(".mlp.experts.gate_up_proj") for name in names):
        lie = {
            "gate_proj": Stored((fused,), rows=(0, F), of=2 * F, bare=True),
            "up_proj": Stored((fused,), rows=(F, 2 * F), of=2 * F, bare=True),
            "down_proj": Stored((f"{MLP}.experts.down_proj",), bare=True),
        }
    else:
        lie = {
            name: Stored(tuple(f"{MLP}.experts.{i}.{name}" for i in range(facts.count)))
            for name in ("gate_proj", "up_proj", "down_proj")
        }
    return {f"{MLP}.switch_mlp.{name}": stored for name, stored in lie.items()}
