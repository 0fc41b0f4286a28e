"""Packages as pip and uv make them: what an sdist holds, and what is left where the kernels cannot be built.

The backend that pip calls is called here, on a copy of the files that git tracks.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.ops import backend

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("scikit_build_core") is None,
        reason="scikit-build-core is not installed; make test has it",
    ),
    pytest.mark.slow,
]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="ELF files are looked at")
OTHER_MLX = (
    'namespace mlx::core { __attribute__((visibility("default"))) const char* version() { return "9.8.7"; } }'
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, a git checkout of its own."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, so what is tracked is unknown")
    copy = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    return copy


def build(tree: Path, what: str, **environment: str) -> tuple[Path, str]:
    """Call the build backend's ``what``; return the file that it made and what it printed."""
    code = f"import scikit_build_core.build as b; print('made', b.{what}('dist'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return tree / "dist" / result.stdout.split("made ")[-1].strip(), result.stdout


def test_an_sdist_holds_the_kernels(tree: Path) -> None:
    sdist, _ = build(tree, "build_sdist")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in ("kernels/cpu/CMakeLists.txt", "kernels/cpu/pool.cpp", "kernels/cpu/binding/module.cpp"):
        assert name in names, f"{name} is missing"
    assert "kernels/metal/swiglu.metal" in names and "kernels/metalsim/include/metal_stdlib" in names
    assert {"tiny_llm/_cpu.pyi", "tiny_llm/demo/model.safetensors", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".a", "CMakeCache.txt"))]


@pytest.mark.parametrize(
    ("what", "environment"),
    [
        ("build_wheel", {"CXX": "/nowhere/c++"}),
        ("build_wheel", {"CXXFLAGS": "-Dtiny_llm=1"}),
        ("build_editable", {"CXX": "/nowhere/c++"}),
    ],
    ids=["no compiler", "a compiler that fails", "editable"],
)
def test_without_a_compiler_the_package_is_pure(tree: Path, what: str, environment: dict[str, str]) -> None:
    wheel, said = build(tree, what, **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert said.count("tiny_llm is installed without its CPU kernels") == 1, said
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert what == "build_editable" or "tiny_llm/ops/backend.py" in names
    assert what == "build_editable" or "tiny_llm/kernels/metal/swiglu.metal" in names
    assert what == "build_editable" or "tiny_llm/kernels/metalsim/runtime.cpp" in names
    assert what == "build_editable" or "tiny_llm/server/page/index.html" in names
    left = subprocess.run(["git", "status", "--short"], cwd=tree, capture_output=True, text=True).stdout
    assert "kernels" not in left.replace("?? kernels/\n", ""), f"a build leaves what git shows:\n{left}"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_where_there_is_a_compiler_the_kernels_work() -> None:
    assert backend.works(), "not built? pip install --no-build-isolation -v -e . shows why"


@on_linux
@pytest.mark.skipif(backend.cpu is None or shutil.which("c++") is None, reason="no kernels, or no compiler")
def test_another_mlx_is_refused_with_its_version(tmp_path: Path) -> None:
    (tmp_path / "other.cpp").write_text(OTHER_MLX)
    other = tmp_path / "libother.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-o", other, tmp_path / "other.cpp"], check=True)
    code = "import warnings; from tiny_llm.ops import backend; print(backend.choose())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(other), "TINY_LLM_BACKEND": ""},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "ref\n", result.stderr
    said = f"the CPU kernels were built for MLX {mx.__version__}, but this is MLX 9.8.7"
    assert result.stderr.count(said) == 1, result.stderr
