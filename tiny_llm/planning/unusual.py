"""Owns what in a model's folder is out of the ordinary, as far as its small tensors and files show it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.models.checkpoint import open_checkpoint
from tiny_llm.weights.gguf.facts import tensors_at
from tiny_llm.weights.reader import Piece, read_ahead

LARGE_NORM = 10.0
"""Norm weights beyond it were trained on purpose, and small errors before them become large ones behind."""


def unusual(folder: Path) -> Iterator[str]:
    """A line for each thing that may surprise whoever runs the model of a folder or a GGUF file.

    Reads vectors only. Raises ConfigError or WeightError for what cannot be used at all.
    """
    model = open_checkpoint(folder)
    config, tokenizer = model.config, model.tokenizer
    name, most = largest_norm(folder)
    if most > LARGE_NORM:
        yield f"norm weights up to {most:,.4g} ({name}): differences before that norm show large behind it."
    scaling = config.rope_scaling if isinstance(config, ModelConfig) else None
    trained = scaling.original_max_position_embeddings if scaling else 0
    if scaling and trained and trained < config.max_position_embeddings:
        yield (
            f"a context of {config.max_position_embeddings:,} tokens, trained on {trained:,}: "
            f"positions are stretched ({scaling.kind})."
        )
    if not tokenizer.has_chat_template:
        yield "no chat template: chats need one; generate and completions do not."
    if not any(token < config.vocab_size for token in model.end_ids):
        yield "no end token: answers end at max_tokens, or at a stop string."
    if tokenizer.vocab_size > config.vocab_size:
        more = tokenizer.vocab_size - config.vocab_size
        yield f"{more:,} tokens of the tokenizer are beyond the model's {config.vocab_size:,}."


def largest_norm(folder: Path) -> tuple[str, float]:
    """The norm with the largest weight, and that; ("", 0) where no tensor is called one."""
    stored = tensors_at(folder)
    norms = sorted(name for name, tensor in stored.items() if "norm" in name and len(tensor.info.shape) == 1)
    most = "", 0.0
    with ExitStack() as stack:
        paths = {stored[name].path for name in norms}
        files = {path: stack.enter_context(path.open("rb", buffering=0)) for path in paths}
        pieces = (Piece(files[stored[name].path], stored[name].info) for name in norms)
        for name, weight in zip(norms, read_ahead(pieces), strict=True):
            largest = mx.abs(weight.astype(mx.float32)).max().item()
            assert isinstance(largest, float)
            most = max(most, (name, largest), key=lambda found: found[1])
    return most
