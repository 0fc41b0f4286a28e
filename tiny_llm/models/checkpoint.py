"""A checkpoint: config, tensors, tokenizer with its chat template, end ids. A folder is one kind of it,
a GGUF file another, random weights a third.

Owns where each of these comes from. Refuses to know what is made of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict, Unpack

import mlx.core as mx

from tiny_llm.config import ModelConfig, ModelFacts, Quantization, load_end_ids
from tiny_llm.config_embedding import EmbeddingFacts, gguf_embedding, load_embedding
from tiny_llm.layers.named import Weights
from tiny_llm.models.registry import expected_tensors, find, load_config, quantizable_tensors, read_config
from tiny_llm.ops.backend import active
from tiny_llm.tokenizer.gguf import end_ids, read_metadata
from tiny_llm.tokenizer.tokenizer import Tokenizer
from tiny_llm.weights.assemble import Finish, Progress
from tiny_llm.weights.checkpoint import load_weights
from tiny_llm.weights.dummy import dummy_weights
from tiny_llm.weights.gguf.facts import UNREAD, places, read_facts, stored_tensors
from tiny_llm.weights.gguf.header import GGUF, GgufHeader, read_gguf
from tiny_llm.weights.hub import resolve
from tiny_llm.weights.names import config_of
from tiny_llm.weights.shards import weights_digest

MLX_DTYPES: Mapping[str, mx.Dtype] = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
"""What a config's dtypes are in MLX."""


class Reading(TypedDict):
    """How tensors are read. ``dtype``: what floats become (None: as stored).

    ``quantize``: how to pack matrices that are float. ``finish`` is called with each tensor when it is read,
    and its result takes the tensor's place. ``progress`` is called with (bytes read, bytes to read).
    ``parts``: the rows to take of tensors of which not all are wanted.
    """

    dtype: mx.Dtype | None
    quantize: Quantization | None
    finish: Finish
    progress: NotRequired[Progress | None]
    parts: NotRequired[Mapping[str, range]]


class Checkpoint(Protocol):
    """A trained model as it is stored, whatever the format. Each part is read when it is first asked for."""

    @property
    def config(self) -> ModelFacts:
        """The model's facts. Raises ConfigError for what cannot be used."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back, and the chat template. Raises ConfigError for what cannot be used."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Every token that is said to end an answer, wherever that is said. It need not be the model's."""

    @property
    def embedding(self) -> EmbeddingFacts:
        """How its texts become vectors. Raises ConfigError for a way that is not supported."""

    def digest(self) -> bytes:
        """What tells its weights from all others: a digest of their content. Not asked for without need."""

    def tensors(self, **how: Unpack[Reading]) -> Weights:
        """What ``expected_tensors(config)`` names. Raises WeightError for what does not fit the config."""


class FolderCheckpoint:
    """A folder as transformers and mlx-lm save it: config.json, safetensors files, tokenizer.json."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def config(self) -> ModelFacts:
        """Of config.json."""
        return load_config(self._folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of tokenizer.json and the small files beside it."""
        return Tokenizer.from_folder(self._folder)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Of config.json, generation_config.json and tokenizer_config.json: each has some that others lack.

        Ids beyond the vocabulary are among them: the model can never draw one.
        """
        return self.tokenizer.eos_ids.union(self.config.eos_token_ids, load_end_ids(self._folder))

    @cached_property
    def embedding(self) -> EmbeddingFacts:
        """Of sentence-transformers' files."""
        return load_embedding(self._folder)

    def digest(self) -> bytes:
        """Of the files: see ``weights_digest``."""
        return weights_digest(self._folder)

    def tensors(self, **how: Unpack[Reading]) -> Weights:
        """Of the safetensors files: see ``load_weights``."""
        architecture = find(self.config.model_type)
        return load_weights(
            self._folder,
            expected_tensors(self.config),
            quantization=self.config.quantization,
            quantizable=quantizable_tensors(self.config),
            unread=architecture.unread,
            places=partial(architecture.stored, self.config),
            **how,
        )


class GgufCheckpoint:
    """A GGUF file: all parts are in its header, the tensors behind it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _header(self) -> GgufHeader:
        return read_gguf(self._path)

    @cached_property
    def config(self) -> ModelFacts:
        """Of the metadata and the tensors' types."""
        return read_facts(self._header, read_config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the metadata."""
        return Tokenizer(read_metadata(self._header.metadata))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Those that the metadata names, and control tokens that are known to be such."""
        return end_ids(self._header.metadata)

    @cached_property
    def embedding(self) -> EmbeddingFacts:
        """Of the metadata."""
        return gguf_embedding(self._header.metadata)

    def digest(self) -> bytes:
        """Of the file."""
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def tensors(self, **how: Unpack[Reading]) -> Weights:
        """Of the file, floats by default as they are stored; but MLX wants one dtype for all of them."""
        if active() != "cpu":
            how["dtype"] = how["dtype"] or MLX_DTYPES[self.config.dtype]
        stored = find(self.config.model_type).stored
        return load_weights(
            self._path,
            expected_tensors(self.config),
            quantization=self.config.quantization,
            quantizable=quantizable_tensors(self.config),
            unread=UNREAD,
            places=lambda names: places(self._header, self.config, stored(self.config, names)),
            stored=stored_tensors(self._header),
            **how,
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that lies at ``path``: a GGUF file, or a folder."""
    return GgufCheckpoint(path) if path.suffix == GGUF else FolderCheckpoint(path)


class DummyCheckpoint:
    """Random weights in the shapes of a short name such as "qwen2-0.5b", to measure with: nothing is read.

    Its tokenizer is the bundled model's, as text means nothing here. Raises ConfigError for an unknown name.
    """

    end_ids: frozenset[int] = frozenset()
    embedding = EmbeddingFacts()

    def __init__(self, name: str) -> None:
        self.config: ModelFacts = ModelConfig.from_hf(config_of(name))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """It knows fewer tokens than most of these models."""
        return Tokenizer.from_folder(resolve("demo"))

    def digest(self) -> bytes:
        """Of the config: the noise is always the same."""
        return hashlib.sha256(repr(self.config).encode()).digest()

    def tensors(self, **how: Unpack[Reading]) -> Weights:
        """Of noise, floats by default in the dtype that the config names."""
        return dummy_weights(
            expected_tensors(self.config),
            dtype=how["dtype"] or MLX_DTYPES[self.config.dtype],
            quantize=how["quantize"],
            quantizable=quantizable_tensors(self.config),
            finish=how["finish"],
            parts=how.get("parts", {}),
        )
