"""Owns the ban on tokens that an answer's form cannot go on with: one mask for all rows of a step.

Knows no form: a row's mask is made by whoever keeps its place in one.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


def keep_allowed(logits: mx.array, allowed: Sequence[bytes | None]) -> mx.array:
    """Return logits [R, V] as float32, -inf where a row's ``allowed`` is 0: a byte a token; None allows all.

    Raises ValueError for a mask of another size.
    """
    rows, vocab = logits.shape
    if sizes := {len(mask) for mask in allowed if mask is not None} - {vocab}:
        raise ValueError(f"expected masks of {vocab} bytes, got one of {min(sizes)}")
    everything = b"\xff" * vocab
    joined = b"".join(everything if mask is None else mask for mask in allowed)
    mask = mx.array(memoryview(joined)).reshape(rows, vocab)  # type: ignore[arg-type]
    return mx.where(mask, logits.astype(mx.float32), -mx.inf)
