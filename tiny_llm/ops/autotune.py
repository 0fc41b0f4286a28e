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
from tiny_llm.user_cache import user_cache

Call = Callable[[], object]
_TURNS = 5
BUDGET = 1.0
"""Seconds that a process spends on measuring; what is met later is ours, and measured another time."""


@dataclass(frozen=True)
class Measurement:
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


class Autotuner:
    """What was measured on one device, in the file ``path``, if there is one; any thread may ask.

    ``about`` names what they hold for. ``timer`` gives the seconds of a call.
    """

    def __init__(
        self, path: Path | None, about: Mapping[str, str], timer: Callable[[Call], float] = seconds
    ) -> None:
        self._path = path
        self._about = dict(about)
        self._timer = timer
        self._lock = Lock()
        self._spent = 0.0
        self._known: dict[str, Measurement] | None = None

    def known(self) -> dict[str, Measurement]:
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

    def _measured(self, ours: Call, theirs: Call, keeps_bits: Callable[[], bool]) -> Measurement:
        """Medians of turns, after a first that compiles; at least of one."""
        ours_s: list[float] = []
        theirs_s: list[float] = []
        while len(ours_s) < 2 or (len(ours_s) <= _TURNS and self._spent < BUDGET):
            # In turns, so that a machine that slows down does so for both.
            ours_s.append(self._timer(ours))
            theirs_s.append(self._timer(theirs))
            self._spent += ours_s[-1] + theirs_s[-1]
        return Measurement(1e6 * median(ours_s[1:]), 1e6 * median(theirs_s[1:]), keeps_bits())

    def _loaded(self) -> dict[str, Measurement]:
        if self._known is None:
            self._known = self._read()
        return self._known

    def _read(self) -> dict[str, Measurement]:
        if self._path is None:
            return {}
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            if stored["about"] != self._about:
                return {}
            found = {str(case): Measurement(**values) for case, values in stored["measured"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}
        # A file that someone has edited may hold text where a number should be.
        for case in found.values():
            if not isinstance(case.ours_us, int | float) or not isinstance(case.theirs_us, int | float):
                return {}
        return found

    def _save(self) -> None:
        """Replace the file as a whole, with what another process has found meanwhile."""
        if self._path is None:
            return
        self._known = self._read() | self._loaded()
        cases = {case: asdict(measured) for case, measured in sorted(self._known.items())}
        text = json.dumps({"about": self._about, "measured": cases}, indent=1)
        with suppress(OSError):  # a cache that cannot be written costs a measurement, no more
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, self._path)


@cache
def autotuner() -> Autotuner:
    """Those of this machine's device."""
    kept = user_cache()
    return Autotuner(kept / "autotune.json" if kept else None, about_this_machine())


def about_this_machine() -> dict[str, str]:
    """The device's name, MLX's version, and a hash of our kernels' text."""
    texts = "\0".join(path.read_text(encoding="utf-8") for path in sorted(folder().glob("*.metal")))
    device = str(mx.device_info().get("device_name", "unknown"))
    return {
        "device": device,
        "mlx": version("mlx"),
        "kernels": hashlib.sha256(texts.encode()).hexdigest()[:16],
    }
