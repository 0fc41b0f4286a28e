"""The plan names each chapter once, with the files that it teaches, and shows commands that there are."""

from __future__ import annotations

import re

from book.course.manifest import ROOT, Chapter, read_manifest
from book.course.workbook import in_parts

PLAN = (ROOT / "book" / "docs" / "plan.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| [^|]+ \| (?P<files>[^|]+) \| \[(?P<id>[\d.]+)\]\((?P<page>[^)]+)\) \|$", re.M)


def files(it: Chapter) -> set[str]:
    """Those that a chapter teaches, as the plan writes them."""
    homes = {in_parts(definition)[0] for definition in it.teaches}
    return {
        home if "/" in home else home.removeprefix("tiny_llm.").replace(".", "/") + ".py" for home in homes
    }


def test_each_chapter_has_its_row() -> None:
    rows = {found["id"]: found for found in ROW.finditer(PLAN)}
    chapters = read_manifest()
    assert list(rows) == list(chapters), "each chapter once, in their order"
    for it in chapters.values():
        assert rows[it.id]["page"] == it.page
        assert set(re.findall(r"`([^`]+)`", rows[it.id]["files"])) == files(it), it.id
