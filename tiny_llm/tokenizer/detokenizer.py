"""Ids to text, one at a time: pieces that join to exactly what decoding all ids at once gives.

A ``tokenizer.json`` names its decoder as a chain of small steps. Each step here does
the same work on a stream, and lets go of text only when no later token can change it.
Owns that chain. Refuses to know sampling, stop strings and chat.

Cost is linear in the number of tokens: nothing is decoded twice.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any, Self

import tokenizers
from tokenizers import Regex, decoders

from tiny_llm.errors import RequestError

# Rust parses the two digits with from_str_radix, which takes a plus sign.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")
_PROMPT_TOKENS = 8  # more than the bytes of an unfinished character, and the spaces that a decoder strips


class _DecodeStep:
    """One decoder of the chain, fed token by token. Its memory is its fields, none of which is changed."""

    def push(self, token: str) -> Iterable[str]:
        raise NotImplementedError

    def finish(self) -> Iterable[str]:
        """What was held back."""
        return ()

    def copy(self) -> Self:
        """A step that has seen the same tokens."""
        return copy(self)


class _Each(_DecodeStep):
    """A step that treats every token alone (Replace, and Strip before Fuse)."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode = decode

    def push(self, token: str) -> Iterable[str]:
        return (self._decode([token]),)


class _ByteLevel(_DecodeStep):
    """GPT-2's bytes written as letters: join the bytes, read them as UTF-8.

    Python's incremental decoder holds an unfinished character back and replaces
    invalid bytes by the same rule as Rust (Unicode 15, 3.9, "maximal subparts").
    """

    def __init__(self) -> None:
        self._byte_of = byte_alphabet()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> Iterable[str]:
        """Return one piece: the text that is certain now. An unfinished character waits for its last byte."""
        return (self._utf8.decode(self.bytes_of(token)),)

    def bytes_of(self, token: str) -> bytes:
        """The bytes whose letters are ``token``."""
        try:
            return bytes([self._byte_of[char] for char in token])
        except KeyError:  # an added token is written as itself
            return token.encode()

    def finish(self) -> Iterable[str]:
        return (self._utf8.decode(b"", final=True),)

    def copy(self) -> Self:
        """The decoder holds the bytes of an unfinished character."""
        other = copy(self)
        other._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        other._utf8.setstate(self._utf8.getstate())
        return other


class _ByteFallback(_DecodeStep):
    """Sentencepiece's ``<0xE4>`` tokens: a run of them is text only as a whole.

    One wrong byte turns every byte of its run into U+FFFD, so a run stays here
    until another token ends it.
    """

    def __init__(self) -> None:
        self._run = b""

    def push(self, token: str) -> Iterable[str]:
        if match := _BYTE_TOKEN.fullmatch(token):
            self._run += bytes([int(match[1], 16)])
            return ()
        return (*self.finish(), token)

    def finish(self) -> Iterable[str]:
        run, self._run = self._run, b""
        if not run:
            return ()
        try:
            return (run.decode(),)
        except UnicodeDecodeError:
            return ("\ufffd",) * len(run)


class _Metaspace(_DecodeStep):
    """Sentencepiece's mark for a space; the first token loses it if the encoder put it there."""

    def __init__(self, mark: str, drop_first: bool) -> None:
        self._mark, self._replacement = mark, "" if drop_first else " "

    def push(self, token: str) -> Iterable[str]:
        replacement, self._replacement = self._replacement, " "
        return (token.replace(self._mark, replacement),)

    def with_spaces(self, token: str) -> str:
        """The token as it reads in the middle of a text."""
        return token.replace(self._mark, " ")


class _StripStart(_DecodeStep):
    """Strip after Fuse: up to ``count`` leading characters of the whole text."""

    def __init__(self, char: str, count: int) -> None:
        self._char, self._count = char, count

    def push(self, token: str) -> Iterable[str]:
        while token and self._count:
            if token[0] != self._char:
                self._count = 0
                break
            token, self._count = token[1:], self._count - 1
        return (token,)


class _SpaceJoin(_DecodeStep):
    """No decoder at all: tokens with a space between."""

    def __init__(self) -> None:
        self._gap = ""

    def push(self, token: str) -> Iterable[str]:
        gap, self._gap = self._gap, " "
        return (gap + token,)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's table from letter to byte: printable bytes are themselves, the rest go from U+0100 upwards.

    Printable are 0x21 to 0x7E, 0xA1 to 0xAC and 0xAE to 0xFF. Bytes and letters rise together in each part.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _token_step(spec: Mapping[str, Any]) -> _DecodeStep | None:
    """The step for a decoder that still sees tokens, or None where there is no streaming one."""
    match spec["type"]:
        case "ByteLevel":
            return _ByteLevel()
        case "ByteFallback":
            return _ByteFallback()
        case "Metaspace":
            return _Metaspace(spec["replacement"], spec["prepend_scheme"] != "never")
        case "Replace":
            pattern = spec["pattern"]
            regex = Regex(pattern["Regex"]) if "Regex" in pattern else pattern["String"]
            return _Each(decoders.Replace(regex, spec["content"]).decode)
        case "Strip":
            return _Each(decoders.Strip(spec["content"], spec["start"], spec["stop"]).decode)
        case _:
            return None


