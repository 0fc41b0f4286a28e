"""Mixtures of experts: to which of N gated MLPs each token goes, and what they make of it (Shazeer 2017).

Letters: ``T`` tokens, ``N`` experts, ``k`` of them a token, ``E`` the width of x, ``F`` of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.metrics import fallbacks
from tiny_llm.ops.backend import active, cpu, on_mlx
from tiny_llm.ops.quantized_matmul import in_float32
from tiny_llm.ops.quantized_matmul_metal import expert_products, stacks_of
from tiny_llm.ops.swiglu import swiglu, swiglu_ref

SORTED_FROM = 64  # pairs of a token and an expert; MLX reads an expert's weights once where they are sorted


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token's experts are chosen and weighed.

    ``normalised``: the weights of the k add up to 1. ``correction`` [N] is added to the probabilities by
    which experts are chosen, not to those by which they are weighed (ERNIE 4.5).
    """

    per_token: int
    normalised: bool
    correction: mx.array | None = None


def route_ref(logits: mx.array, routing: Routing) -> tuple[mx.array, mx.array]:
    """Return the experts of each row [T, k], the best first, and their weights, float32; logits [T, N].

    Of equals the one of the lower index is better. A weight is the softmax of all N in float32.
    """
    shares = mx.softmax(logits.astype(mx.float32), axis=-1)
    score = shares if routing.correction is None else shares + routing.correction
    chosen = mx.argsort(-score, axis=-1)[:, : routing.per_token]  # MLX sorts stably
    weights = mx.take_along_axis(shares, chosen, axis=-1)
    if routing.normalised:
        weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), 1e-12)
    return chosen, weights


def experts_ref(
    x: mx.array, logits: mx.array, routing: Routing, gate: Matrix, up: Matrix, down: Matrix
) -> mx.array:
    """Return ``sum_r weights[r] * down_e(silu(gate_e(x)) * up_e(x))`` with ``e = chosen[r]``; x [T, E].

    ``chosen`` and ``weights`` are ``route_ref``'s of logits [T, N]; gate and up [N, F, E], down [N, E, F].
    The sum is in float32.
    """
    chosen, weights = route_ref(logits, routing)
    inputs = x[:, None, None, :]
    hidden = swiglu_ref(_gathered(inputs, gate, chosen), _gathered(inputs, up, chosen))
    return _weighed(_gathered(hidden, down, chosen), weights, x.dtype)


def experts(
    x: mx.array, logits: mx.array, routing: Routing, gate: Matrix, up: Matrix, down: Matrix
) -> mx.array:
    """Send each row of x [T, E] to its experts by the router's logits [T, N]; see ``experts_ref``."""
    arrays = (mx.array, QuantizedTensor)
    if not isinstance(gate, arrays) and not isinstance(up, arrays) and not isinstance(down, arrays):
        how = routing.correction, routing.per_token, routing.normalised
        return cpu.experts(x, logits, *how, gate, up, down)
    if active() == "cpu":  # its kernel reads packed matrices only
        fallbacks().add("experts")
    if not x.size:
        return x
    make = experts_mlx if on_mlx() else experts_ref
    return make(x, logits, routing, gate, up, down)


def experts_gated(x: mx.array, logits: mx.array, routing: Routing, gate: Matrix, up: Matrix) -> mx.array:
    """The first half alone, ``silu(gate_e(x)) * up_e(x)`` [T * k, F], in ``experts_down``'s own order.

    For those of whom each has some rows of every ``gate`` and ``up``; half by half makes the same bits.
    """
    if not isinstance(gate, (mx.array, QuantizedTensor)) and not isinstance(up, (mx.array, QuantizedTensor)):
        how = routing.correction, routing.per_token, routing.normalised
        return cpu.experts_gated(x, logits, *how, gate, up)
    chosen, _ = route_ref(logits, routing)
    product, unit = (_product, swiglu) if on_mlx() else (_gathered, swiglu_ref)
    inputs = x[:, None, None, :]
    hidden = unit(product(inputs, gate, chosen), product(inputs, up, chosen))
    return hidden.reshape(-1, hidden.shape[-1])


