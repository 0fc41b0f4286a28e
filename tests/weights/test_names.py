"""The table of short names: every fact loads as a config, and the sizes add up to what is published."""

from __future__ import annotations

import math

import pytest

from tiny_llm.config import ModelConfig
from tiny_llm.errors import ConfigError
from tiny_llm.families.built_in import FAMILIES
from tiny_llm.models.registry import expected_tensors
from tiny_llm.weights.names import config_of, short_names


@pytest.mark.parametrize("name", short_names())
def test_the_facts_load_and_give_the_published_number_of_parameters(name):
    config = ModelConfig.from_hf(config_of(name))
    counted = sum(math.prod(shape) for shape in expected_tensors(config).values())
    assert counted == short_names()[name].parameters


# total_size in each model.safetensors.index.json
PUBLISHED_BYTES = {
    "qwen2-7b": 15_231_233_024,
    "qwen2.5-3b": 6_171_877_376,
    "qwen2.5-72b": 145_412_407_296,
    "qwen3-1.7b": 4_063_479_808,
    "qwen3-4b": 8_044_936_192,
    "qwen3-8b": 16_381_470_720,
    "qwen3-14b": 29_536_614_400,
    "qwen3-32b": 65_524_246_528,
    "llama-3.3-70b": 141_107_412_992,
    "mistral-7b": 14_496_047_104,
    "mistral-7b-v0.1": 14_483_464_192,
}


def test_every_built_in_family_has_a_short_name():
    assert {row.facts["model_type"] for row in short_names().values()} == set(FAMILIES)


def test_download_sizes_are_the_published_ones():
    assert {name: short_names()[name].download_bytes for name in PUBLISHED_BYTES} == PUBLISHED_BYTES


def test_the_first_mistral_sees_a_window_and_later_ones_do_not():
    windows = {
        name: ModelConfig.from_hf(config_of(name)).windows for name in short_names() if "mistral" in name
    }
    assert windows == {"mistral-7b": (), "mistral-7b-v0.1": (4096,) * 32}


def test_long_context_llama_stretches_its_slow_frequencies():
    factors = {
        name: scaling.factor
        for name in short_names()
        if (scaling := ModelConfig.from_hf(config_of(name)).rope_scaling) is not None and not scaling.factors
    }
    assert factors == {"llama-3.1-8b": 8, "llama-3.2-1b": 32, "llama-3.2-3b": 32, "llama-3.3-70b": 8}


def test_a_change_of_the_facts_stays_with_the_caller():
    facts = config_of("llama-3.2-1b")
    facts["rope_scaling"]["factor"] = facts["hidden_size"] = 1
    again = config_of("llama-3.2-1b")
    assert (again["rope_scaling"]["factor"], again["hidden_size"]) == (32, 2048)


def test_an_unknown_name_suggests_near_ones():
    with pytest.raises(ConfigError, match=r"'qwen2-0\.5b'"):
        config_of("qwen2-0.5")