def _steps(backend: tokenizers.Tokenizer) -> list[_DecodeStep] | None:
    """The tokenizer's decoder as streaming steps; None when it must see all tokens at once."""
    if backend.decoder is None:
        return [_SpaceJoin()]
    spec = json.loads(backend.decoder.__getstate__())
    steps: list[_DecodeStep] = []
    fused = False
    for part in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
        step: _DecodeStep | None
        if part["type"] == "Fuse":
            fused = True
            continue
        if not fused:
            step = _token_step(part)
        elif part["type"] == "Strip" and part["stop"] == 0:
            step = _StripStart(part["content"], part["start"])
        else:
            step = None
        if step is None:
            return None
        steps.append(step)
        fused = fused or part["type"] == "ByteLevel"
    return steps


class StreamDetokenizer:
    """One answer's text as its tokens come: what they add to the text of the prompt before them.

    ``"".join(push(i) for i in ids) + finish() == decode(prompt + ids)[len(decode(prompt)) :]``, for any ids.
    A first token loses its space in some vocabularies; one behind a prompt keeps it.
    No piece ends inside a character. A decoder of a kind that cannot be cut (CTC,
    WordPiece ...) gives its text at ``finish``: late, but exact.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, skipped: frozenset[str] = frozenset(), prompt: Sequence[int] = ()
    ) -> None:
        """Stream ``backend``'s decoder behind ``prompt``; tokens with a text in ``skipped`` give nothing."""
        self._backend = backend
        self._skipped = skipped
        self._steps = _steps(backend)
        self._held: list[str] = []
        self._prompt_left = 0  # characters that are the prompt's, and come later
        for token_id in self._end_of(prompt):
            self.push(token_id)
        self._prompt_left = len(self.copy().finish())

    def copy(self) -> StreamDetokenizer:
        """One that has seen the same tokens, and goes its own way from here."""
        other = copy(self)
        other._steps = None if self._steps is None else [step.copy() for step in self._steps]
        other._held = self._held.copy()
        return other

    def push(self, token_id: int) -> str:
        """Return the text that is certain now and was not before; often "".

        An id that the vocabulary lacks gives nothing, as in decode. Raises
        RequestError for what cannot be an id.
        """
        token = _token_text(self._backend, token_id)
        if token is None or token in self._skipped:
            return ""
        if self._steps is None:
            self._held.append(token)
            return ""
        text = "".join(_run(self._steps, [token]))
        return self._answers(text) if self._prompt_left else text

    def finish(self) -> str:
        """End the stream and return what was still held back."""
        if self._steps is None:
            assert self._backend.decoder is not None, "a missing decoder streams"
            return self._answers(self._backend.decoder.decode(self._held))
        text = ""
        for at, step in enumerate(self._steps):
            text += "".join(_run(self._steps[at + 1 :], step.finish()))
        return self._answers(text)

    def _answers(self, text: str) -> str:
        """What is left of ``text`` behind the prompt's own."""
        prompts = min(self._prompt_left, len(text))
        self._prompt_left -= prompts
        return text[prompts:]

    def _end_of(self, prompt: Sequence[int]) -> Sequence[int]:
        """As much of a prompt's end as what comes can depend on: all of it where the decoder cannot be cut.

        Else a few tokens are enough to know that the answer's is not the first one; but a run of bytes
        is read from its beginning.
        """
        if self._steps is None:
            return prompt
        counted = 0
        for start in range(len(prompt) - 1, -1, -1):
            token = _token_text(self._backend, prompt[start])
            if token is None or token in self._skipped:
                continue
            counted += 1
            if counted >= _PROMPT_TOKENS and not _BYTE_TOKEN.fullmatch(token):
                return prompt[start:]
        return prompt


def speller(backend: tokenizers.Tokenizer) -> Callable[[int], bytes]:
    """What gives the bytes that a token alone stands for: a part of a character perhaps. Nothing for an
    unknown id. To be made once: that takes as long as a hundred tokens."""
    steps = _steps(backend) or ()
    return lambda token_id: _bytes_of(_token_text(backend, token_id) or "", steps)


def _bytes_of(token: str, steps: Sequence[_DecodeStep]) -> bytes:
    for step in steps:
        if isinstance(step, _ByteLevel):
            return step.bytes_of(token)
        if isinstance(step, _ByteFallback) and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if isinstance(step, _Metaspace):
            token = step.with_spaces(token)
        elif isinstance(step, _Each):
            token = "".join(step.push(token))
    return token.encode()


def _run(steps: Sequence[_DecodeStep], tokens: Iterable[str]) -> Iterable[str]:
    for step in steps:
        tokens = [out for token in tokens for out in step.push(token)]
    return tokens


def _token_text(backend: tokenizers.Tokenizer, token_id: int) -> str | None:
    """The vocabulary's entry for an id, None when it has none. Raises RequestError for a non-id."""
    try:
        return backend.id_to_token(token_id)
    except (OverflowError, TypeError) as error:
        raise RequestError(f"Token id {token_id!r} is not a whole number from 0 to 2**32 - 1.") from error
