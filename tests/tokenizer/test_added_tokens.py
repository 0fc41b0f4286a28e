"""Tokens that tokenizer_config.json adds to tokenizer.json's: known as they are in transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tiny_llm.errors import ConfigError
from tiny_llm.tokenizer.tokenizer import Tokenizer

ORDINARY = 71
PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def token(content: str, special: bool = True, **other: bool) -> Mapping[str, object]:
    return {"content": content, "special": special, **PLAIN, **other}


def first_free(backend: Backend) -> int:
    return backend.get_vocab_size(with_added_tokens=True)


CONFIGS: Mapping[str, Any] = {
    "listed": lambda at: {"added_tokens_decoder": {at: token("<|a|>"), at + 1: token("<b>", special=False)}},
    "listed out of order": lambda at: {"added_tokens_decoder": {at + 1: token("<b>"), at: token("<|a|>")}},
    "listed again": lambda at: {"added_tokens_decoder": {1: token("<|im_start|>"), at: token("<|a|>")}},
    "an ordinary token of the vocabulary": lambda at: {"added_tokens_decoder": {ORDINARY: token("e")}},
    "with spaces around": lambda at: {"added_tokens_decoder": {at: token("<|a|>", lstrip=True, rstrip=True)}},
    "special by its role": lambda at: {
        "added_tokens_decoder": {at: token("<|a|>", special=False)},
        "eos_token": "<|a|>",
    },
    "named": lambda at: {"eos_token": "<|a|>", "pad_token": {"__type": "AddedToken", **token("<b>")}},
    "more special ones": lambda at: {"additional_special_tokens": ["<|a|>", "<|im_end|>"]},
    "more, new spelling": lambda at: {"extra_special_tokens": ["<b>", "<|a|>"]},
    "more, with roles": lambda at: {"extra_special_tokens": {"image_token": "<|a|>"}},
    "all": lambda at: {
        "added_tokens_decoder": {at: token("<|a|>", special=False)},
        "eos_token": "</s>",
        "additional_special_tokens": ["<b>"],
    },
}
TEXTS = ("x <|a|> y", "<|a|><b></s>", "<|im_start|>e<|im_end|>e", "the <b> b")


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_of_the_config_are_known_as_in_transformers(small: Backend, folder: Path, name: str) -> None:
    assert small.token_to_id("e") == ORDINARY
    config = CONFIGS[name](first_free(small))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_ids == ({theirs.eos_token_id} if theirs.eos_token_id is not None else set())


def test_an_id_that_the_token_would_not_get_is_refused(small: Backend, folder: Path) -> None:
    at = first_free(small) + 7
    config = {"added_tokens_decoder": {at: token("<|a|>")}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ConfigError, match=rf"gives '<\|a\|>' the id {at}, but .* it gets {at - 7}\. Save"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "listed", [[1], {"x": token("a")}, {"1": "a"}, {"1": {"content": 1}}, {"1": {"no": 1}}]
)
def test_a_list_that_is_none_is_refused(folder: Path, listed: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}), "utf-8")
    with pytest.raises(ConfigError, match="added_tokens_decoder is no table of tokens by id"):
        Tokenizer.from_folder(folder)
