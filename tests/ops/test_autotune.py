"""Our kernel or MLX's: by times that the test gives, since here is no device to measure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.metalsim.build import why_not
from tiny_llm.ops import autotune, backend, metal
from tiny_llm.ops import rms_norm as norms
from tiny_llm.ops.autotune import Autotuner, Call

ABOUT = {"device": "M9", "mlx": "1", "kernels": "abc"}


class Timer:
    """Gives each call the seconds that it says it takes, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call: Call) -> float:
        self.calls += 1
        return float(call())  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "autotune.json"


def ask(tuner: Autotuner, ours: float, theirs: float, *, case: str = "norm", bits: bool = True) -> bool:
    return tuner.ours(case, lambda: ours, lambda: theirs, lambda: bits)


@pytest.mark.parametrize(
    ("ours", "theirs", "bits", "expected"),
    [
        (1e-3, 2e-3, True, True),
        (2e-3, 1e-3, True, False),
        (2e-3, 1e-3, False, True),
        (1e-3, 1e-3, True, True),
    ],
)
def test_the_faster_runs_if_a_rows_bits_stay(
    path: Path, ours: float, theirs: float, bits: bool, expected: bool
) -> None:
    assert ask(Autotuner(path, ABOUT, Timer()), ours, theirs, bits=bits) is expected


def test_a_case_is_measured_once_and_remembered(path: Path) -> None:
    timer = Timer()
    first = Autotuner(path, ABOUT, timer)
    assert not ask(first, 3e-3, 1e-3)
    measured = timer.calls
    assert not ask(first, 1e-3, 3e-3), "as it was measured"
    assert not ask(Autotuner(path, ABOUT, timer), 1e-3, 3e-3), "by the next process too"
    assert timer.calls == measured
    assert ask(first, 1e-3, 3e-3, case="another")
    assert set(Autotuner(path, ABOUT).known()) == {"norm", "another"}


def test_the_first_call_which_compiles_counts_for_nothing(path: Path) -> None:
    times: Iterator[float] = iter([0.5, 1e-3] + [1e-3, 2e-3] * 5)
    tuner = Autotuner(path, ABOUT, lambda _: next(times))
    assert ask(tuner, 0, 0)
    assert tuner.known()["norm"].ours_us == pytest.approx(1000)


@pytest.mark.parametrize("what", ["device", "mlx", "kernels"])
def test_measurements_of_something_else_are_made_anew(path: Path, what: str) -> None:
    ask(Autotuner(path, ABOUT, Timer()), 3e-3, 1e-3)
    other = Autotuner(path, {**ABOUT, what: "new"}, Timer())
    assert other.known() == {}
    assert ask(other, 1e-3, 3e-3)
    assert json.loads(path.read_text())["about"][what] == "new"


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"about": 1}', '{"about": %s}', '{"about": %s, "measured": []}'),
        *('{"about": %s, "measured": {"norm": 3}}', '{"about": %s, "measured": {"norm": {"ours_us": 1}}}'),
        '{"about": %s, "measured": {"norm": {"ours_us": "x", "theirs_us": 1, "theirs_keeps_bits": true}}}',
    ],
)
def test_a_file_that_is_broken_is_written_anew(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text.replace("%s", json.dumps(ABOUT)))
    assert not ask(Autotuner(path, ABOUT, Timer()), 3e-3, 1e-3)
    assert not Autotuner(path, ABOUT).known()["norm"].ours
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file stays"


def test_bytes_that_are_no_text_are_as_no_file(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00")
    assert Autotuner(path, ABOUT).known() == {}


def test_measuring_ends_after_a_second(path: Path) -> None:
    timer = Timer()
    tuner = Autotuner(path, ABOUT, timer)
    assert not ask(tuner, 0.7, 0.6, case="slow")
    assert timer.calls == 4, "a turn that compiles, and one that counts"
    assert ask(tuner, 3e-3, 1e-3), "ours, for now"
    assert timer.calls == 4
    assert set(Autotuner(path, ABOUT).known()) == {"slow"}, "what was not measured is not remembered"


def test_a_folder_that_cannot_be_made_costs_no_answer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tuner = Autotuner(tmp_path / "file" / "autotune.json", ABOUT, Timer())
    assert not ask(tuner, 3e-3, 1e-3)
    assert not ask(tuner, 1e-3, 3e-3)


def test_two_processes_keep_each_others_measurements(path: Path) -> None:
    one, other = Autotuner(path, ABOUT, Timer()), Autotuner(path, ABOUT, Timer())
    assert one.known() == other.known() == {}
    ask(one, 3e-3, 1e-3, case="one")
    ask(other, 3e-3, 1e-3, case="other")
    assert set(Autotuner(path, ABOUT).known()) == {"one", "other"}


def test_threads_measure_a_case_once(path: Path) -> None:
    timer = Timer()
    tuner = Autotuner(path, ABOUT, timer)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(tuner, 3e-3, 1e-3), range(40)))
    assert answers == [False] * 40
    assert timer.calls == 12


def test_this_machine_is_known_by_its_device_mlx_and_our_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = autotune.about_this_machine()
    assert all(before.values()) and set(before) == set(ABOUT)
    (tmp_path / "new.metal").write_text("// other text")
    monkeypatch.setattr(autotune, "folder", lambda: tmp_path)
    after = autotune.about_this_machine()
    assert after["kernels"] != before["kernels"] and after["device"] == before["device"]


@pytest.mark.parametrize("faster", ["ours", "theirs"])
def test_the_norm_is_the_one_that_was_faster(
    faster: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac, but that metalsim runs our kernel and the times are given."""
    if reason := why_not():
        pytest.skip(reason)
    x, weight = mx.random.normal((3, 96), key=mx.random.key(0)), mx.ones(96)
    made = Autotuner(path, ABOUT, lambda call: 1e-3 if call.__name__ == faster else 2e-3)  # type: ignore[attr-defined]
    monkeypatch.setattr(norms, "active", lambda: "metal")
    monkeypatch.setattr(norms, "autotuner", lambda: made)
    with backend.use("metalsim"), metal.watch() as dispatched:
        out = norms.rms_norm(x, weight, 1e-6)
    assert mx.allclose(out, norms.rms_norm_ref(x, weight, 1e-6), rtol=1e-5, atol=1e-6).item()
    assert len(dispatched) == (faster == "ours")
    assert list(made.known()) == ["rms_norm 96 mlx.core.float32"]
