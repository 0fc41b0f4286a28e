"""The choice of backend: by name, by environment, by what is there; in a block, in a thread."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.errors import ConfigError
from tiny_llm.metrics import fallbacks
from tiny_llm.ops import backend

on_a_cpu = pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="the default device is a GPU")
built = pytest.mark.skipif(not backend.works(), reason="the CPU kernels are not built")

WITHOUT_MODULE = """
import sys
sys.modules["tiny_llm._cpu"] = None  # as if it had not been built
from tiny_llm.errors import ConfigError
from tiny_llm.ops import backend
print(backend.choose(), backend.choose())
try:
    backend.choose("cpu")
except ConfigError as error:
    print(error)
"""


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"backend is 'cuda9', expected one of ref, cpu, mlx, metal, metalsim, cuda\."
    ):
        backend.choose("cuda9")


def test_metal_is_refused_where_there_is_no_device() -> None:
    if mx.metal.is_available():
        assert backend.choose("metal") == "metal"
    else:
        with pytest.raises(ConfigError, match="backend 'metal' is not there: MLX finds no Metal device"):
            backend.choose("metal")


def test_cuda_is_refused_where_there_is_no_device() -> None:
    if mx.cuda.is_available():
        assert backend.choose("cuda") == "cuda"
    else:
        with pytest.raises(ConfigError, match="backend 'cuda' is not there: MLX finds no CUDA device"):
            backend.choose("cuda")


def test_metalsim_without_a_compiler_says_how_to_get_one(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", "from tiny_llm.ops import backend; backend.choose('metalsim')"],
        env={**os.environ, "TINY_LLM_CLANG": str(tmp_path / "clang")},
        capture_output=True,
        text=True,
    )
    assert "ConfigError: backend 'metalsim' is not there: " in child.stderr


@pytest.mark.parametrize(("there", "best"), [("metal", "metal"), ("cuda", "cuda"), (None, "mlx")])
def test_a_gpu_is_used_where_it_is_the_default_device(
    monkeypatch: pytest.MonkeyPatch, there: str | None, best: str
) -> None:
    """It was ``ref``, which is several times slower there than MLX's own operations."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    for name in ("metal", "cuda"):
        monkeypatch.setattr(getattr(mx, name), "is_available", lambda name=name: name == there)
    assert backend._best.__wrapped__() == best


def test_no_kernel_for_gpus_is_trusted_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "active", lambda: "metal")
    assert not backend.runs_ours("rms_norm") and backend.on_mlx()
    monkeypatch.setattr(backend, "choose", lambda name: name)
    with backend.use("metal"):
        assert backend.runs_ours("rms_norm"), "a backend that was asked for by name runs all of them"


def test_the_environment_decides_where_no_name_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "ref")
    assert backend.choose() == backend.active() == "ref"
    monkeypatch.setenv(backend.VARIABLE, "nonsense")
    with pytest.raises(ConfigError, match="backend is 'nonsense'"):
        backend.choose()
    assert backend.choose("ref") == "ref", "a name goes before the environment"


@on_a_cpu
@built
def test_the_kernels_are_used_where_they_are() -> None:
    assert backend.choose() == "cpu"


@on_a_cpu
def test_without_kernels_it_is_ref_and_says_so_once() -> None:
    environment = {name: value for name, value in os.environ.items() if name != backend.VARIABLE}
    command = [sys.executable, "-c", WITHOUT_MODULE]
    child = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    first, second = child.stdout.splitlines()
    assert first == "ref ref"
    assert second.startswith("backend 'cpu' is not there: its module was not built. To have it, install a")
    assert child.stderr.count("Generation is slow: there are no CPU kernels") == 1
    assert "apt install g++" in child.stderr


@built
def test_a_block_has_its_own() -> None:
    with backend.use("ref") as outer:
        with backend.use("cpu") as inner:
            assert (outer, inner, backend.active()) == ("ref", "cpu", "cpu")
        assert backend.active() == "ref"
        with pytest.raises(RuntimeError, match="gone wrong"), backend.use("cpu"):
            raise RuntimeError("gone wrong")
        assert backend.active() == "ref", "an error must not leave its backend behind"


@built
def test_a_thread_has_its_own() -> None:
    seen = []
    with backend.use("ref"):
        thread = threading.Thread(target=lambda: seen.append(backend.active()))
        thread.start()
        thread.join()
    assert seen == [backend.choose()]


@built
def test_arrays_that_the_kernels_do_not_take_are_counted() -> None:
    def count() -> int:
        return fallbacks().read().get("some op", 0)

    wide, narrow = mx.zeros(3), mx.zeros(3, mx.bfloat16)
    before = count()
    with backend.use("cpu"):
        assert backend.on_cpu("some op", wide, wide)
        assert count() == before
        assert not backend.on_cpu("some op", wide, narrow)
        assert count() == before + 1
    with backend.use("ref"):
        assert not backend.on_cpu("some op", wide)
        assert not backend.on_cpu("some op", narrow)
    assert count() == before + 1, "on ref, ref is no fallback"
