"""After the warm-up no request meets a kernel that is yet to be compiled."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from tiny_llm import LLM, SamplingParams
from tiny_llm.metalsim.build import why_not
from tiny_llm.ops import metal

Variant = tuple[object, ...]


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> set[Variant]:
    """The texts that MLX would compile, by all that it puts into a kernel's name; nothing is run."""
    if reason := why_not():
        pytest.skip(reason)
    seen: set[Variant] = set()

    def passed(one: object) -> object:
        """A number is handed over, and fewer than 8 elements lie in another address space."""
        if not isinstance(one, mx.array):
            return type(one)
        return one.dtype, one.ndim == 0 or ("few" if one.size < 8 else "many")

    def stand_in(text: metal.Text, _mode: str) -> Callable[..., list[mx.array]]:
        def call(**given: object) -> list[mx.array]:
            inputs, template = given["inputs"], given["template"]
            shapes, dtypes = given["output_shapes"], given["output_dtypes"]
            assert isinstance(inputs, list) and isinstance(template, list)
            assert isinstance(shapes, list) and isinstance(dtypes, list)
            seen.add((text.name, *template, *map(passed, inputs), *dtypes))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

        return call

    monkeypatch.setattr(metal, "_made", stand_in)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["auto", "int8"])
def test_traffic_compiles_nothing_after_the_warm_up(kept: str, variants: set[Variant]) -> None:
    with LLM(backend="metalsim", quantize=4, kv_dtype=kept) as llm:
        llm.engine.runner.warm_up(llm.engine.settings.kv_blocks)
        warm = set(variants)
        drawn = [SamplingParams(max_tokens=3, temperature=t, seed=1, ignore_eos=True) for t in (0.0, 0.9)]
        for requests, length in ((1, 3), (1, 127), (2, 300), (3, 9), (7, 3), (9, 140), (40, 3)):
            prompts = [[1 + number] * (length + number) for number in range(requests)]
            llm.generate(prompts, drawn[requests % 2])
        for _ in range(2):  # what begins alike is found again, and read together
            llm.generate([[5] * 140 + [number] for number in range(3)], drawn[0])
    new = variants - warm
    assert not new, f"of {len(variants)}: {sorted(map(str, new))}"
