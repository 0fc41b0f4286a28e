"""BPE by its definition: by hand, and as the library has it, merge by merge and id by id."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from tiny_llm.errors import ConfigError
from tiny_llm.tokenizer.bpe import BPE, merged, train
from tiny_llm.tokenizer.detokenizer import byte_alphabet

pytestmark = pytest.mark.chapter("0.1")

ROOT = Path(__file__).resolve().parents[2]
HUGS = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
TEXTS = (
    "Grüße aus Köln, naïve café — 你好世界! Привет 🌍👩‍🚀",
    "<|im_start|>user\nWhat is 48 + 35?<|im_end|>\n<|im_start|>assistant\n",
    "aaaa  aaa\n\n\n\n   tabs\tand  spaces ",
    "no mark: <|im_star t|> <|im_end",
    "",
)


def small(*merges: str, **special: int) -> BPE:
    """A vocabulary of letters and ``merges`` ("a b"); words are what spaces part."""
    pairs = [(left, right) for left, right in map(str.split, merges)]
    tokens = [*"abcdefghijklmnopqrstuvwxyz_", *("".join(pair) for pair in pairs)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return BPE(vocab, {pair: i for i, pair in enumerate(pairs)}, special, lambda text: text.split())


def texts_of(bpe: BPE, ids: list[int]) -> list[str]:
    """The tokens of ids."""
    names = {number: token for token, number in bpe.vocab.items()}
    return [names[number] for number in ids]


@pytest.fixture(scope="module")
def bundled() -> tuple[BPE, Backend]:
    """The bundled model's tokenizer: ours and the library's."""
    text = (ROOT / "tiny_llm" / "demo" / "tokenizer.json").read_text(encoding="utf-8")
    return BPE.from_json(text), Backend.from_str(text)


def test_merged_by_hand() -> None:
    assert merged(list("abcab"), ("a", "b")) == ["ab", "c", "ab"]
    assert merged(list("aaaaa"), ("a", "a")) == ["aa", "aa", "a"], "from the left, and no letter twice"
    assert merged(["ab", "c"], ("b", "c")) == ["ab", "c"], "whole tokens are compared"
    assert merged(["a", "bc"], ("a", "b")) == ["a", "bc"], "whole tokens are compared"
    mine = list("abc")
    assert merged(mine, ("a", "b")) == ["ab", "c"] and mine == ["a", "b", "c"], (
        "the list returned is a new one"
    )
    assert (same := merged(mine, ("b", "a"))) == mine and same is not mine, "where nothing is joined, too"
    assert merged(["a", "bc"], ("ab", "c")) == ["a", "bc"], "tokens are compared, not what they make"
    assert merged([], ("a", "b")) == [] and merged(["a"], ("a", "b")) == ["a"]


def test_training_by_hand() -> None:
    """u g stands in 20 words, u n in 16, then h ug in 15."""
    assert train(HUGS, 259) == [("u", "g"), ("u", "n"), ("h", "ug")]


def test_a_word_counts_as_often_as_it_stands_in_the_text() -> None:
    assert train({"ab": 9, "cd": 1, "cdx": 1, "cdy": 1}, 257) == [("a", "b")]


def test_of_equals_the_oldest_tokens_win() -> None:
    assert train({"xy": 3, "ab": 3}, 258) == [("a", "b"), ("x", "y")]
    assert train({"abc": 2}, 258) == [("a", "b"), ("ab", "c")]
    assert train({"bc": 3, "ad": 3}, 257) == [("a", "d")], "left tokens are compared before right ones"
    assert train({"Ġx": 3, "ab": 3}, 257) == [("a", "b")], "letters are as old as `sorted` has them"
    learnt = train({"ab": 9, "abx": 2, "cd": 2}, 258)
    assert learnt == [("a", "b"), ("c", "d")], "what was merged is younger than all letters"


def test_each_place_in_a_word_counts() -> None:
    assert train({"cdcd": 1, "ab": 1}, 257) == [("c", "d")]


def test_training_ends_when_nothing_is_left() -> None:
    assert train({"ab": 1}, 1000) == [("a", "b")]
    assert train({}, 300) == []
    assert train(HUGS, 256) == train(HUGS, 100) == [], "the letters alone are 256"


def test_the_library_learns_the_same_merges(bundled: tuple[BPE, Backend]) -> None:
    bpe, backend = bundled
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    corpus = [*licence.splitlines(keepends=True)[:80], *TEXTS]
    theirs = Backend(models.BPE())
    theirs.pre_tokenizer = backend.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert set(alphabet) == set(byte_alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator(corpus, trainer)
    learnt = [tuple(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]
    ours = train(Counter(word for text in corpus for word in bpe.split(text)), 400)
    assert ours == learnt and len(ours) == 144


def test_what_was_learnt_first_is_merged_first() -> None:
    bpe = small("b c", "a b")
    assert texts_of(bpe, bpe.encode_word("abc")) == ["a", "bc"], "the leftmost pair is not the first learnt"
    bpe = small("a b", "ab c", "c d")
    assert texts_of(bpe, bpe.encode_word("abcd")) == ["abc", "d"]
    assert texts_of(bpe, bpe.encode_word("z")) == ["z"] and bpe.encode_word("") == []
    bpe = small("a a")
    assert texts_of(bpe, bpe.encode_word("aaa")) == ["aa", "a"], "from the left on"
    bpe = small("ab c", "a b")
    assert texts_of(bpe, bpe.encode_word("abc")) == ["abc"], "after each merge all pairs are looked at again"


def test_ranks_alone_say_what_was_learnt_first() -> None:
    vocab = {"ab": 0, "bc": 1, "a": 2, "b": 3, "c": 4, "abc": 5}
    bpe = BPE(vocab, {("a", "b"): 1, ("b", "c"): 0}, {}, str.split)
    assert texts_of(bpe, bpe.encode_word("abc")) == ["a", "bc"], "not ids, nor the order of a dictionary"
    assert texts_of(bpe, bpe.encode_word("ab")) == ["ab"]
    many = {(str(rank), "z"): rank for rank in range(12_000)}
    late = BPE(vocab, {**many, ("a", "b"): 12_000}, {}, str.split)
    assert texts_of(late, late.encode_word("abc")) == ["ab", "c"], "however many merges there are"
    assert bpe.encode("ab ab") == [0, 0]
    assert BPE(vocab, {("b", "a"): 0}, {}, str.split).encode("ab ab") == [2, 3, 2, 3], (
        "no token crosses from one word into another"
    )


def test_special_tokens_are_found_before_anything_is_split() -> None:
    bpe = small("a b", **{"_ab_": 100, "_ab_ab_": 101})
    assert bpe.encode("ab_ab_ab") == [*bpe.encode_word("ab"), 100, *bpe.encode_word("ab")]
    assert bpe.encode("_ab_ab_") == [101], "the longest special token wins"
    assert bpe.encode("_ab_ _ab_") == [100, 100] and bpe.encode("") == []
    bpe = small("a b", **{"<|x|>": 100, "<|": 101})
    assert bpe.encode("<|x|>ab<|ab") == [100, *bpe.encode_word("ab"), 101, *bpe.encode_word("ab")]
    bpe = small("a b", a=100, bcd=101, abc=102)
    assert bpe.encode("bcdabcd") == [101, 102, *bpe.encode_word("d")], "what begins first comes first"
    bpe = small("a b", **{"ab": 100})
    assert bpe.encode("ab") == [100], "a name may be a token, too, of another id"
    assert small("a b").encode("ab ab") == 2 * bpe.encode_word("ab"), "there may be no special tokens"


def test_what_lies_between_special_tokens_is_split_as_it_is() -> None:
    """A split that keeps spaces, as the bundled model's does."""
    letters = small("a b")
    spaces = BPE({**letters.vocab, " ": 99}, letters.ranks, {"_x_": 100}, lambda text: [text] if text else [])
    assert spaces.encode("_x_ ab _x_") == [100, 99, *letters.encode_word("ab"), 99, 100]


