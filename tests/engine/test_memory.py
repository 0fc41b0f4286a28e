"""The peak is this process's own."""

import subprocess
import sys

import numpy as np

from tiny_llm.engine.memory import peak_memory_bytes


def test_the_peak_counts_what_was_held_and_let_go() -> None:
    before = peak_memory_bytes()
    held = np.ones(2**25)  # 256 MiB
    del held
    assert peak_memory_bytes() >= before + 2**27 or before > 2**29, "a dropped array no longer counts"


def test_a_childs_peak_is_not_its_parents() -> None:
    held = np.ones(2**26)  # 512 MiB
    code = "from tiny_llm.engine.memory import peak_memory_bytes; print(peak_memory_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < held.nbytes
