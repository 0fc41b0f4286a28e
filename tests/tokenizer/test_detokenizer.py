"""Streamed pieces join to exactly what decoding all ids at once gives, whatever the ids."""

from __future__ import annotations

import codecs
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from tiny_llm.errors import RequestError
from tiny_llm.tokenizer.detokenizer import _ByteLevel
from tiny_llm.tokenizer.files import TokenizerFiles
from tiny_llm.tokenizer.tokenizer import Tokenizer

TEXTS = (
    "Hello, world! The fox ends well.",
    " two  spaces   ahead ",
    "naïve café — Grüße",
    "你好世界 Привет",
    "🌍👩‍🚀🇩🇪 family: 👨‍👩‍👧‍👦",
    "tab\tnewline\n\r\n\x00\x7f",
    "\U0001d518\U0001d52b 𐍈 \U0010ffff",
)


def tokenizer_of(backend: Backend) -> Tokenizer:
    return Tokenizer(TokenizerFiles(backend, special_tokens={}, templates={}, add_bos=None))


def pieces_of(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip_special_tokens)
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


@pytest.fixture(scope="session")
def byte_ids(backend: Backend) -> list[int]:
    """Ids of single bytes: <0xE4> tokens, or GPT-2's letters for bytes."""
    vocab = backend.get_vocab()
    return sorted(i for token, i in vocab.items() if re.fullmatch("<0x..>", token) or len(token) == 1)


@pytest.mark.slow
@settings(max_examples=120)
@given(data=st.data(), skip=st.booleans())
def test_pieces_join_to_the_decode_of_random_ids(
    backend: Backend, byte_ids: list[int], data: st.DataObject, skip: bool
) -> None:
    tokenizer = tokenizer_of(backend)
    added = sorted(backend.get_added_tokens_decoder())
    token_ids = st.one_of(
        st.sampled_from(byte_ids),
        st.sampled_from(added),
        st.integers(0, tokenizer.vocab_size + 20),
    )
    ids = data.draw(st.lists(token_ids, max_size=30))
    pieces = pieces_of(tokenizer, ids, skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip), f"{ids} gave {pieces}"


@settings(max_examples=80)
@given(text=st.one_of(st.sampled_from(TEXTS), st.text(max_size=30)))
def test_pieces_join_to_the_decode_of_any_text(backend: Backend, text: str) -> None:
    tokenizer = tokenizer_of(backend)
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids), f"{text!r} as {ids} gave {pieces}"


@pytest.mark.slow
@settings(max_examples=150)
@given(data=st.data())
def test_an_answer_is_what_it_adds_to_the_prompt(backend: Backend, data: st.DataObject) -> None:
    """decode(prompt + answer)[len(decode(prompt)):], wherever the two are cut, streamed as well as copied."""
    tokenizer = tokenizer_of(backend)
    text = data.draw(st.one_of(st.sampled_from(TEXTS), st.text(max_size=30)))
    spare = st.integers(0, backend.get_vocab_size() - 1)
    ids = [*tokenizer.encode(text), *data.draw(st.lists(spare, max_size=12))]
    cut = data.draw(st.integers(0, len(ids)))
    prompt, answer = ids[:cut], ids[cut:]
    stream = tokenizer.stream(prompt)
    copied = stream.copy()
    expected = tokenizer.decode(ids)[len(tokenizer.decode(prompt)) :]
    for one in (stream, copied):
        got = "".join(one.push(token_id) for token_id in answer) + one.finish()
        assert got == expected, f"{prompt} + {answer}"


def test_a_continuation_keeps_its_first_space(llama: Backend) -> None:
    """Sentencepiece's mark is dropped at the beginning of a text, and only there."""
    tokenizer = tokenizer_of(llama)
    prompt, answer = tokenizer.encode("The cache"), [llama.token_to_id("▁t"), llama.token_to_id("▁t")]
    stream = tokenizer.stream(prompt)
    assert [stream.push(token_id) for token_id in answer] == [" t", " t"]
    assert [tokenizer.stream().push(token_id) for token_id in answer] == ["t", "t"]


