"""Owns which ops run on our GPU kernels: what was asked for, and what proofs say of them. Runs no kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tiny_llm.errors import ConfigError
from tiny_llm.ops.backend import GPU_KERNELS
from tiny_llm.proving.record import SLOWEST, Proof

KERNELS = ("auto", "ours", "mlx")
OPS = (
    "rms_norm",
    "rope",
    "swiglu",
    "quantized_matmul",
    "experts",
    "kv_write",
    "paged_attention",
    "embedding",
    "sample",
)
"""Those that have kernels for GPUs."""
COPIES = frozenset({"kv_write", "embedding"})
"""Ops that move numbers and add none up: a row's bits are the same, whoever moves them."""

NEEDS: Mapping[str, str] = {"kv_write": "paged_attention"}
"""Of an op, the one without which it has nothing to do: MLX's attention writes pages of its own layout."""


@dataclass(frozen=True)
class Kernels:
    """A backend, and the ops that run on ``ours`` there; None: all that have a kernel.

    ``why`` says of each op that was tried why it runs where it does. ``same_tokens``: whether an answer's
    tokens are the same whatever else is running. ``line`` is for the start, empty where nothing was chosen.
    """

    backend: str
    ours: frozenset[str] | None = None
    same_tokens: bool = True
    why: Mapping[str, str] = field(default_factory=dict)
    line: str = ""

    @property
    def on_ours(self) -> tuple[str, ...]:
        """The ops that run on kernels of ours: all on backend "cpu", none on "ref" and "mlx"."""
        if self.backend in ("ref", "mlx"):
            return ()
        return tuple(op for op in OPS if self.ours is None or op in self.ours)


def check(backend: str, kernels: str | None, same_tokens: bool) -> None:
    """Raise ConfigError for a wish that this backend cannot grant, or that contradicts itself."""
    if kernels is not None and kernels not in KERNELS:
        raise ConfigError(f"kernels is {kernels!r}, expected one of {', '.join(KERNELS)}.")
    if kernels in ("ours", "mlx") and backend not in GPU_KERNELS:
        raise ConfigError(
            f"kernels (--kernels) is {kernels!r}, but backend {backend!r} has no choice of kernels; "
            f"leave it out, or take a backend of {', '.join(GPU_KERNELS)}."
        )
    if same_tokens and (backend == "mlx" or (backend in GPU_KERNELS and kernels == "mlx")):
        raise ConfigError(
            "Same tokens were asked for (--same-tokens), but with MLX's kernels they depend on what else is "
            "running; take --kernels ours, or backend 'cpu' or 'ref'."
        )


def choose(
    backend: str, proofs: Mapping[str, Proof], kernels: str, same_tokens: bool, *, dense: bool
) -> Kernels:
    """Which of the ops that were tried run on ours. ``dense``: some matrices are not for our kernels.

    "auto" takes ours where they are at least ``SLOWEST`` times as fast in every shape, "ours" all that are
    right; so does "auto" where same tokens are asked for. Raises ConfigError if they cannot be had.
    """
    if same_tokens:
        _require_same_tokens(backend, proofs, dense)
    decided = {op: _decide(proof, kernels == "ours" or same_tokens) for op, proof in proofs.items()}
    for op in decided.keys() & NEEDS.keys():
        if decided[op][0] and not decided.get(NEEDS[op], (False, ""))[0]:
            decided[op] = False, f"{NEEDS[op]} is MLX's"
    ours = frozenset(op for op, (is_ours, _) in decided.items() if is_ours)
    why = {op: words for op, (_, words) in decided.items()}
    holds = not dense and all(op in ours | COPIES for op in proofs)
    return Kernels(backend, ours, holds, why, _line(proofs, ours, why, holds, dense))


def all_on_mlx(backend: str) -> Kernels:
    """None of ours, because it was asked for."""
    line = f"Kernels: MLX's; {_DEPEND}."
    return Kernels(backend, frozenset(), same_tokens=False, line=line)


_DEPEND = "tokens may depend on what else is running (--same-tokens insists that they do not)"


def _require_same_tokens(backend: str, proofs: Mapping[str, Proof], dense: bool) -> None:
    if dense:
        raise ConfigError(
            "Same tokens were asked for (--same-tokens), but matrices that are not quantized to 4 or 8 bits "
            f"are multiplied by MLX on backend {backend!r}; give --quantize 8 or 4, or take backend 'cpu'."
        )
    wrong = [f"{op} ({proof.wrong})" for op, proof in proofs.items() if proof.wrong and op not in COPIES]
    if wrong:
        raise ConfigError(
            "Same tokens were asked for (--same-tokens), but these kernels of ours did not prove right on "
            f"this machine: {'; '.join(wrong)}. Leave --same-tokens out, or take backend 'cpu' or 'ref'."
        )


def _decide(proof: Proof, at_any_speed: bool) -> tuple[bool, str]:
    """Whether an op is ours, and why."""
    if proof.wrong:
        return False, proof.wrong
    slowest = proof.slowest
    if slowest is None:
        return True, "right; not timed"
    words = f"{slowest.ratio:.2f}x MLX's speed at {slowest.shape}"
    return at_any_speed or slowest.ratio >= SLOWEST, words


def _line(
    proofs: Mapping[str, Proof], ours: frozenset[str], why: Mapping[str, str], holds: bool, dense: bool
) -> str:
    """One sentence for each side that has an op, and what it means for tokens."""
    said = f"Kernels: ours for {', '.join(op for op in proofs if op in ours) or 'nothing'}"
    others = [f"{op} ({why[op]})" for op in proofs if op not in ours]
    if dense:
        others.append("matrices that are not of 4 or 8 bits")
    if others:
        said += f"; MLX's for {', '.join(others)}"
    return f"{said}. {'Tokens do not depend on what else is running' if holds else _DEPEND.capitalize()}."
