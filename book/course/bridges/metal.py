"""What ``ops/metal.py`` becomes where a learner has kernels/metal of their own: it is read too."""

from __future__ import annotations

from pathlib import Path

from book.course.native import with_learners_parts


def _source(path: Path) -> str:
    return with_learners_parts(f"kernels/metal/{path.name}", path.read_text(encoding="utf-8"))
