"""The facts of a mixture of experts. Knows no model_type."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertFacts:
    """What shapes layers of experts; sizes count elements.

    ``layers`` says which have experts; the others have one MLP, ``dense_width`` wide.
    """

    count: int  # experts of a layer, N
    per_token: int  # that a token is sent to, k
    width: int  # of one expert, F
    layers: frozenset[int]
    dense_width: int
    normalised: bool = False  # the weights of a token's experts add up to 1
    corrected: bool = False  # a bias takes part in choosing, not in weighing
    shared_width: int = 0  # of an MLP that all tokens go through; 0: there is none
    shared_gated: bool = False  # and which each token weighs by a sigmoid

    @property
    def active_width(self) -> int:
        """How wide the MLPs are together that a token goes through."""
        return self.per_token * self.width + self.shared_width
