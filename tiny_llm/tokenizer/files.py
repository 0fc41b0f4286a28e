"""What a model's folder says about its text: tokenizer.json and the small files beside it.

Owns the file names and their spellings over the years. Refuses to know what the
settings are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from tiny_llm.config_fields import read_object
from tiny_llm.errors import ConfigError

_DEFAULT = "default"
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")  # how an added token is found


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A folder's tokenizer. ``special_tokens``: "eos_token" -> its text. ``templates``: name -> jinja.

    ``add_bos`` None: the folder leaves it to tokenizer.json's post-processor.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    templates: Mapping[str, str]
    add_bos: bool | None


def read_folder(folder: Path) -> TokenizerFiles:
    """Read tokenizer.json, and what there is of the files beside it. Raises ConfigError."""
    config = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json")
    add_bos = config.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise ConfigError(f"{folder}/tokenizer_config.json: add_bos_token is {add_bos!r}, not true or false.")
    backend = _read_tokenizer(folder)
    special_tokens = _special_tokens(special) | _special_tokens(config)
    _add_tokens(backend, config, special_tokens, folder / "tokenizer_config.json")
    return TokenizerFiles(
        backend=backend, special_tokens=special_tokens, templates=_templates(folder, config), add_bos=add_bos
    )


def _read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no tokenizer.json. A model's folder needs it; with only a sentencepiece "
            f"tokenizer.model, convert it first (transformers' save_pretrained writes tokenizer.json)."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{path} is not a tokenizer that can be read ({error}). Fetch it again.") from error
    backend.no_truncation()  # left over from training in some published files: it would cut prompts
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} when there is no file."""
    return read_object(path) if path.is_file() else {}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Every "..._token" that is set; written as a string, or as {"content": string, ...}."""
    found = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str], path: Path
) -> None:
    """Add what the config has beyond tokenizer.json, as transformers does.

    First the tokens that it lists, by their ids, then special ones that it only names.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = [*special_tokens.values(), *_more_special_tokens(config)]
    listed = {at: token for at, token in _listed_tokens(config, path).items() if token.content not in known}
    for token in listed.values():
        token.special = token.special or token.content in named
    known |= {token.content for token in listed.values()}
    only_named = [tokenizers.AddedToken(text, special=True) for text in named if text not in known]
    backend.add_tokens([*listed.values(), *only_named])
    for at, token in listed.items():
        got = backend.token_to_id(token.content)
        if got != at:
            raise ConfigError(
                f"{path}: added_tokens_decoder gives {token.content!r} the id {at}, but after those of "
                f"tokenizer.json it gets {got}. Save the tokenizer again, so that both files agree."
            )


def _listed_tokens(config: Mapping[str, Any], path: Path) -> dict[int, tokenizers.AddedToken]:
    """``added_tokens_decoder``: each token by its id, in their order."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        tokens = {}
        for at, token in listed.items():
            flags = {name: token[name] for name in _FLAGS if name in token}
            tokens[int(at)] = tokenizers.AddedToken(token["content"], **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: added_tokens_decoder is no table of tokens by id ({error}).") from error
    return dict(sorted(tokens.items()))


def _more_special_tokens(config: Mapping[str, Any]) -> list[str]:
    """Special tokens without a role of their own, in the old spelling or the new ones."""
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    values = more.values() if isinstance(more, dict) else more
    texts = [value.get("content") if isinstance(value, dict) else value for value in values]
    return [text for text in texts if isinstance(text, str)]


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files beside the config win over it, as in transformers."""
    found = _named(config.get("chat_template"), folder / "tokenizer_config.json")
    beside = folder / "chat_template.json"
    found |= _named(_read_json(beside).get("chat_template"), beside)
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    for name, path in (files | {_DEFAULT: folder / "chat_template.jinja"}).items():
        if path.is_file():
            try:
                found[name] = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    return found


def _named(value: object, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {_DEFAULT: value}
    try:
        pairs = {entry["name"]: entry["template"] for entry in value}  # type: ignore[attr-defined]
    except (TypeError, KeyError):
        pairs = {None: None}
    if not all(isinstance(part, str) for pair in pairs.items() for part in pair):
        raise ConfigError(f"{path}: chat_template must be a string or a list of name-template objects.")
    return pairs
