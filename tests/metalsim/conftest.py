"""What tests of the simulator share: skipping without a compiler, and short kernels in a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import pytest

from tiny_llm.metalsim.build import why_not
from tiny_llm.metalsim.run import metal_kernel


@cache
def _missing() -> str | None:
    return why_not()


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if reason := _missing():
        pytest.skip(reason)


Run = Callable[..., list[mx.array]]


@pytest.fixture
def run() -> Run:
    """``run(source, *inputs, out=[(shape, dtype), ..], grid=, tg=, **options)``; inputs are a, b, c, ..."""

    def go(
        source: str,
        *inputs: Any,
        out: Sequence[tuple[tuple[int, ...], mx.Dtype]] = (((32,), mx.float32),),
        grid: int | tuple[int, int, int] = 32,
        tg: int | tuple[int, int, int] = 32,
        template: Sequence[tuple[str, Any]] = (),
        init: float | None = None,
        **options: Any,
    ) -> list[mx.array]:
        names = "abcdefgh"[: len(inputs)]
        kernel = metal_kernel("test", list(names), ["out", "out2"][: len(out)], source, **options)
        return kernel(
            inputs=inputs,
            template=template,
            grid=(grid, 1, 1) if isinstance(grid, int) else grid,
            threadgroup=(tg, 1, 1) if isinstance(tg, int) else tg,
            output_shapes=[shape for shape, _ in out],
            output_dtypes=[dtype for _, dtype in out],
            init_value=init,
        )

    return go
