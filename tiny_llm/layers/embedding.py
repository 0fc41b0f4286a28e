"""The token table: ids to vectors, and vectors to logits where the head is tied to it."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.data import Matrix
from tiny_llm.layers.linear import Linear
from tiny_llm.layers.named import Weights, matrix
from tiny_llm.ops.embedding import embedding


@dataclass(frozen=True, slots=True)
class Embedding:
    """A table [V, E] of one vector a token id, in whatever format."""

    weight: Matrix

    @classmethod
    def take(cls, weights: Weights, prefix: str) -> Embedding:
        """Pick ``prefix``.weight. Raises WeightError when it is missing."""
        return cls(matrix(weights, f"{prefix}.weight"))

    def __call__(self, tokens: mx.array) -> mx.array:
        """Return the vectors [T, E] of tokens [T]."""
        return embedding(tokens, self.weight)

    def as_head(self) -> Linear:
        """The same table as a map from hidden [R, E] to logits [R, V]."""
        return Linear(self.weight)
