"""Small tokenizers made on the spot, one for each kind of decoder, and the real ones where they lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tiny_llm.tokenizer.tokenizer import Tokenizer

CORPUS = (
    "The cache keeps keys and values, so that no token is computed twice.",
    "Twelve and thirty are forty-two; the story of the fox ends well.",
    "Grüße aus Köln, naïve café — 你好世界! Привет 🌍👩‍🚀 e\u0301",
) * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Backend:
    """GPT-2's way, as Qwen and LLaMA 3 have it."""
    tokenizer = Backend(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("ßpécial 世", special=False)])
    return tokenizer


def byte_fallback(decoder: decoders.Decoder | None) -> Backend:
    """Sentencepiece's way: a mark for spaces, and <0xE4> tokens for what the vocabulary lacks."""
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=150, initial_alphabet=["▁"], limit_alphabet=40, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁▁", "▁▁▁"]
    vocab = {token: at for at, token in enumerate(dict.fromkeys([*tokens, *learnt["vocab"]]))}
    merges = [(left, right) for left, right in learnt["merges"]]
    tokenizer = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def _llama() -> decoders.Decoder:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])


MADE: Mapping[str, Callable[[], Backend]] = {
    "byte level": byte_level,
    "llama": lambda: byte_fallback(_llama()),
    "gemma": lambda: byte_fallback(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ),
    "metaspace": lambda: byte_fallback(decoders.Metaspace()),
    "metaspace, never prepended": lambda: byte_fallback(decoders.Metaspace(prepend_scheme="never")),
    "fallback, then metaspace": lambda: byte_fallback(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    ),
    "replace by pattern, strip each": lambda: byte_fallback(
        decoders.Sequence([decoders.Replace(Regex("▁+|e"), "_"), decoders.Strip("_", 1, 0)])
    ),
    "strip three": lambda: byte_fallback(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 3, 0)])
    ),
    "none": lambda: byte_fallback(None),
    "wordpiece (cannot be cut)": lambda: byte_fallback(decoders.WordPiece(prefix="▁")),
    "fused, then replaced (cannot be cut)": lambda: byte_fallback(
        decoders.Sequence([decoders.Fuse(), decoders.Replace("▁t", "~")])
    ),
}


@pytest.fixture(scope="session", params=[*MADE, "stories260K", "qwen2", "demo"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each tokenizer in turn; the real ones skip where there are none."""
    if request.param in MADE:
        return MADE[request.param]()
    fixture = {"stories260K": "stories260k", "qwen2": "qwen2_tokenizer_folder", "demo": "demo"}[request.param]
    folder = request.getfixturevalue(fixture)
    return Backend.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def small() -> Backend:
    """A byte-level tokenizer of 400 tokens."""
    return byte_level()


@pytest.fixture(scope="session")
def llama() -> Backend:
    """A byte-fallback tokenizer with LLaMA's chain of decoders."""
    return byte_fallback(_llama())


@pytest.fixture(scope="session")
def qwen2(qwen2_tokenizer_folder: Path) -> Tokenizer:
    """Qwen2.5's published tokenizer and template, read once."""
    return Tokenizer.from_folder(qwen2_tokenizer_folder)


@pytest.fixture
def folder(small: Backend, tmp_path: Path) -> Path:
    """A model's folder with that tokenizer.json and nothing beside it."""
    small.save(str(tmp_path / "tokenizer.json"))
    return tmp_path
