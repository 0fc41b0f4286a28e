"""What sentence-transformers' files say of a folder, in all their spellings, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_llm.config_embedding import EmbeddingFacts, gguf_embedding, load_embedding
from tiny_llm.errors import ConfigError, RequestError

QWEN3_EMBEDDING = {  # as its repository has them
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {
        "word_embedding_dimension": 1024,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": True,
        "include_prompt": True,
    },
    "config_sentence_transformers.json": {
        "prompts": {
            "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
            "Query:",
            "document": "",
        },
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}


def written(folder: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def test_qwen3_embedding(tmp_path: Path) -> None:
    facts = load_embedding(written(tmp_path, QWEN3_EMBEDDING))
    assert (facts.pooling, facts.normalize, facts.default_prompt) == ("last", True, None)
    (query,), (document,), (plain,) = (
        list(facts.asked(["a fox"], 1024, prompt)) for prompt in ("query", "document", None)
    )
    assert (
        str(query[0]).startswith("Instruct: Given a web search query")
        and str(query[0])[-12:] == "\nQuery:a fox"
    )
    assert document[0] == plain[0] == "a fox"
    with pytest.raises(
        RequestError, match=r"no prompt 'qeury'; it has: 'document', 'query'. Did you mean 'query'"
    ):
        list(facts.asked(["a fox"], 1024, "qeury"))


def test_a_folder_without_them(tmp_path: Path) -> None:
    assert load_embedding(tmp_path) == EmbeddingFacts("last", True, {}, None)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": False}, "last"),
    ],
)
def test_pooling_in_both_spellings(tmp_path: Path, pooling: dict[str, Any], expected: str) -> None:
    assert load_embedding(written(tmp_path, {"1_Pooling/config.json": pooling})).pooling == expected


def test_the_default_prompt_stands_before_text_and_not_before_ids(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "Q: "}, "default_prompt_name": "query"}
    facts = load_embedding(written(tmp_path, {"config_sentence_transformers.json": prompts}))
    assert [text for text, _ in facts.asked(["a", [5]], 8)] == ["Q: a", [5]]
    assert [text for text, _ in facts.asked(["a"], 8, instruction="")] == ["a"]


def test_without_normalize_vectors_stay_as_they_are(tmp_path: Path) -> None:
    modules = {"modules.json": QWEN3_EMBEDDING["modules.json"][:2]}  # type: ignore[index]
    assert not load_embedding(written(tmp_path, modules)).normalize


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True},
            "pooling by cls is not supported; lasttoken",
        ),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "pooling by weightedmean is not"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            "pooling by max and mean is not",
        ),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "pooling by none is not"),
        (
            "1_Pooling/config.json",
            {"pooling_mode": "mean", "include_prompt": False},
            "include_prompt is false",
        ),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": 1},
            "pooling_mode_mean_tokens is 1, expected true",
        ),
        (
            "modules.json",
            [{"type": "sentence_transformers.models.Dense"}],
            "the module Dense is not supported",
        ),
        ("modules.json", [{"typ": "x"}], "is no list of modules"),
        ("modules.json", "[", "is no list of modules"),
        ("modules.json", {"a": 1}, "is no list of modules"),
        ("config_sentence_transformers.json", {"prompts": {"q": 3}}, "prompts.q is 3, expected a string"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"q": ""}, "default_prompt_name": "x"},
            "default_prompt_name is 'x', expected one of q",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, name: str, value: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as said:
        load_embedding(written(tmp_path, {name: value}))
    assert str(tmp_path / name) in str(said.value)


@pytest.mark.parametrize(("kind", "expected"), [(None, "last"), (0, "last"), (1, "mean"), (3, "last")])
def test_a_gguf_file_names_its_pooling(kind: int | None, expected: str) -> None:
    metadata = {"general.architecture": "qwen3"} | ({} if kind is None else {"qwen3.pooling_type": kind})
    assert gguf_embedding(metadata).pooling == expected


def test_a_gguf_file_of_another_pooling_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bert\.pooling_type is 2, but must be 1, the mean, or 3"):
        gguf_embedding({"general.architecture": "bert", "bert.pooling_type": 2})
