"""Which ops run on ours, by proofs that the tests give."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import tiny_llm
from tiny_llm.errors import ConfigError
from tiny_llm.ops.backend import GPU_KERNELS
from tiny_llm.proving.cases import Sizes, cases, ops_of
from tiny_llm.proving.choice import OPS, check, choose
from tiny_llm.proving.record import KernelTiming, Proof, Record, Shapes
from tiny_llm.proving.trial import kernels_for


def proof(op: str, *ratios: float, wrong: str = "") -> Proof:
    return Proof(
        op, wrong, tuple(KernelTiming(f"{i} rows", 10.0, 10.0 * ratio) for i, ratio in enumerate(ratios))
    )


def choice(*proofs: Proof, kernels: str = "auto", same_tokens: bool = False, dense: bool = False):  # type: ignore[no-untyped-def]
    return choose("metal", {one.op: one for one in proofs}, kernels, same_tokens, dense=dense)


@pytest.mark.parametrize(
    ("ratios", "ours"), [((0.9,), True), ((0.89,), False), ((3.0, 0.89), False), ((), True)]
)
def test_auto_takes_ours_where_it_is_nine_tenths_as_fast_in_every_shape(
    ratios: tuple[float, ...], ours: bool
) -> None:
    assert ("rope" in choice(proof("rope", *ratios)).ours) is ours


def test_what_is_wrong_is_never_ours_and_what_is_slow_is_if_ours_were_asked_for() -> None:
    found = proof("rope", 0.1), proof("swiglu", 5.0, wrong="a gated unit: off by 2")
    assert choice(*found).ours == frozenset()
    chosen = choice(*found, kernels="ours")
    assert chosen.ours == {"rope"} and not chosen.same_tokens
    assert chosen.on_ours == ("rope",)
    assert chosen.line == (
        "Kernels: ours for rope; MLX's for swiglu (a gated unit: off by 2). Tokens may depend on what else "
        "is running (--same-tokens insists that they do not)."
    )


def test_all_on_ours_is_same_tokens_and_said() -> None:
    chosen = choice(proof("rope", 1.0), proof("swiglu", 1.0))
    assert chosen.same_tokens
    assert chosen.line == "Kernels: ours for rope, swiglu. Tokens do not depend on what else is running."


def test_pages_are_not_written_for_an_attention_that_is_mlxs() -> None:
    chosen = choice(proof("kv_write", 2.0), proof("paged_attention", 0.5))
    assert chosen.ours == frozenset()
    assert chosen.why["kv_write"] == "paged_attention is MLX's"
    assert choice(proof("kv_write", 2.0), proof("paged_attention", 1.5)).ours == {
        "kv_write",
        "paged_attention",
    }


def test_dense_matrices_are_mlxs_and_said() -> None:
    chosen = choice(proof("rope", 1.0), dense=True)
    assert not chosen.same_tokens
    assert "MLX's for matrices that are not of 4 or 8 bits" in chosen.line


def test_same_tokens_takes_ours_at_any_speed_or_names_what_is_wrong() -> None:
    slow = proof("rope", 0.1), proof("swiglu", 2.0)
    chosen = choice(*slow, same_tokens=True)
    assert chosen.ours == {"rope", "swiglu"} and chosen.same_tokens
    with pytest.raises(
        ConfigError, match=r"did not prove right .*: swiglu \(other bits\)\. Leave --same-tok"
    ):
        choice(*slow, proof("swiglu", wrong="other bits"), same_tokens=True)
    with pytest.raises(ConfigError, match=r"not quantized to .* give --quantize 8 or 4"):
        choice(*slow, same_tokens=True, dense=True)


@pytest.mark.parametrize(
    ("backend", "kernels", "same_tokens", "problem"),
    [
        ("cpu", "ours", False, "backend 'cpu' has no choice of kernels"),
        ("ref", "mlx", False, "backend 'ref' has no choice of kernels"),
        ("metal", "best", False, "kernels is 'best', expected one of auto, ours, mlx"),
        ("mlx", None, True, "Same tokens were asked for"),
        ("metal", "mlx", True, "Same tokens were asked for"),
    ],
)
def test_a_wish_that_cannot_be_granted_is_refused(
    backend: str, kernels: str | None, same_tokens: bool, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(backend, kernels, same_tokens)


def test_an_op_is_ours_where_it_is_right_and_fast_on_a_draft_models_shapes_too(shapes: Shapes) -> None:
    """Only the large model's were tried; its kernels ran the small one, whatever they made of it."""
    small = replace(shapes, hidden=32, bits=8)
    Record.of("metalsim", shapes).add(proof(op, 1.5) for op in OPS)
    other = [proof("rope", wrong="a rotation: off by 2"), proof("swiglu", 0.5), proof("rms_norm", 0.9)]
    Record.of("metalsim", small).add([*(proof(op, 2.0) for op in OPS), *other])
    assert kernels_for("metalsim", shapes, "auto").ours == set(OPS)
    both = kernels_for("metalsim", shapes, "auto", draft=small)
    assert both.ours == set(OPS) - {"rope", "swiglu"}
    assert both.why["rope"] == "a rotation: off by 2 of the draft model"
    assert both.why["swiglu"] == "0.50x MLX's speed at 0 rows of the draft model"
    dense = replace(shapes, bits=0, dense=True)
    Record.of("metalsim", dense).add(proof(op, 1.5) for op in ops_of(dense))
    assert "quantized_matmul" in (kernels_for("metalsim", dense, "auto", draft=small).ours or ())


def test_backends_without_a_trial_say_whether_same_tokens_hold(shapes: Shapes) -> None:
    held = {name: kernels_for(name, shapes) for name in ("cpu", "ref", "mlx", "metalsim")}
    assert {name: kernels.same_tokens for name, kernels in held.items()} == {
        **{"cpu": True, "ref": True, "mlx": False, "metalsim": True}
    }
    assert held["metalsim"].ours is None and held["metalsim"].on_ours == OPS == held["cpu"].on_ours
    assert held["mlx"].on_ours == held["ref"].on_ours == ()
    assert not any(kernels.line for kernels in held.values())
    for name in GPU_KERNELS:
        none = kernels_for(name, shapes, "mlx")
        assert none.ours == frozenset() and not none.same_tokens and "may depend" in none.line


def test_every_op_that_asks_for_a_kernel_is_tried(shapes: Shapes) -> None:
    asked: set[str] = set()
    for path in Path(tiny_llm.__file__).parent.rglob("*.py"):
        asked |= set(re.findall(r"\b(?:on_metal|runs_ours)\(\s*\"(\w+)\"", path.read_text(encoding="utf-8")))
    assert asked == set(OPS)
    assert all(next(cases(op, shapes, Sizes.small())) for op in OPS)
    assert set(ops_of(shapes)) == set(OPS)
