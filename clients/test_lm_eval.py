"""lm-eval's local-completions on a task of ours: log-likelihoods of prompts, and answers up to a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TASK = Path(__file__).with_name("lm_eval_task")


@pytest.mark.parametrize("tokenizer", ["folder", "remote"])
def test_the_bundled_model_can_add(url: str, tokenizer: str, tmp_path: Path) -> None:
    for task in TASK.glob("*.yaml"):
        text = task.read_text("utf-8").replace("QUESTIONS", json.dumps(str(TASK / "questions.jsonl")))
        (tmp_path / task.name).write_text(text, "utf-8")
    model = f"model=demo,base_url={url}/v1/completions,num_concurrent=2,max_retries=1,max_length=1024,"
    model += {
        "folder": f"tokenizer_backend=huggingface,tokenizer={ROOT / 'tiny_llm/demo'}",
        "remote": "tokenizer_backend=remote",
    }[tokenizer]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model]
    command += ["--tasks", "tiny_choice,tiny_answer", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [path] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text("utf-8"))["results"]
    assert results["tiny_choice"]["acc,none"] == results["tiny_answer"]["exact_match,none"] == 1.0, results