def test_a_special_token_is_its_own_text() -> None:
    bpe = small("a b", **{"<|grüße an alle|>": 100})
    assert bpe.decode([*bpe.encode_word("ab"), 100]) == "ab<|grüße an alle|>"
    both = BPE({**bpe.vocab, "<|grüße an alle|>": 100}, bpe.ranks, bpe.special, bpe.split)
    assert both.decode([100]) == "<|grüße an alle|>", "published files have them among the tokens, too"


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_library_s(bundled: tuple[BPE, Backend], text: str) -> None:
    bpe, backend = bundled
    ids = bpe.encode(text)
    assert ids == backend.encode(text, add_special_tokens=False).ids
    assert bpe.decode(ids) == backend.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=40)
@given(st.text(max_size=30))
def test_any_text_comes_back(bundled: tuple[BPE, Backend], text: str) -> None:
    bpe, backend = bundled
    ids = bpe.encode(text)
    assert ids == backend.encode(text, add_special_tokens=False).ids and bpe.decode(ids) == text


def test_a_character_may_lie_across_tokens(bundled: tuple[BPE, Backend]) -> None:
    bpe, _ = bundled
    ids = bpe.encode("🌍")
    assert len(ids) > 1 and bpe.decode(ids) == "🌍", "bytes are joined before they are read as UTF-8"
    assert bpe.decode(ids[:1]) == "\ufffd"


def test_another_kind_of_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="no byte-level BPE"):
        BPE.from_json(Backend(models.BPE()).to_str())
