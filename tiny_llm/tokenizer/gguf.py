"""The tokenizer that a GGUF file's metadata describes, as the same files would be read from a folder.

Owns the keys ``tokenizer.*`` and llama.cpp's names for how texts are cut into words. Two kinds: byte-level
BPE with its merges ("gpt2"), and SentencePiece's BPE, whose merges follow from its scores ("llama").
Source of the expressions: llama.cpp's src/llama-vocab.cpp, and the tokenizer.json that each was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from tiny_llm.config_fields import Fields
from tiny_llm.errors import ConfigError, did_you_mean
from tiny_llm.tokenizer.files import TokenizerFiles

_T = TypeVar("_T")
_LONGEST = 1024  # characters of a token: merges are found by trying every place in it
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST
)
_CUTS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("gpt-2", "olmo", "phi-2", "mpt"): (_GPT2,),
    ("smollm", "starcoder", "refact", "command-r", "exaone"): (r"\p{N}", _GPT2),
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan"): (_WORDS % r"\p{N}",),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"): (_WORDS % r"\p{N}{1,3}",),
    ("tekken",): (_TEKKEN,),
    ("default",): (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_NFC = ("qwen2", "deepseek-r1-qwen")  # their tokenizer.json composes characters first
# a word that is a token is not merged
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
_ENDS = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"}
    | {"<|endoftext|>", "<|end_of_text|>"}
)
"""Control tokens that end an answer wherever they occur, as llama.cpp has it: files name but one or two."""
_SPACE = "\u2581"


class _Type(IntEnum):
    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def read_metadata(metadata: Mapping[str, object]) -> TokenizerFiles:
    """Return the tokenizer of a GGUF file's metadata. Raises ConfigError for one that cannot be used."""
    fields = Fields(metadata)
    kind = fields.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise fields.wrong("tokenizer.ggml.model", "'gpt2' or 'llama'")
    tokens = _list(metadata, "tokens", str)
    types = _list(metadata, "token_type", int, len(tokens))
    # a converter fills up the vocabulary to the model's rows
    vocab = {t: i for i, t in enumerate(tokens) if types[i] != _Type.UNUSED or t != f"[PAD{i}]"}
    special = {f"{name}_token": tokens[i] for name, i in _ids(fields, len(tokens)).items() if name in _ROLES}
    pre = fields.text("tokenizer.ggml.pre", "default")
    try:
        if kind == "gpt2":
            backend = _byte_level(metadata, vocab, pre)
        else:
            backend = _sentencepiece(metadata, tokens, types, vocab, special.get("unk_token"))
        backend.add_tokens(
            [
                AddedToken(text, special=types[i] != _Type.USER_DEFINED, normalized=False)
                for text, i in vocab.items()
                if types[i] in (_Type.UNKNOWN, _Type.CONTROL, _Type.USER_DEFINED)
            ]
        )
    except ConfigError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"The file's tokenizer does not fit together ({error}).") from error
    templates = {
        name.removeprefix("tokenizer.chat_template").lstrip(".") or "default": text
        for name, text in metadata.items()
        if name.startswith("tokenizer.chat_template") and isinstance(text, str)
    }
    if fields.flag("tokenizer.ggml.add_eos_token", False) and (end := special.get("eos_token")):
        ends = [(end, vocab[end])]
        backend.post_processor = processors.TemplateProcessing(single=["$A", end], special_tokens=ends)
    add_bos = fields.flag("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _WHOLE_WORDS)
    return TokenizerFiles(backend, special, templates, add_bos)


def end_ids(metadata: Mapping[str, object]) -> frozenset[int]:
    """Every token that ends an answer: those that the file names, and those that are known to."""
    tokens = _list(metadata, "tokens", str)
    types = _list(metadata, "token_type", int, len(tokens))
    known = {i for i, text in enumerate(tokens) if text in _ENDS and types[i] == _Type.CONTROL}
    named = _ids(Fields(metadata), len(tokens))
    return frozenset(known | {named[role] for role in ("eos", "eot", "eom") if role in named})


_ROLES = ("bos", "eos", "unk", "pad")
_SENTENCEPIECE: Mapping[str, int] = {"bos": 1, "eos": 2, "unk": 0}


def _ids(fields: Fields, count: int) -> dict[str, int]:
    """Ids of tokens that have a role; what is out of range has none."""
    found = dict(_SENTENCEPIECE) if fields.get("tokenizer.ggml.model") == "llama" else {}
    names = {"unk": "unknown", "pad": "padding"}
    for role in (*_ROLES, "eot", "eom"):
        value = fields.get(f"tokenizer.ggml.{names.get(role, role)}_token_id")
        if isinstance(value, int):
            found[role] = value
    return {role: at for role, at in found.items() if 0 <= at < count}


def _list(
    metadata: Mapping[str, object], name: str, kind: type[_T], count: int | None = None
) -> Sequence[_T]:
    """An array of the tokenizer's. Raises ConfigError unless it is one of ``count`` items of this kind."""
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or (count is not None and len(value) != count):
        size = f" of {count} items" if count is not None else ""
        raise ConfigError(
            f"tokenizer.ggml.{name} is missing or no array{size}. Take a file with its tokenizer."
        )
    if not all(isinstance(item, kind) for item in value):
        raise ConfigError(f"tokenizer.ggml.{name} holds other things than {kind.__name__}.")
    return value


def _byte_level(metadata: Mapping[str, object], vocab: dict[str, int], pre: str) -> tokenizers.Tokenizer:
    cuts = next((cuts for names, cuts in _CUTS.items() if pre in names), None)
    if cuts is None:
        known = [name for names in _CUTS for name in names]
        raise ConfigError(
            f"tokenizer.ggml.pre is {pre!r}, a way to cut words that is not known here; known are "
            f"{', '.join(known)}.{did_you_mean(pre, known)}"
        )
    merges = [merge.partition(" ") for merge in _list(metadata, "merges", str)]
    pairs = [(left, right) for left, _, right in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre in _WHOLE_WORDS))
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    metadata: Mapping[str, object],
    tokens: Sequence[str],
    types: Sequence[int],
    vocab: dict[str, int],
    unknown: str | None,
) -> tokenizers.Tokenizer:
    scores = _list(metadata, "scores", float, len(tokens))
    merges = _merges({text: scores[i] for text, i in vocab.items() if types[i] == _Type.NORMAL})
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = Fields(metadata).flag("tokenizer.ggml.add_space_prefix", True)
    start = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", _SPACE)])
    end = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    return backend


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that is a piece, the best first; of one piece's, the longest left part."""
    longest = max(map(len, scores), default=0)
    if longest > _LONGEST:
        raise ConfigError(f"A token of the file's tokenizer has {longest} characters, over {_LONGEST}.")
    return [
        (text[:at], text[at:])
        for text in sorted(scores, key=scores.__getitem__, reverse=True)
        for at in range(len(text) - 1, 0, -1)
        if text[:at] in scores and text[at:] in scores
    ]
