"""Tokenizers of GGUF metadata: the ids of the tokenizer.json that they were made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from tiny_llm.errors import ConfigError
from tiny_llm.tokenizer.gguf import end_ids, read_metadata
from tiny_llm.tokenizer.tokenizer import Tokenizer
from tiny_llm.weights.gguf.header import read_gguf

gguf = pytest.importorskip("gguf")
from write_gguf import add_tokenizer  # noqa: E402

TEXTS = (
    "The cache keeps keys and values, so that no token is computed twice.",
    "I'LL don't they've 12345 6 7.89  two  spaces\t\ttabs \n\n\n lines\r\n  ends  ",
    "Grüße aus Köln, naïve café — 你好世界! Привет 🌍👩‍🚀 ½ ² ٣٤",
    "<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{}</tool_call>",
    "</s> <s>x<unk> <0x0A> \u2581 \x00 \U0010ffff",
    "",
    " ",
)
Metadata = dict[str, Any]


def metadata_of(folder: Path, path: Path, pre: str = "qwen2") -> Metadata:
    """What the gguf package writes of a folder's tokenizer."""
    writer = gguf.GGUFWriter(str(path), "llama")
    add_tokenizer(writer, folder, pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return dict(read_gguf(path).metadata)


@pytest.fixture(scope="module", params=["demo", "qwen2_tokenizer_folder", "stories260k"])
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture
def metadata(folder: Path, tmp_path: Path) -> Metadata:
    return metadata_of(folder, tmp_path / "x.gguf")


def test_the_ids_of_the_tokenizer_it_was_made_from(
    folder: Path, metadata: Metadata, shared_data: Path
) -> None:
    ours, theirs = Tokenizer(read_metadata(metadata)), Tokenizer.from_folder(folder)
    stories = (shared_data / "text" / "tinystories_first40.jsonl").read_text()[:50_000]
    for text in (*TEXTS, stories):
        for special in (True, False):
            got = ours.encode(text, add_special_tokens=special)
            assert got == theirs.encode(text, add_special_tokens=special), repr(text[:80])
        ids = theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert [ours.token_bytes(i) for i in ids] == [theirs.token_bytes(i) for i in ids]
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (theirs.bos_id, theirs.eos_ids, theirs.vocab_size)
    assert ours.chat_template == theirs.chat_template


def test_answers_end_where_the_model_says_so(demo: Path, tmp_path: Path) -> None:
    metadata = metadata_of(demo, tmp_path / "x.gguf")
    assert metadata["tokenizer.ggml.eos_token_id"] == 2045
    assert end_ids(metadata) == {2043, 2045}, "<|endoftext|> and <|im_end|>"
    assert end_ids(metadata | {"tokenizer.ggml.eot_token_id": 7}) == {7, 2043, 2045}
    assert end_ids(metadata | {"tokenizer.ggml.eot_token_id": 10**6, "tokenizer.ggml.eom_token_id": -1}) == {
        2043,
        2045,
    }


SPLITS: dict[str, tokenizers.pre_tokenizers.PreTokenizer] = {
    "gpt-2": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}


@pytest.mark.parametrize("pre", sorted(SPLITS))
def test_words_are_cut_as_published(demo: Path, tmp_path: Path, pre: str) -> None:
    """GPT-2's and SmolLM's tokenizer.json, whose cuts are the library's own."""
    files = read_metadata(metadata_of(demo, tmp_path / "x.gguf", pre))
    for text in TEXTS:
        cut = files.backend.pre_tokenizer.pre_tokenize_str(text)
        assert cut == SPLITS[pre].pre_tokenize_str(text), repr(text)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("llama-bpe", ["I", "'LL", "Ġdon", "'t", "Ġ", "123", "45", ".", "ĠĠ", "Ġx", "!?Ċ"]),
        ("qwen2", ["I", "'LL", "Ġdon", "'t", "Ġ", "1", "2", "3", "4", "5", ".", "ĠĠ", "Ġx", "!?Ċ"]),
        ("tekken", ["I", "'LL", "Ġdon", "'t", "Ġ", "1", "2", "3", "4", "5", ".", "ĠĠ", "Ġx", "!?Ċ"]),
        ("default", ["I", "'", "LL", "Ġdon", "'", "t", "Ġ", "123", "45", ".", "ĠĠ", "Ġx", "!?", "Ċ"]),
    ],
)
def test_words_are_cut_as_llama_cpp_says(demo: Path, tmp_path: Path, pre: str, words: list[str]) -> None:
    files = read_metadata(metadata_of(demo, tmp_path / "x.gguf", pre))
    cut = files.backend.pre_tokenizer.pre_tokenize_str("I'LL don't 12345.   x!?\n")
    assert [word for word, _ in cut] == words
    assert files.add_bos is False, "the file says so"


def test_llama_3_begins_with_bos_unless_the_file_says_otherwise(demo: Path, tmp_path: Path) -> None:
    metadata = metadata_of(demo, tmp_path / "x.gguf", "llama-bpe") | {"tokenizer.ggml.bos_token_id": 2043}
    del metadata["tokenizer.ggml.add_bos_token"]
    assert Tokenizer(read_metadata(metadata)).encode("x")[0] == 2043
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert Tokenizer(read_metadata(metadata)).encode("x")[0] != 2043


