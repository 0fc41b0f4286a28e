"""SmolLM3: LLaMA whose every fourth layer turns nothing, so that far-off tokens look as near as others."""

from __future__ import annotations

from collections.abc import Mapping

from tiny_llm.config_fields import Fields
from tiny_llm.families.family import Family, defaults


def _read(fields: Fields) -> Mapping[str, object]:
    """``no_rope_layers`` has 1 for a layer that turns, and goes before ``no_rope_layer_interval``."""
    layers, every = fields.whole("num_hidden_layers", most=10_000), fields.whole("no_rope_layer_interval")
    turned = fields.get("no_rope_layers")
    if turned is None:
        turned = [int((layer + 1) % every != 0) for layer in range(layers)]
    if not isinstance(turned, list) or len(turned) != layers or not all(one in (0, 1) for one in turned):
        raise fields.wrong("no_rope_layers", f"{layers} times 0 or 1")
    still = [layer for layer, one in enumerate(turned) if not one]
    slides = fields.flag("use_sliding_window", False) and fields.get("sliding_window") is not None
    facts: dict[str, object] = {"no_rope_layers": tuple(still)}
    if slides and not fields.get("layer_types"):
        facts["layer_types"] = [
            "sliding_attention" if layer in still else "full_attention" for layer in range(layers)
        ]
    return facts


SMOLLM3 = Family(
    defaults(
        128_256,
        11_008,
        32_768,
        hidden_size=2048,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        rope_theta=2_000_000.0,
        tie_word_embeddings=True,
        no_rope_layer_interval=4,
    ),
    read=_read,
    reads=("no_rope_layers", "no_rope_layer_interval"),
    window_needs_switch=True,
)
