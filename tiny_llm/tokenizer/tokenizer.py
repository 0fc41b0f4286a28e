"""The tokenizer that the rest of the house sees: encode, decode, stream, render a chat.

Owns the choice of special tokens around a text. Refuses to know models: which ids
end an answer is the engine's to complete from the model's config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import tokenizers

from tiny_llm.errors import ConfigError, RequestError
from tiny_llm.tokenizer.chat_template import ChatTemplate
from tiny_llm.tokenizer.detokenizer import StreamDetokenizer, speller
from tiny_llm.tokenizer.files import TokenizerFiles, read_folder
from tiny_llm.tokenizer.places import places_of

_LONG_TEXT = 2**14
_SPELLED = 2**14  # tokens whose bytes are remembered
_TEMPLATE_SECONDS = 2.0  # for one render; honest ones take milliseconds

_MARKS = frozenset(
    {"[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<tool_call>", "</tool_call>", "<think>", "</think>"}
)
"""Special tokens that say what the text behind them is; whoever reads an answer needs them."""


class Tokenizer:
    """Text <-> ids by a folder's tokenizer.json, and its chat template.

    ``bos_id`` and ``eos_ids`` are of tokenizer_config's bos_token and eos_token; None and empty where it
    names none.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        """Use what was read from a folder; ``from_folder`` reads and does this."""
        self._backend = files.backend
        self._add_bos = files.add_bos
        self._templates = {
            name: ChatTemplate(source, files.special_tokens, time_limit_s=_TEMPLATE_SECONDS)
            for name, source in files.templates.items()
        }
        added = self._backend.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special) - _MARKS
        ids = {name: self._backend.token_to_id(text) for name, text in files.special_tokens.items()}
        self.bos_id, eos_id = ids.get("bos_token"), ids.get("eos_token")
        # add_bos_token: false in the config overrules a post-processor that adds a BOS, but no other.
        self._is_bare = files.add_bos is False and self._backend.encode("a").ids[:1] == [self.bos_id]
        self.eos_ids = frozenset() if eos_id is None else frozenset({eos_id})

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json (needed) and the config and template files beside it (where present).

        Raises ConfigError for a file that is missing or cannot be understood.
        """
        return cls(read_folder(folder))

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included (a model may have more rows)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder brought a chat template."""
        return bool(self._templates)

    @property
    def chat_template(self) -> str:
        """The source of the template that conversations with tools are rendered by; "" if there is none."""
        found = self._templates.get("tool_use") or self._templates.get("default")
        return found.source if found else ""

    @property
    def template_variables(self) -> frozenset[str]:
        """What a conversation's template reads: messages, tools, and variables of its own."""
        return frozenset().union(*(template.variables for template in self._templates.values()))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of ``text``. Special tokens written in it become their ids.

        ``add_special_tokens``: put what the model expects around a plain text (BOS).
        A rendered chat has them already: pass False. Raises RequestError for a
        string that is not valid Unicode.
        """
        _require_unicode(text)
        add = self._adds_special(add_special_tokens)
        if len(text) > _LONG_TEXT:  # the library lets other threads run meanwhile only in a batch
            return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        return self._with_bos(self._backend.encode(text, add_special_tokens=add).ids, add)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: no text has fewer tokens than its length divided by this."""
        return max(map(len, self._backend.get_vocab()))

    def has_tokens_of(self, other: Tokenizer) -> bool:
        """Whether each id stands for the same token in both."""
        return self._backend.get_vocab() == other._backend.get_vocab()

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Return ``encode`` of every text; the library spreads them over the cores."""
        for text in texts:
            _require_unicode(text)
        add = self._adds_special(add_special_tokens)
        batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=add)
        return [self._with_bos(encoding.ids, add) for encoding in batch]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; invalid UTF-8 becomes U+FFFD, unknown ids nothing.

        Raises RequestError for what cannot be an id.
        """
        try:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise RequestError(f"Token ids must be whole numbers from 0 to 2**32 - 1 ({error}).") from error

    def places(self, text: str, ids: Sequence[int]) -> list[int]:
        """Where in ``text`` each of the ``ids`` that it was encoded to begins; a BOS may be more or less."""
        add = self._adds_special(True)
        spans = self._backend.encode_batch([text], add_special_tokens=add)[0].offsets  # others run meanwhile
        places = places_of(spans)[-len(ids) :]
        return [0] * (len(ids) - len(places)) + places

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token alone stands for, special ones as they are written."""
        return self._speller(token_id)

    @cached_property
    def _speller(self) -> Callable[[int], bytes]:
        return lru_cache(_SPELLED)(speller(self._backend))

    def vocabulary(self) -> list[bytes]:
        """``token_bytes`` of every id: a moment's work."""
        return list(map(speller(self._backend), range(self._backend.get_vocab_size())))

    def marks(self) -> list[int]:
        """The ids of added tokens that are no text: special ones, and tags such as ``<tool_call>``."""
        added = self._backend.get_added_tokens_decoder()
        return [i for i, one in added.items() if one.special or re.fullmatch(r"<\S+>", one.content)]

    def text_encoder(self) -> Callable[[str], list[int]]:
        """What encodes texts in which an added token's text is nothing but its letters."""
        plain = tokenizers.Tokenizer(self._backend.model)
        if self._backend.normalizer is not None:
            plain.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            plain.pre_tokenizer = self._backend.pre_tokenizer
        return lambda text: list(plain.encode(text, add_special_tokens=False).ids)

    def stream(self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> StreamDetokenizer:
        """Return a detokenizer for one answer; its pieces join to what it adds to the text of ``prompt``."""
        skipped = self._special if skip_special_tokens else frozenset()
        return StreamDetokenizer(self._backend, skipped, prompt)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: object,
    ) -> str:
        """Return the conversation as the model's template writes it; encode it without special tokens.

        ``tools`` are JSON schemas of functions. Other keywords (``enable_thinking`` ...)
        are the template's own variables. Raises ConfigError when there is no usable
        template and RequestError for messages that the template refuses, or that make it
        run or grow without end.
        """
        text = self._template(tools).render(
            {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt, **kwargs}
        )
        _require_unicode(text)
        return text

    def _template(self, tools: Sequence[Mapping[str, object]] | None) -> ChatTemplate:
        """The default template; the one called "tool_use", where there is one, when tools are given."""
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name in self._templates:
            return self._templates[name]
        if self._templates:
            raise ConfigError(f"The model's chat templates are {sorted(self._templates)}: no 'default'.")
        raise ConfigError(
            "This model has no chat template, so it cannot chat. Continue a plain text with "
            "`generate --raw`, or put a chat_template.jinja into its folder."
        )

    def _adds_special(self, asked: bool) -> bool:
        return asked and not self._is_bare

    def _with_bos(self, ids: list[int], add: bool) -> list[int]:
        """Put BOS first where the config wants it and the post-processor has not done so."""
        if add and self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids


def _require_unicode(text: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"A text is a {type(text).__name__}, but must be a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"A text has {text[error.start]!r} at position {error.start}: half of a surrogate pair is "
            f"no character. Read the input as UTF-8."
        ) from error
