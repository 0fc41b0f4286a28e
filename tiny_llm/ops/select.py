"""Our kernel or MLX's own op: owns what was measured on this machine, and remembers it in the user's cache.

Each case, that is op, width and dtype, is measured once for a device, a version of MLX and the text of our
kernels; a file about another, or one that cannot be read, is as none. A case does not name how many rows
there are: one and many must be the same op's. Knows no op: it is given two calls. MLX's is taken only
where it is faster and gives a row the same bits alone and among others.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import median
from threading import Lock

import mlx.core as mx

from tiny_llm.ops.metal import folder

Call = Callable[[], object]
_TURNS = 5
BUDGET = 1.0
"""Seconds that a process spends on measuring; what is met later is ours, and measured another time."""


@dataclass(frozen=True)
class Choice:
    """What was measured of a case: microseconds a call, and whether MLX's op keeps a row's bits."""

    ours_us: float
    theirs_us: float
    theirs_keeps_bits: bool

    @property
    def ours(self) -> bool:
        """Whether our kernel is to run."""
        return not self.theirs_keeps_bits or self.ours_us <= self.theirs_us


def seconds(call: Call) -> float:
    """What one call takes, until its arrays are there."""
    began = time.perf_counter()
    mx.eval(call())
    return time.perf_counter() - began


class Choices:
    """The choices for one device, in the file ``path``; any thread may ask.

    ``about`` names what they hold for. ``timer`` gives the seconds of a call.
    """

    def __init__(
        self, path: Path, about: Mapping[str, str], timer: Callable[[Call], float] = seconds
    ) -> None:
        self._path = path
        self._about = dict(about)
        self._timer = timer
        self._lock = Lock()
        self._spent = 0.0
        self._known: dict[str, Choice] | None = None

    def known(self) -> dict[str, Choice]:
        """Each case that was measured, by its name."""
        with self._lock:
            return dict(self._loaded())

    def ours(self, case: str, ours: Call, theirs: Call, keeps_bits: Callable[[], bool]) -> bool:
        """Whether our kernel is to run in this ``case``; measured if it is new and there is time left.

        ``keeps_bits`` tells of MLX's op whether a row's bits depend on that row alone.
        """
        with self._lock:
            known = self._loaded()
            if case not in known:
                if self._spent >= BUDGET:
                    return True
                known[case] = self._measured(ours, theirs, keeps_bits)
                self._save()
            return known[case].ours

    def _measured(self, ours: Call, theirs: Call, keeps_bits: Callable[[], bool]) -> Choice:
        """Medians of turns, after a first that compiles; at least of one."""
        turns: list[tuple[float, float]] = []
        while len(turns) < 2 or (len(turns) <= _TURNS and self._spent < BUDGET):
            turns.append((self._timer(ours), self._timer(theirs)))
            self._spent += sum(turns[-1])
        ours_s, theirs_s = (median(times) for times in zip(*turns[1:], strict=True))
        return Choice(1e6 * ours_s, 1e6 * theirs_s, keeps_bits())

    def _loaded(self) -> dict[str, Choice]:
        if self._known is None:
            self._known = self._read()
        return self._known

    def _read(self) -> dict[str, Choice]:
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            if stored["about"] != self._about:
                return {}
            found = {str(case): Choice(**values) for case, values in stored["choices"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}
        sound = (isinstance(n, int | float) for c in found.values() for n in (c.ours_us, c.theirs_us))
        return found if all(sound) else {}

    def _save(self) -> None:
        """Replace the file as a whole, with what another process has found meanwhile."""
        self._known = self._read() | self._loaded()
        cases = {case: asdict(choice) for case, choice in sorted(self._known.items())}
        text = json.dumps({"about": self._about, "choices": cases}, indent=1)
        with suppress(OSError):  # a cache that cannot be written costs a measurement, no more
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, self._path)


@cache
def choices() -> Choices:
    """Those of this machine's device."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Choices(Path(base) / "tiny_llm" / "choices.json", about_this_machine())


def about_this_machine() -> dict[str, str]:
    """The device's name, MLX's version, and a hash of our kernels' text."""
    texts = "\0".join(path.read_text(encoding="utf-8") for path in sorted(folder().glob("*.metal")))
    device = str(mx.device_info().get("device_name", "unknown"))
    return {
        "device": device,
        "mlx": version("mlx"),
        "kernels": hashlib.sha256(texts.encode()).hexdigest()[:16],
    }
