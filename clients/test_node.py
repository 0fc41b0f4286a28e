"""openai for node: node/test.mjs, on what npm brought into build/clients-node."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = HERE.parent / "build" / "clients-node"


def test_openai_for_node(url: str, guarded: str) -> None:
    shutil.copy(HERE / "node" / "test.mjs", MODULES)
    environment = {**os.environ, "URL": url, "GUARDED": guarded}
    command = ["node", "--test", "test.mjs"]
    done = subprocess.run(command, cwd=MODULES, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