def bytes_as_letters() -> list[str]:
    """GPT-2's letter for each byte."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(spare)) for byte in range(256)]


@pytest.mark.chapter("0.1")
def test_a_push_gives_one_piece_and_an_added_token_is_its_own_text() -> None:
    step = _ByteLevel()
    assert step.push("ab") == ("ab",), "a tuple of one piece, and not one for each letter"
    assert [*step.push("<|grüße an alle|>")] == ["<|grüße an alle|>"]
    assert [*step.push("Ã")] == [""], "half an ü waits"
    assert [*step.push("¼")] == ["ü"]
    assert [*step.push("ÿ")] == ["\ufffd"], "what is no UTF-8 is shown"
    assert [*step.push("Ã"), *step.push("a")] == ["", "\ufffda"], "and so is what never got its last byte"


@pytest.mark.chapter("0.1")
@pytest.mark.parametrize("text", TEXTS)
def test_a_character_comes_with_its_last_byte_and_not_before(small: Backend, text: str) -> None:
    tokenizer = tokenizer_of(small)
    ids = [token_id for char in text for token_id in tokenizer.encode(char)]
    stream, expected, shown = tokenizer.stream(), codecs.getincrementaldecoder("utf-8")(), ""
    letters = {token_id: token for token, token_id in small.get_vocab().items()}
    as_byte = {letter: byte for byte, letter in enumerate(bytes_as_letters())}
    for token_id in ids:
        complete = expected.decode(bytes(as_byte[letter] for letter in letters[token_id]))
        piece = stream.push(token_id)
        assert piece == complete, f"after {shown!r}: {piece!r} was shown, {complete!r} was complete"
        shown += piece
    assert stream.finish() == "", "all was complete, nothing may be held"


@pytest.mark.chapter("0.1")
def test_an_unfinished_character_is_held_until_finish(small: Backend) -> None:
    tokenizer = tokenizer_of(small)
    letters = bytes_as_letters()
    first, second = (small.token_to_id(letters[byte]) for byte in "你".encode()[:2])
    stream = tokenizer.stream()
    assert [stream.push(first), stream.push(second)] == ["", ""]
    assert stream.finish() == "\ufffd" == tokenizer.decode([first, second])


def test_a_run_of_fallback_bytes_is_certain_only_at_its_end(llama: Backend) -> None:
    tokenizer = tokenizer_of(llama)
    valid = [llama.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode()]
    wrong, word = llama.token_to_id("<0xFF>"), llama.token_to_id("▁t")
    assert pieces_of(tokenizer, [*valid, word]) == ["", "", "", "你 t", ""]
    # One wrong byte spoils the run: had 你 been shown, it would have to be taken back.
    spoilt = [*valid, wrong, word]
    assert pieces_of(tokenizer, spoilt) == ["", "", "", "", "\ufffd" * 4 + " t", ""]
    assert tokenizer.decode(spoilt) == "\ufffd" * 4 + " t"


@pytest.mark.parametrize("bad", [-1, 2**32, "7", None, 1.5])
def test_what_cannot_be_an_id_is_refused(small: Backend, bad: object) -> None:
    tokenizer = tokenizer_of(small)
    with pytest.raises(RequestError, match="whole number"):
        tokenizer.stream().push(bad)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="whole numbers"):
        tokenizer.decode([bad])  # type: ignore[list-item]


def test_streams_do_not_share_state(small: Backend) -> None:
    tokenizer = tokenizer_of(small)
    ids = tokenizer.encode("你好 🌍")
    one, two = tokenizer.stream(), tokenizer.stream()
    shown = ["", ""]
    for token_id in ids:
        shown[0] += one.push(token_id)
        shown[1] += two.push(token_id)
    assert [text + stream.finish() for text, stream in zip(shown, (one, two), strict=True)] == ["你好 🌍"] * 2
