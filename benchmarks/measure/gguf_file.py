"""The GGUF file that llama-server is started on: written by the llama.cpp peer's own Python."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from measure.environments import PeerMissing, python_of
from measure.worker import WORKERS
from tiny_llm.weights.names import config_of


def gguf_file(shape: str, tokenizer: Path, folder: Path) -> Path:
    """Random Q4_0 weights in a short name's shapes, and a vocabulary. Raises PeerMissing without llamacpp."""
    script = WORKERS / "random_gguf.py"
    facts = json.dumps(config_of(shape))
    command = [python_of("llamacpp", folder), script, facts, folder / "models", tokenizer]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise PeerMissing(f"its file could not be written: {done.stderr.strip().splitlines()[-1]}")
    return Path(done.stdout.strip().splitlines()[-1])
