"""How a model's folder says that texts become vectors: sentence-transformers' small files.

Owns their names and spellings, and the prompts that stand before a text. Refuses to know arrays.
Source: modules.json, 1_Pooling/config.json, config_sentence_transformers.json, as that library saves them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypedDict

from tiny_llm.config_fields import Fields, read_file
from tiny_llm.data import Completion
from tiny_llm.errors import ConfigError, RequestError, did_you_mean
from tiny_llm.sampling_params import Pooling, PoolingParams

MODULES, POOLING, PROMPTS = "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"
EMBEDDING_FILES = (MODULES, POOLING, PROMPTS)  # what there may be of them in a folder
_POOLINGS: Mapping[str, Pooling] = {"lasttoken": "last", "mean": "mean"}
_GGUF_POOLINGS: Mapping[int, Pooling] = {0: "last", 1: "mean", 3: "last"}  # 0 names none
_OLD_POOLING = "pooling_mode_"


class EmbedOptions(TypedDict, total=False):
    """What may be said of texts beside themselves; see ``LLM.embed``."""

    prompt: str | None
    instruction: str | None
    dimensions: int | None


class TextEmbedding(NamedTuple):
    """A text's ``vector``; its tokens, of which ``cached_tokens`` were found in the prefix cache."""

    vector: list[float]
    prompt_tokens: int
    cached_tokens: int

    @classmethod
    def of(cls, ended: Completion) -> TextEmbedding:
        """What a text became. Raises RequestError with the reason why it is no vector."""
        if ended.embedding is None or ended.finish_reason != "stop":
            raise RequestError(ended.error or f"The text was not read: {ended.finish_reason}.")
        return cls(ended.embedding.tolist(), len(ended.prompt_token_ids), ended.cached_tokens)


@dataclass(frozen=True, slots=True)
class EmbeddingFacts:
    """What is pooled, whether the vector is brought to length 1, and what may stand before a text, by name.

    The defaults are what a folder gets that says nothing of it: the last token's, at length 1.
    """

    pooling: Pooling = "last"
    normalize: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    def asked(
        self,
        texts: Sequence[str | Sequence[int]],
        width: int,
        prompt: str | None = None,
        instruction: str | None = None,
        dimensions: int | None = None,
    ) -> Iterator[tuple[str | Sequence[int], PoolingParams]]:
        """Each of ``texts``, strings or token ids, as ``LLM.check`` takes it, for vectors of up to ``width``.

        Raises RequestError.
        """
        params = PoolingParams(pooling=self.pooling, normalize=self.normalize, dimensions=dimensions)
        if dimensions is not None and dimensions > width:
            what = f"dimensions is {dimensions}, but this model's vectors have {width}; ask for at most that."
            raise RequestError(what, param="dimensions")
        before = self._before(prompt, instruction)
        for text in texts:
            if isinstance(text, str):
                if not text:
                    raise RequestError("A text is empty; give at least one character, or leave it out.")
                text = before + text
            elif prompt is not None or instruction is not None:
                what = "prompt and instruction stand before text; put what they say into your token ids."
                raise RequestError(what, param="prompt" if instruction is None else "instruction")
            yield text, params

    def _before(self, prompt: str | None, instruction: str | None) -> str:
        if instruction is not None:
            if prompt is not None:
                raise RequestError("prompt and instruction were both given; give one.", param="instruction")
            return instruction
        name = self.default_prompt if prompt is None else prompt
        if name is not None and name not in self.prompts:
            there = ", ".join(map(repr, self.prompts)) or "none"
            what = f"This model has no prompt {name!r}; it has: {there}.{did_you_mean(name, self.prompts)}"
            raise RequestError(f"{what} A text of your own goes into instruction.", param="prompt")
        return "" if name is None else self.prompts[name]


def load_embedding(folder: Path) -> EmbeddingFacts:
    """Read what there is of ``EMBEDDING_FILES``. Raises ConfigError for what is not supported, by name."""
    normalize = _normalizes(folder / MODULES) if (folder / MODULES).is_file() else True
    pooling = read_file(folder / POOLING, _pooling) if (folder / POOLING).is_file() else "last"
    prompts: tuple[dict[str, str], str | None] = {}, None
    if (folder / PROMPTS).is_file():
        prompts = read_file(folder / PROMPTS, _prompts)
    return EmbeddingFacts(pooling, normalize, *prompts)


def gguf_embedding(metadata: Mapping[str, object]) -> EmbeddingFacts:
    """What a GGUF file says of it. Raises ConfigError for a pooling that is not supported."""
    name = f"{metadata.get('general.architecture')}.pooling_type"
    kind = Fields(metadata).whole(name, 3, least=0)
    if kind not in _GGUF_POOLINGS:
        raise ConfigError(f"{name} is {kind}, but must be 1, the mean, or 3, the last token.")
    return EmbeddingFacts(_GGUF_POOLINGS[kind])


def _normalizes(path: Path) -> bool:
    """Whether Normalize is among the modules, which may be that, Transformer and Pooling."""
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is no list of modules ({error}). Download or save it again.") from None
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ConfigError(f"{path}: the module {kind} is not supported; Pooling and Normalize are.")
    return "Normalize" in kinds


def _pooling(raw: Mapping[str, object]) -> Pooling:
    """Newer files name the mode, older ones have a switch for each."""
    fields = Fields(raw)
    switches = {name.removeprefix(_OLD_POOLING) for name in raw if name.startswith(_OLD_POOLING)}
    on = [mode for mode in sorted(switches) if fields.flag(_OLD_POOLING + mode, False)]
    modes = (
        [fields.text("pooling_mode")]
        if "pooling_mode" in raw
        else [m.removesuffix("s").removesuffix("_token") for m in on]
    )
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        given = " and ".join(modes) or "none"
        raise ConfigError(f"pooling by {given} is not supported; {' or '.join(_POOLINGS)} is.")
    if not fields.flag("include_prompt", True) and modes[0] == "mean":
        raise ConfigError("include_prompt is false, which is not supported: a prompt counts like the text.")
    return _POOLINGS[modes[0]]


def _prompts(raw: Mapping[str, object]) -> tuple[dict[str, str], str | None]:
    fields = Fields(raw)
    section = fields.section("prompts")
    prompts = {} if section is None else {name: section.text(name) for name in sorted(section.names())}
    default = fields.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise fields.wrong("default_prompt_name", f"one of {', '.join(prompts) or 'no prompts'}")
    return prompts, default if isinstance(default, str) else None
