"""Byte-level BPE in the open: what the library ``tokenizers`` computes, as plain Python. Chapter 0.1.

Owns training, encoding and decoding by their definition; tests hold the library to it, which is some
hundred times as fast and serves. Words and tokens are written in letters that each stand for one byte
(``detokenizer.byte_alphabet``). Refuses to know chats and models.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import tokenizers

from tiny_llm.errors import ConfigError
from tiny_llm.tokenizer.detokenizer import byte_alphabet

Pair = tuple[str, str]


def merged(tokens: Sequence[str], pair: Pair) -> list[str]:
    """Return ``tokens`` with each ``pair`` of neighbours joined, from the left on."""
    result = list[str]()
    for token in tokens:
        if result and (result[-1], token) == pair:
            result[-1] = "".join(pair)
        else:
            result.append(token)
    return result


def train(counts: Mapping[str, int], vocab_size: int) -> list[Pair]:
    """Return the merges of a vocabulary of ``vocab_size`` tokens: the 256 letters, then what merges make.

    ``counts`` says how often each word is in the text. The commonest pair of neighbours is merged in all
    words, again and again; of equals, the one whose tokens are oldest. Ends early if no pair is left.
    Source: Sennrich et al. 2016, section 3.2.
    """
    age = {letter: number for number, letter in enumerate(sorted(byte_alphabet()))}
    words = {word: list(word) for word in counts}
    merges = list[Pair]()
    while len(age) < vocab_size:
        pairs = Counter[Pair]()
        for word, tokens in words.items():
            for pair in pairwise(tokens):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], age[pair[0]], age[pair[1]]))
        merges.append(best)
        age["".join(best)] = len(age)
        words = {word: merged(tokens, best) for word, tokens in words.items()}
    return merges


@dataclass(frozen=True)
class BPE:
    """A vocabulary with its merges, as in a tokenizer.json.

    ``ranks`` numbers the merges; ``special`` are the added tokens, found before anything is split;
    ``split`` cuts a text into words, in letters: no token crosses from one into another.
    """

    vocab: Mapping[str, int]
    ranks: Mapping[Pair, int]
    special: Mapping[str, int]
    split: Callable[[str], Sequence[str]]

    @classmethod
    def from_json(cls, text: str) -> BPE:
        """Read a tokenizer.json. Raises ConfigError unless it is a byte-level BPE without a normalizer."""
        spec, backend = json.loads(text), tokenizers.Tokenizer.from_str(text)
        decoder = (spec["decoder"] or {}).get("type")
        if spec["model"]["type"] != "BPE" or decoder != "ByteLevel" or spec["normalizer"]:
            raise ConfigError("tokenizer.json is no byte-level BPE; use the library for it.")

        def split(text: str) -> list[str]:
            return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

        ranks = {(left, right): rank for rank, (left, right) in enumerate(spec["model"]["merges"])}
        special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        return cls(spec["model"]["vocab"], ranks, special, split)

    def encode_word(self, word: str) -> list[int]:
        """Return the ids of one word: of all pairs in it, the merge that was learnt first comes first."""
        tokens: Sequence[str] = list(word)
        while len(tokens) > 1:
            best = min(pairwise(tokens), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            tokens = merged(tokens, best)
        return [self.vocab[token] for token in tokens]

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``. A special token written in it becomes its one id, the longest first."""
        names = sorted(self.special, key=len, reverse=True)
        marks = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        ids, begin = list[int](), 0
        for mark in [*marks.finditer(text), None]:
            for word in self.split(text[begin : mark.start() if mark else len(text)]):
                ids += self.encode_word(word)
            if mark:
                ids.append(self.special[mark[0]])
                begin = mark.end()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        token_of = {number: token for token, number in self.vocab.items()}
        name_of = {number: name for name, number in self.special.items()}
        byte_of = byte_alphabet()
        parts = (
            name_of[number].encode() if number in name_of else bytes(byte_of[c] for c in token_of[number])
            for number in ids
        )
        return b"".join(parts).decode("utf-8", "replace")
