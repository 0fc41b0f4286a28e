"""make mac's report: all of it runs here on MLX's CPU device, and what goes wrong is told and not raised."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import mac_report
import pytest

from tiny_llm.proving.record import machine

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_quick_does_all_parts_and_prints_a_table(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    script = ROOT / "benchmarks" / "mac_report.py"
    command = [sys.executable, str(script), "--quick", "--backend", "mlx", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["kernel_tests"]["failed"] == {} and report["kernel_tests"]["on_the_device"] == 0
    assert report["proofs"] == {}, "backend mlx has no kernels of ours"
    assert report["bundled_model"]["right"] == "right"
    answers = report["speed"]["tiny"]["answers"]
    assert list(answers) == [
        "decode, 1 x after 16",
        "decode, 2 x after 16",
        "prompt of 16",
        "2 at once, 16 + 4",
    ]
    for name, one in answers.items():
        assert set(one["tok_s"]) == {"tiny_llm", "mlx-lm"} and min(one["tok_s"].values()) > 0, name
        assert min(one["peak_bytes"].values()) > 100_000, name
    assert "| tiny, decode, 1 x after 16 |" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == []


def report_of(**parts: object) -> dict[str, object]:
    """A report of a machine where nothing went wrong, but for ``parts``."""
    about = {**machine("metal"), "chip": "M9", "memory_bytes": 2**34, "mlx_lm": "1", "commit": "abc"}
    demo = {"right": "right", "same_as_ref": 3, "of": 3, "decode_tok_s": 9.0, "kernels": ""}
    good = {"kernel_tests": {"ran": 3, "on_the_device": 2, "failed": {}}, "proofs": {}, "speed": {}}
    return {"backend": "metal", "machine": about, "bundled_model": demo, **good, **parts}


def test_what_failed_is_listed_and_times_are_not_judged() -> None:
    timings = [{"shape": "1 row", "ours_us": 90.0, "mlx_us": 10.0}]
    proofs = {
        "qwen2-0.5b": {
            "rope": {"op": "rope", "wrong": "", "timings": timings},
            "swiglu": {"op": "swiglu", "wrong": "a gated unit: off by 2", "timings": []},
        }
    }
    slow = {"tok_s": {"tiny_llm": 1.0, "mlx-lm": 9.0}, "ratio": 0.111, "peak_bytes": {}}
    slow["peak_bytes"] = {"tiny_llm": 2e9, "mlx-lm": 1e9}
    speed = {"qwen2-0.5b": {"about": {}, "answers": {"prompt of 512": slow}}}
    tests = {"ran": 3, "on_the_device": 2, "failed": {"test_rope[metal]": ["off by 3"]}}
    report = report_of(proofs=proofs, speed=speed, kernel_tests=tests)
    assert mac_report.failures(report) == ["test_rope[metal]", "qwen2-0.5b: swiglu: a gated unit: off by 2"]
    lines = list(mac_report.table(report))
    assert lines[0].startswith("**M9, 16 GiB**") and lines[0].endswith("backend `metal`")
    assert "| qwen2-0.5b | rope | 1 row | 90.0 | 10.0 | 0.11x | |" in lines
    assert "| qwen2-0.5b | swiglu | | | | | a gated unit: off by 2 |" in lines
    assert "| qwen2-0.5b, prompt of 512 | 1.0 | 9.0 | 0.11x | 2.00 | 1.00 |" in lines
    assert "  - `test_rope[metal]`: off by 3" in lines


@pytest.mark.parametrize("part", mac_report.PARTS)
def test_a_part_that_failed_is_told_and_the_others_stand(part: str) -> None:
    report = report_of(**{part: {"error": "OSError: no"}})
    assert mac_report.failures(report) == [part]
    assert f"- {part} failed: `OSError: no`" in list(mac_report.table(report))


def test_an_answer_that_is_wrong_is_a_failure() -> None:
    demo = {"right": "wrong: '12'", "same_as_ref": 0, "of": 3, "decode_tok_s": 9.0, "kernels": ""}
    assert mac_report.failures(report_of(bundled_model=demo)) == ["the bundled model is wrong: '12'"]


def test_tests_are_counted_by_where_they_ran() -> None:
    suite = ElementTree.fromstring(
        "<testsuite><testcase name='test_rope[metal-bfloat16]'/><testcase name='test_rope[metalsim-1]'/>"
        "<testcase name='test_norm[3-metal]'><failure message='off by 2\nmore'/></testcase>"
        "<testcase name='test_text[cuda]'><skipped/></testcase><testcase name='test_lines'/></testsuite>"
    )
    assert mac_report.counts(suite) == {
        **{"ran": 4, "on_the_device": 2, "failed": {"test_norm[3-metal]": ["off by 2 more"]}}
    }
