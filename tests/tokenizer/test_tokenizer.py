"""Folders as they are published, good and bad; encoding, BOS and EOS; the real Qwen2 and LLaMA files."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from tiny_llm.errors import ConfigError, RequestError
from tiny_llm.tokenizer.tokenizer import Tokenizer


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def test_tokenizer_json_alone_is_enough(small: Backend, folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    text = "Köln — 你好 🌍"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.has_chat_template) == (frozenset(), None, False)
    assert tokenizer.vocab_size == len(small.get_vocab())


@pytest.mark.parametrize(
    "eos", ["<|im_end|>", {"content": "<|im_end|>", "special": True}], ids=["string", "object"]
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_special_tokens_are_read_in_each_spelling(folder: Path, file: str, eos: object) -> None:
    write(folder, file, {"eos_token": eos, "bos_token": "<|im_start|>", "pad_token": None})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.eos_ids, tokenizer.bos_id) == (frozenset({2}), 1)


def test_the_config_wins_over_the_special_tokens_map(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    write(folder, "special_tokens_map.json", {"eos_token": "<|endoftext|>", "bos_token": "<|im_start|>"})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.eos_ids, tokenizer.bos_id) == (frozenset({2}), 1)


def test_special_tokens_in_a_text_become_their_ids_and_are_skipped_in_decode(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("<|im_start|>a<|im_end|><tool_call>")
    assert (ids[0], ids[2]) == (1, 2) and len(ids) == 4
    assert tokenizer.decode(ids) == "a<tool_call>", "<tool_call> is an added token, but not a special one"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a<|im_end|><tool_call>"


@pytest.mark.parametrize(
    ("processor", "add_bos", "expected"),
    [
        (False, None, 0),
        (False, True, 1),
        (False, False, 0),
        (True, None, 1),
        (True, True, 1),
        (True, False, 0),
    ],
)
def test_bos_comes_once_where_file_or_config_ask_for_it(
    small: Backend, folder: Path, processor: bool, add_bos: bool | None, expected: int
) -> None:
    backend = Backend.from_str(small.to_str())
    if processor:
        backend.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|endoftext|>"} | ({} if add_bos is None else {"add_bos_token": add_bos})
    write(folder, "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("the fox").count(0) == expected
    assert tokenizer.encode("the fox", add_special_tokens=False).count(0) == 0
    assert tokenizer.encode("")[:1] == [0] * expected


@pytest.mark.parametrize("add_bos", [None, False])
def test_an_end_that_the_post_processor_adds_stays(
    small: Backend, folder: Path, add_bos: bool | None
) -> None:
    """Qwen3-Embedding's config has add_bos_token false, and its texts lost their end by that."""
    backend = Backend.from_str(small.to_str())
    backend.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": None, "eos_token": "<|im_end|>"} | (
        {} if add_bos is None else {"add_bos_token": add_bos}
    )
    write(folder, "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("the fox")[-1] == 0 and tokenizer.encode("the fox").count(0) == 1
    assert tokenizer.encode("the fox", add_special_tokens=False).count(0) == 0


def test_truncation_left_in_the_file_does_not_cut_prompts(small: Backend, folder: Path) -> None:
    backend = Backend.from_str(small.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("the story of the fox")) == "the story of the fox"
    assert len(tokenizer.encode("a")) == 1


def test_a_batch_is_each_text_on_its_own(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    texts = ["", "the fox", "你好 " * 50]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\ud83d", "position 2.*surrogate"),
        ("\udc80", "position 0.*surrogate"),
        (b"bytes", "bytes, but must be a string"),
        (None, "NoneType, but must be a string"),
    ],
)
def test_what_is_no_text_is_refused(folder: Path, text: str, message: str) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(RequestError, match=message):
        tokenizer.encode(text)


def test_a_folder_without_tokenizer_json_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json.*convert"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "", "not a tokenizer that can be read"),
        ("tokenizer.json", '{"version": "1.0", "model": {', "not a tokenizer that can be read"),
        ("tokenizer.json", {"model": {"type": "Unheard"}}, "not a tokenizer that can be read"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", "[" * 100_000, "is not valid JSON"),
        ("tokenizer_config.json", ["a"], "holds a JSON list, expected an object"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token is 'yes'"),
        ("tokenizer_config.json", {"chat_template": 7}, "chat_template must be"),
        ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}, "chat_template must be"),
        ("tokenizer_config.json", {"chat_template": [{"name": "a", "template": 1}]}, "chat_template must be"),
        ("special_tokens_map.json", "nonsense", "is not valid JSON"),
        ("chat_template.json", "nonsense", "is not valid JSON"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, file: str, content: object, message: str) -> None:
    write(folder, file, content)
    with pytest.raises(ConfigError, match=message) as caught:
        Tokenizer.from_folder(folder)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value), "an error is one line"


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja", "tokenizer.json"])
def test_a_file_that_is_not_utf8_is_named(folder: Path, file: str) -> None:
    (folder / file).write_bytes(b'{"eos_token": "\xff\xfe"}')
    with pytest.raises(ConfigError, match=file):
        Tokenizer.from_folder(folder)


def test_stories260k_puts_bos_before_and_no_space_after(stories260k: Path) -> None:
    tokenizer = Tokenizer.from_folder(stories260k)
    ids = tokenizer.encode("Once upon a time")
    assert (ids[0], tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, 1, {2}, 512)
    assert tokenizer.decode(ids) == "Once upon a time", "the space that the encoder put first is taken off"
    assert tokenizer.decode(tokenizer.encode("é 你 🌍")) == "é 你 🌍", (
        "what the vocabulary lacks goes as bytes"
    )


def test_qwen2_gives_the_published_ids(qwen2: Tokenizer) -> None:
    assert qwen2.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert qwen2.encode("<|im_start|>user\n") == [151644, 872, 198]
    assert (qwen2.eos_ids, qwen2.bos_id, qwen2.vocab_size) == ({151645}, None, 151665)
    assert qwen2.decode([151644, 872, 198, 151645]) == "user\n"


@pytest.mark.slow
@pytest.mark.parametrize("plane", range(17))
def test_qwen2_round_trips_every_plane(qwen2: Tokenizer, plane: int) -> None:
    """Every 41st scalar value, alone and in one text; the tokenizer's own NFC is the only change.

    In the planes that have characters only assigned ones are taken: Python's and the
    library's tables may be of different Unicode versions.
    """
    points = range(plane * 0x10000 + plane, (plane + 1) * 0x10000, 41)
    chars = [chr(point) for point in points if not 0xD800 <= point <= 0xDFFF]
    if plane < 4 or plane == 14:
        chars = [char for char in chars if unicodedata.category(char) != "Cn"]
    assert chars, f"plane {plane} gave nothing to test"
    lost = {}
    for char, ids in zip(chars, qwen2.encode_batch(chars), strict=True):
        stream = qwen2.stream()
        back = "".join(map(stream.push, ids)) + stream.finish()
        if not back == qwen2.decode(ids) == unicodedata.normalize("NFC", char):
            lost[f"U+{ord(char):04X}"] = back
    assert not lost
    text = " ".join(chars)
    assert qwen2.decode(qwen2.encode(text)) == unicodedata.normalize("NFC", text)