def test_a_word_that_is_a_token_is_not_merged(demo: Path, tmp_path: Path) -> None:
    """LLaMA 3's way, and not Qwen2's: its vocabulary has words that no merges lead to."""
    for pre, whole in (("llama-bpe", True), ("qwen2", False)):
        metadata = metadata_of(demo, tmp_path / "x.gguf", pre)
        metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "zqzq"]
        metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
        assert (Tokenizer(read_metadata(metadata)).encode("zqzq") == [2048]) is whole, pre


def test_pieces_never_merge_to_a_control_token(stories260k: Path, tmp_path: Path) -> None:
    """SentencePiece's rule; a text that spells one is found before, but not where its letters are meant."""
    metadata = metadata_of(stories260k, tmp_path / "x.gguf")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokens[300], types[300], metadata["tokenizer.ggml.scores"][300] = "xz", 3, 0.0
    tokenizer = Tokenizer(read_metadata(metadata))
    assert 300 in tokenizer.encode("xz") and 300 not in tokenizer.text_encoder()("xz")


def test_rows_without_a_token_are_none(demo: Path, tmp_path: Path) -> None:
    """A converter fills a vocabulary up to the model's rows."""
    metadata = metadata_of(demo, tmp_path / "x.gguf")
    metadata["tokenizer.ggml.tokens"] += ["[PAD2048]", "[PAD2049]"]
    metadata["tokenizer.ggml.token_type"] += [5, 5]
    tokenizer = Tokenizer(read_metadata(metadata))
    assert tokenizer.vocab_size == 2048 and tokenizer.decode([2048]) == ""


def test_a_first_space_only_where_the_file_wants_it(stories260k: Path, tmp_path: Path) -> None:
    metadata = metadata_of(stories260k, tmp_path / "x.gguf")
    ours = Tokenizer(read_metadata(metadata | {"tokenizer.ggml.add_space_prefix": False}))
    assert ours.token_bytes(ours.encode("once")[1]) == b"on" and ours.decode(ours.encode(" x")[1:]) == " x"


def put(name: str, value: object) -> Callable[[Metadata], None]:
    return lambda metadata: metadata.update({f"tokenizer.{name}": value})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (put("ggml.model", "bert"), "tokenizer.ggml.model is 'bert', expected 'gpt2' or 'llama'"),
        (put("ggml.model", None), "tokenizer.ggml.model is missing"),
        (
            put("ggml.pre", "qwen1"),
            "tokenizer.ggml.pre is 'qwen1', a way to cut words that is not known here",
        ),
        (put("ggml.tokens", None), "tokenizer.ggml.tokens is missing or no array"),
        (put("ggml.tokens", [1]), "tokenizer.ggml.tokens holds other things than str"),
        (put("ggml.token_type", [1]), "tokenizer.ggml.token_type is missing or no array of 2048 items"),
        (put("ggml.merges", ["x"]), "does not fit together"),
        (put("ggml.merges", ["zq qz"]), "does not fit together"),
        (put("ggml.add_bos_token", 1), "tokenizer.ggml.add_bos_token is 1, expected true or false"),
    ],
)
def test_a_broken_tokenizer_is_refused(
    demo: Path, tmp_path: Path, change: Callable[[Metadata], None], what: str
) -> None:
    metadata = metadata_of(demo, tmp_path / "x.gguf")
    change(metadata)
    with pytest.raises(ConfigError) as error:
        read_metadata(metadata)
    assert what in str(error.value) and "\n" not in str(error.value)


def test_a_piece_of_endless_length_is_refused(stories260k: Path, tmp_path: Path) -> None:
    """Trying each place in it would take its length squared."""
    metadata = metadata_of(stories260k, tmp_path / "x.gguf")
    metadata["tokenizer.ggml.tokens"][300] = "x" * 10**6
    with pytest.raises(ConfigError, match="has 1000000 characters, over 1024"):
        read_metadata(metadata)


def test_what_is_no_template_is_none(demo: Path, tmp_path: Path) -> None:
    metadata = metadata_of(demo, tmp_path / "x.gguf")
    named = {"tokenizer.chat_template.tool_use": "{{ tools }}", "tokenizer.chat_templates": ["tool_use"]}
    assert set(read_metadata(metadata | named).templates) == {"default", "tool_use"}


def test_an_end_is_added_where_the_file_asks_for_it(demo: Path, tmp_path: Path) -> None:
    """Qwen3-Embedding's files do, and its BOS, which is not to be added, is the same token."""
    metadata = metadata_of(demo, tmp_path / "x.gguf")
    end = metadata["tokenizer.ggml.eos_token_id"]
    metadata |= {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.add_bos_token": False}
    metadata["tokenizer.ggml.bos_token_id"] = end
    tokenizer = Tokenizer(read_metadata(metadata))
    plain = tokenizer.encode("a fox", add_special_tokens=False)
    assert tokenizer.encode("a fox") == [*plain, end] and end not in plain