def experts_down(hidden: mx.array, logits: mx.array, routing: Routing, down: Matrix) -> mx.array:
    """The second half: what ``down`` [N, E, F] makes of ``experts_gated``'s [T * k, F], weighed, [T, E]."""
    if not isinstance(down, (mx.array, QuantizedTensor)):
        how = routing.correction, routing.per_token, routing.normalised
        return cpu.experts_down(hidden, logits, *how, down)
    chosen, weights = route_ref(logits, routing)
    product = _product if on_mlx() else _gathered
    y = product(hidden.reshape(*chosen.shape, 1, -1), down, chosen)
    return _weighed(y, weights, hidden.dtype)


def experts_mlx(
    x: mx.array, logits: mx.array, routing: Routing, gate: Matrix, up: Matrix, down: Matrix
) -> mx.array:
    """In x's dtype by MLX's gathered products, or by our Metal kernels; both sum in float32.

    Rows are sorted by expert where there are many, so that each one's weights are read once for all or some.
    """
    chosen, weights = route_ref(logits, routing)
    if stacks := stacks_of(x, (gate, up, down)):
        rows, experts, places = by_expert(x, chosen)
        count = len(rows) // len(stacks[0].packed) + (len(x) > 1)
        hidden = expert_products(rows, stacks[:2], experts, count)
        y = expert_products(hidden, stacks[2:], experts, count)[places][:, :, None]
    elif chosen.size < SORTED_FROM:
        inputs = x[:, None, None, :]
        hidden = swiglu(_product(inputs, gate, chosen), _product(inputs, up, chosen))
        y = _product(hidden, down, chosen)
    else:
        y = in_groups(x, chosen, gate, up, down)
    return _weighed(y, weights, x.dtype)


def by_expert(x: mx.array, chosen: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return rows of x [T, E], one for each of the pairs in chosen [T, k], sorted by expert: [T k, E].

    With them whose each row is, [T k], and in which row the answer to each pair lies, [T, k].
    """
    flat = chosen.flatten()
    order = mx.argsort(flat)
    return x[order // chosen.shape[1]], flat[order], mx.argsort(order).reshape(chosen.shape)


def in_groups(x: mx.array, chosen: mx.array, gate: Matrix, up: Matrix, down: Matrix) -> mx.array:
    """What each row of x [T, E] gets of the experts chosen for it [T, k], not weighed yet: [T, k, 1, E].

    An expert's rows lie side by side, so that its weights are read once for all of them.
    """
    rows, experts, places = by_expert(x, chosen)
    inputs = rows[:, None, :]
    hidden = swiglu(_product(inputs, gate, experts, True), _product(inputs, up, experts, True))
    return _product(hidden, down, experts, True)[places]


def _gathered(x: mx.array, weight: Matrix, chosen: mx.array) -> mx.array:
    """Rows x [T, 1 or k, 1, I] times the experts chosen for them; in float32, as MLX's CPU needs it."""
    if isinstance(weight, QuantizedTensor):
        weight = in_float32(weight)
    return _product(x.astype(mx.float32), weight, chosen).astype(x.dtype)


def _product(x: mx.array, weight: Matrix, chosen: mx.array, is_sorted: bool = False) -> mx.array:
    how: dict[str, Any] = {"rhs_indices": chosen, "sorted_indices": is_sorted}
    if isinstance(weight, QuantizedTensor):
        parts = weight.packed, weight.scales, weight.biases
        y = mx.gather_qmm(x, *parts, transpose=True, group_size=weight.group_size, bits=weight.bits, **how)
        return y.astype(x.dtype)
    assert isinstance(weight, mx.array)
    return mx.gather_mm(x, weight.swapaxes(-1, -2), **how)


def _weighed(y: mx.array, weights: mx.array, dtype: mx.Dtype) -> mx.array:
    """The k outputs y [T, k, 1, E] of each row, weighed and added up, the best first."""
    return (y.squeeze(2) * weights[..., None]).sum(axis=1).astype(dtype)
