"""Published kernels run unmodified: those of the installed mlx-lm, against its own array operations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

from tiny_llm.metalsim.faults import KernelFault
from tiny_llm.metalsim.run import metal_kernel

pytestmark = pytest.mark.slow

Load = Callable[[str], ModuleType]
MODES = ["strict", "fast"]


@pytest.fixture(params=MODES)
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    """``load(name)``: a module of mlx-lm, loaded as if there were a Metal device: the simulator."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed; make test has it")
    loaded: list[ModuleType] = []

    with pytest.MonkeyPatch.context() as patch:

        def go(name: str) -> ModuleType:
            module = importlib.import_module(name)
            patch.setattr(mx.metal, "is_available", lambda: True)
            patch.setattr(mx.fast, "metal_kernel", partial(metal_kernel, mode=request.param))
            loaded.append(importlib.reload(module))
            return loaded[-1]

        yield go
    for module in loaded:
        importlib.reload(module)


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("vector", [False, True], ids=["a gate a head", "a gate a column"])
def test_gated_delta(load: Load, vector: bool, dtype: mx.Dtype, off: Any) -> None:
    mx.random.seed(1)
    module = load("mlx_lm.models.gated_delta")
    B, T, Hk, Hv, Dk, Dv = 2, 3, 2, 4, 64, 9
    q, k, v = normal(B, T, Hk, Dk), normal(B, T, Hk, Dk) / 8, normal(B, T, Hv, Dv)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    g, beta = mx.random.uniform(shape=(B, T, Hv, *[Dk] * vector)), mx.random.uniform(shape=(B, T, Hv))
    state = normal(B, Hv, Dv, Dk)
    y, end = module.gated_delta_kernel_unpacked(q, k, v, g, beta, state)
    wide = (x.astype(mx.float32) for x in (q, k, v))
    expected, expected_end = module.gated_delta_ops(*wide, g, beta, state)
    assert y.dtype == dtype
    assert off(y, expected) < {mx.float32: 1e-6, mx.bfloat16: 4e-3, mx.float16: 5e-4}[dtype]
    assert off(end, expected_end) < 1e-6


def test_gated_delta_packed_has_the_very_bits_that_its_authors_promise(load: Load) -> None:
    mx.random.seed(2)
    module = load("mlx_lm.models.gated_delta")
    B, T, Hk, Hv, Dk, Dv = 1, 2, 1, 2, 128, 16
    q, k, v = normal(B, T, Hk, Dk), normal(B, T, Hk, Dk) / 11, normal(B, T, Hv, Dv)
    g, beta = mx.random.uniform(shape=(B, T, Hv)), mx.random.uniform(shape=(B, T, Hv))
    state = normal(B, Hv, Dv, Dk)
    tree, tree_end = module.gated_delta_kernel_xtree(q, k, v, g, beta, state)
    template = [("InT", q.dtype), ("StT", state.dtype), ("Dk", Dk), ("Dv", Dv), ("Hk", Hk), ("Hv", Hv)]
    packed, packed_end = module._gated_delta_kernel_packed(
        inputs=[q, k, v, g, beta, state, T],
        template=template,
        grid=(32, Dv // 8, B * Hv),
        threadgroup=(32, 2, 1),
        output_shapes=[(B, T, Hv, Dv), state.shape],
        output_dtypes=[q.dtype, state.dtype],
    )
    assert mx.array_equal(tree, packed).item() and mx.array_equal(tree_end, packed_end).item()


def test_state_space_model(load: Load, off: Any) -> None:
    mx.random.seed(3)
    module = load("mlx_lm.models.ssm")
    heads, dim, states = 4, 10, 64
    x, B, C = normal(1, 1, heads, dim), normal(1, 1, 2, states), normal(1, 1, 2, states)
    A_log, D, dt, bias = mx.zeros(heads), normal(heads), normal(1, 1, heads), normal(heads)
    state = normal(1, heads, dim, states)
    arguments = (x, A_log, B, C, D, dt, bias, state, (0.001, 100.0))
    y, end = module.ssm_update_kernel(*arguments)
    expected, expected_end = module.ssm_attn(*arguments)
    assert off(y, expected) < 1e-5 and off(end, expected_end) < 1e-5


@pytest.mark.parametrize("dim", [40, 768])
def test_norms_with_a_sum_over_simdgroups(load: Load, dim: int, off: Any) -> None:
    mx.random.seed(4)
    module = load("mlx_lm.kernels.norm_add_norm")
    branch, stream = normal(3, dim, dtype=mx.bfloat16), normal(3, dim)
    alpha, beta = normal(dim), normal(dim)
    total, _ = module.norm_add_norm(
        branch, stream, alpha=alpha, beta=beta, post_weight=None, post_eps=1e-5, next_norm=None
    )
    expected = alpha * stream + beta * mx.fast.rms_norm(branch, None, 1e-5).astype(mx.float32)
    assert off(total, expected) < 1e-2


def test_every_lane_of_a_published_kernel_writes_the_same_zero(load: Load) -> None:
    """The one kernel here that strict refuses: where a token is masked, 32 threads write one element."""
    module = load("mlx_lm.models.gated_delta")
    arrays = [
        mx.ones(s) for s in [(1, 1, 1, 32), (1, 1, 1, 32), (1, 1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1, 32)]
    ]
    masked = mx.array([[False]])
    if module._gated_delta_kernel_masked.mode == "fast":
        assert module.gated_delta_kernel_unpacked(*arrays, masked)[0].item() == 0
    else:
        with pytest.raises(KernelFault, match=r"race: .* writes element 0 of y"):
            module.gated_delta_kernel_unpacked(*arrays, masked)


def test_a_race_in_a_published_kernel_is_found(load: Load) -> None:
    """Between the reads of the largest values and the writes of the sums there is no barrier."""
    module = load("mlx_lm.tuner.losses")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "can_run_metal", lambda: True)
        kernel = module._make_kl_forward_kernel()
    p, q = normal(1, 8), normal(1, 8)
    call = {
        "inputs": [p, q],
        "template": [("T", p.dtype), ("V", 8)],
        "grid": (1024, 1, 1),
        "threadgroup": (1024, 1, 1),
        "output_shapes": [(1, 1)],
        "output_dtypes": [p.dtype],
    }
    if kernel.mode == "strict":
        with pytest.raises(KernelFault, match=r"race: .* threadgroup array 'shared'"):
            kernel(**call)
    else:
        assert kernel(**call)[0].size == 1
