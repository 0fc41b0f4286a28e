"""Causal attention for one sequence, with grouped queries. Chapters 1.1 and 1.3.

Letters: ``T`` new tokens, ``S`` tokens in all, ``H`` query heads, ``K`` key/value
heads, ``G = H / K`` query heads that share one key/value head, ``D`` head dim.
"""

from __future__ import annotations

import mlx.core as mx

from tiny_llm.ops.backend import cpu, on_cpu, on_mlx
from tiny_llm.ops.softmax import softmax

_BLOCK_SIZE = 64  # tokens a block of the pool that the CPU kernel is given


def causal_mask(T: int, S: int, *, offset: int) -> mx.array:
    """Return [T, S] to add to scores: 0 where query t may see key s, -inf where s lies in its future.

    Query t stands at position ``offset + t``, key s at position s.
    """
    query_positions = mx.arange(offset, offset + T)[:, None]
    key_positions = mx.arange(S)[None, :]
    return mx.where(key_positions <= query_positions, 0.0, -mx.inf)


def attention_ref(q: mx.array, k: mx.array, v: mx.array, *, scale: float, offset: int) -> mx.array:
    """Return ``softmax(q k^T * scale + mask) v`` [T, H, D] ("Attention Is All You Need", section 3.2.1).

    q [T, H, D]; k, v [S, K, D]. Query head h reads key/value head ``h // G`` (grouped
    queries: Ainslie et al. 2023): the G * T queries of a group are rows of one product with
    their head's keys, so that no key or value is copied. Scores are float32; the result has q's dtype.
    """
    T, H, D = q.shape
    S, K, _ = k.shape
    G = H // K
    grouped_q = q.reshape(T, K, G, D).transpose(1, 2, 0, 3).reshape(K, G * T, D).astype(mx.float32)
    keys, values = k.transpose(1, 2, 0).astype(mx.float32), v.transpose(1, 0, 2).astype(mx.float32)

    scores = mx.matmul(grouped_q, keys) * scale  # [K, G * T, S]
    masked = scores.reshape(K, G, T, S) + causal_mask(T, S, offset=offset)
    out = mx.matmul(softmax(masked).reshape(K, G * T, S), values).reshape(K, G, T, D)
    return out.transpose(2, 0, 1, 3).reshape(T, H, D).astype(q.dtype)


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, offset: int, window: int = 0
) -> mx.array:
    """Attention of q [T, H, D], at positions from ``offset``, over k, v [S, K, D]; see ``attention_ref``.

    A row sees the last ``window`` tokens up to itself; 0: all of them.
    """
    _check(q, k, v, offset)
    if on_cpu("attention", q, k, v):
        return _attention_cpu(q, k, v, scale, offset, window)
    if on_mlx() and q.size:
        return attention_mlx(q, k, v, scale=scale, offset=offset, window=window)
    return windowed_ref(q, k, v, scale=scale, offset=offset, window=window)


def windowed_ref(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, offset: int, window: int
) -> mx.array:
    """``attention_ref`` of rows that see the last ``window`` tokens up to themselves, which are cut out."""
    whole = max(0, min(window - offset, q.shape[0])) if window else q.shape[0]  # rows that see all
    outs = [attention_ref(q[:whole], k, v, scale=scale, offset=offset)] if whole or not q.size else []
    for row in range(whole, q.shape[0]):
        seen = slice(offset + row + 1 - window, offset + row + 1)
        outs.append(attention_ref(q[row : row + 1], k[seen], v[seen], scale=scale, offset=window - 1))
    return outs[0] if len(outs) == 1 else mx.concatenate(outs)


def attention_mlx(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, offset: int, window: int = 0
) -> mx.array:
    """By MLX's kernel, where the last query stands at the last key that is given."""
    T = q.shape[0]
    first = max(0, offset + 1 - window) if window else 0  # what no row sees is left out
    seen = slice(first, offset + T)
    queries, keys, values = (x.swapaxes(0, 1)[None] for x in (q, k[seen], v[seen]))
    mask: str | mx.array | None = "causal" if T > 1 else None
    if T > 1 and 0 < window < offset + T:
        S = keys.shape[2]
        behind = mx.arange(S - T, S)[:, None] - mx.arange(S)[None, :]
        mask = (behind >= 0) & (behind < window)
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    return out[0].swapaxes(0, 1).astype(q.dtype)


def _attention_cpu(q: mx.array, k: mx.array, v: mx.array, scale: float, offset: int, window: int) -> mx.array:
    """The kernel reads keys and values from a pool of blocks; here they lie in one for this call alone."""
    T, _, D = q.shape
    seen, K = offset + T, k.shape[1]
    blocks = -(-seen // _BLOCK_SIZE)
    pool = [mx.zeros((blocks, K, D, _BLOCK_SIZE)), mx.zeros((blocks, K, _BLOCK_SIZE, D))]
    slots, table = mx.arange(seen, dtype=mx.int32), mx.arange(blocks, dtype=mx.int32)[None]
    starts, lens = mx.array([0, T], mx.int32), mx.array([seen], mx.int32)
    return cpu.attend(q, k[:seen], v[:seen], pool, slots, table, starts, lens, scale, window)[0]


def _check(q: mx.array, k: mx.array, v: mx.array, offset: int) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        shapes = f"{q.shape}, {k.shape}, {v.shape}"
        raise ValueError(f"[attention] expected q [T, H, D] and k, v [S, K, D], got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"[attention] expected KV heads that divide {q.shape[1]}, got {k.shape[1]}")
    if offset < 0 or offset + q.shape[0] > k.shape[0]:
        raise ValueError(f"[attention] expected at least {offset + q.shape[0]} keys, got {k.shape[0]}")
