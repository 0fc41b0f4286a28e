"""The peak is this process's own."""

import subprocess
import sys

import numpy as np

CHILD = """
import numpy as np
from tiny_llm.engine.memory import peak_memory_bytes
print(peak_memory_bytes())
held = np.ones(2**25)  # 256 MiB
del held
print(peak_memory_bytes())
"""


def test_the_peak_counts_what_was_let_go_and_nothing_of_the_parent() -> None:
    held = np.ones(2**26)  # 512 MiB
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    before, after = map(int, child.stdout.split())
    assert before < held.nbytes, "the parent's peak counts too"
    assert after >= before + 2**27, "a dropped array no longer counts"
