"""What config.json leaves out is what transformers would fill in: each field alone, and all of them.

tests/golden/config_defaults.json is written by tools/make_defaults.py, from transformers' own classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tiny_llm.config import ModelConfig
from tiny_llm.families.built_in import FAMILIES

Fields = dict[str, Any]
FILE = Path(__file__).resolve().parent / "golden" / "config_defaults.json"
BASES: list[Fields] = json.loads(FILE.read_text())["bases"]
OURS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "eos_token_id": "eos_token_ids",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
}
OF_EXPERTS = {
    "intermediate_size": "dense_width",
    "num_experts": "count",
    "num_experts_per_tok": "per_token",
    "norm_topk_prob": "normalised",
    "moe_intermediate_size": "width",
}

COMPUTED: Mapping[str, Callable[[ModelConfig], object]] = {
    "attention_multiplier": lambda config: config.query_scale * config.head_dim**-0.5,
    "logits_scaling": lambda config: 1 / config.logit_scale,
    "no_rope_layers": lambda config: [int(i not in config.no_rope_layers) for i in range(config.num_layers)],
}


def expect(fields: Fields, theirs: Mapping[str, Any], about: str) -> None:
    """Read ``fields`` and compare with what transformers makes of them.

    A window as long as the longest context is none.
    """
    config, window = ModelConfig.from_hf(fields), theirs["window"]
    hides = window is not None and window < theirs["max_position_embeddings"]
    assert max(config.windows, default=None) == (window if hides else None), about
    for name, value in theirs.items():
        if name in ("window", "rope_type"):
            continue
        if config.experts is not None and name in OF_EXPERTS:
            own = getattr(config.experts, OF_EXPERTS[name])
        elif name in COMPUTED:
            own = pytest.approx(COMPUTED[name](config))
        else:
            own = getattr(config, OURS.get(name, name))
        if name == "eos_token_id":
            value = (value,) if fields.get(name) is not None else ()  # no default: see Family
        assert own == value, (
            f"{fields['model_type']}, {about}: {name} is read as {own!r}, theirs is {value!r}"
        )


@pytest.mark.parametrize("base", BASES, ids=[base["config"]["model_type"] for base in BASES])
def test_our_defaults_are_transformers_own(base: Fields) -> None:
    given, facts = base["config"], base["facts"]
    expect(given, facts, "all given")
    for name, changed in base["without"].items():
        rest = {field: value for field, value in given.items() if field != name}
        expect(rest, facts | changed, f"without {name}")
    expect({"model_type": given["model_type"]}, facts | base["without_all"], "without all")


@pytest.mark.parametrize("base", BASES, ids=[base["config"]["model_type"] for base in BASES])
def test_null_is_what_transformers_takes_it_for(base: Fields) -> None:
    """Where their class refuses null, or has none to compute with, we may take it as we like."""
    for name, changed in base["null"].items():
        computed = [value for fact, value in changed.items() if fact != "window"]
        if "refused" not in changed and None not in computed:
            expect(base["config"] | {name: None}, base["facts"] | changed, f"{name} is null")


def test_every_family_is_compared() -> None:
    assert {base["config"]["model_type"] for base in BASES} == set(FAMILIES)


def test_mistral_without_num_key_value_heads_has_eight() -> None:
    """It was read as one for each of its 32 heads, and the checkpoint refused."""
    config = ModelConfig.from_hf({"model_type": "mistral", "sliding_window": None})
    assert (config.num_heads, config.num_kv_heads) == (32, 8)


def test_qwen2_with_its_window_switched_on_has_one_of_4096() -> None:
    """config.json need not mention the window itself: it was read as none."""
    switched = {"model_type": "qwen2", "use_sliding_window": True}
    assert ModelConfig.from_hf(switched).windows == (0,) * 28 + (4096,) * 4
