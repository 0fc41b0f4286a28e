"""The token table: ids to vectors, perhaps with their places', and vectors to logits of a tied head."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from tiny_llm.config import ModelConfig
from tiny_llm.data import Matrix
from tiny_llm.distributed.group import ALONE, Group
from tiny_llm.layers.gathered import share_of
from tiny_llm.layers.linear import Linear
from tiny_llm.layers.named import Shapes, Weights, matrix
from tiny_llm.ops.embedding import embedding


@dataclass(frozen=True, slots=True)
class Embedding:
    """A table [V, E] of one vector a token id, in whatever format, which is multiplied by ``scale``.

    Where places are learned (GPT-2), ``places`` [P, E] is a table of one vector each, to be added; a place
    beyond it, where a draft model may come with its guesses, has the last one's. Of a ``group`` each rank has
    some rows of the V in the table of tokens.
    """

    weight: Matrix
    scale: float = 1.0
    places: Matrix | None = None
    last_place: int = 0
    vocab_size: int = 0
    group: Group = ALONE

    @staticmethod
    def shapes(config: ModelConfig) -> Shapes:
        """The tensors that ``take`` reads."""
        E, P = config.hidden_size, config.max_position_embeddings
        tokens: Shapes = {"model.embed_tokens.weight": (config.vocab_size, E)}
        return tokens | {"model.embed_positions.weight": (P, E)} if config.learned_positions else tokens

    @classmethod
    def take(cls, weights: Weights, config: ModelConfig, group: Group = ALONE) -> Embedding:
        """Pick the tables. Raises WeightError for one that is missing."""
        table, scale = matrix(weights, "model.embed_tokens.weight"), config.embedding_scale
        learned, last = config.learned_positions, config.max_position_embeddings - 1
        places = matrix(weights, "model.embed_positions.weight") if learned else None
        return cls(table, scale, places, last, config.vocab_size, group)

    def __call__(self, tokens: mx.array, positions: mx.array | None = None) -> mx.array:
        """Return the vectors [T, E] of tokens [T] at positions [T], which matter where they are learned."""
        x = embedding(tokens, self.weight) if self.group.size == 1 else self._gathered(tokens)
        x = x if self.scale == 1 else x * self.scale
        if self.places is None:
            return x
        assert positions is not None, "places are learned"
        return x + embedding(mx.minimum(positions, self.last_place), self.places)

    def _gathered(self, tokens: mx.array) -> mx.array:
        """Every rank looks all tokens up in its own rows; of each, what its owner found is taken."""
        rank, size, T = self.group.rank, self.group.size, tokens.size
        own, each = share_of(self.vocab_size, rank, size), len(share_of(self.vocab_size, 0, size))
        found = embedding(mx.clip(tokens - own.start, 0, len(own) - 1), self.weight)
        return self.group.all_gather(found)[tokens // each * T + mx.arange(T)]

    def as_head(self) -> Linear:
        """The same table as a map from hidden [R, E] to logits [R, V]."""
        return Linear(self.weight)
