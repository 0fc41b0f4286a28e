"""The peak is this process's own."""

import subprocess
import sys

import numpy as np
import pytest

from tiny_llm.errors import RequestError
from tiny_llm.memory import held_memory_bytes, parse_bytes

CHILD = """
import numpy as np
from tiny_llm.memory import peak_memory_bytes
print(peak_memory_bytes())
held = np.ones(2**25)  # 256 MiB
del held
print(peak_memory_bytes())
"""


@pytest.mark.slow
def test_the_peak_counts_what_was_let_go_and_nothing_of_the_parent() -> None:
    held = np.ones(2**26)  # 512 MiB
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    before, after = map(int, child.stdout.split())
    assert before < held.nbytes, "the parent's peak counts too"
    assert after >= before + 2**27, "a dropped array no longer counts"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", 4_000_000_000),
        ("512 mb", 512_000_000),
        ("1.5GiB", 3 << 29),
        ("2k", 2000),
        ("123", 123),
        ("7b", 7),
    ],
)
def test_amounts_of_memory_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text, "--kv-memory") == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4 gigs", "1e9", "nan"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is no amount of memory; write it like 4GB"):
        parse_bytes(text, "--kv-memory")


def test_what_is_held_counts_what_mlx_does_not_know_of() -> None:
    before = held_memory_bytes()
    held = np.ones(2**24)  # 128 MiB
    assert held_memory_bytes() >= before + held.nbytes // 2
