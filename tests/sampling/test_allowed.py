"""The ban on tokens that a form cannot go on with: in the rows that have one, and nowhere else."""

from __future__ import annotations

import random

import mlx.core as mx
import pytest

from tiny_llm.sampling.allowed import keep_allowed


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_only_what_is_allowed_is_left(dtype: mx.Dtype) -> None:
    rng, vocab = random.Random(1), 77
    logits = mx.random.normal((4, vocab), key=mx.random.key(2)).astype(dtype)
    allowed = [bytes(rng.choice((0, 1, 200, 255)) for _ in range(vocab)) for _ in range(3)]
    got = keep_allowed(logits, [*allowed[:2], None, allowed[2]])
    assert got.dtype == mx.float32
    for row, mask in enumerate((*allowed[:2], None, allowed[2])):
        for token in range(vocab):
            expected = logits[row, token].item() if mask is None or mask[token] else -mx.inf
            assert got[row, token].item() == expected, f"row {row}, token {token}"


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="masks of 8 bytes, got one of 7"):
        keep_allowed(mx.zeros((2, 8)), [None, bytes(7)])
