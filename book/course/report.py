"""Owns which of a chapter's tests run on a learner's code, and what pytest says: an error once. A plugin.

Two failures are one error where the innermost line of the learner's, or else of all, is the same.
Loaded before the package, so it imports none of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_OTHERS = frozenset({"cpu", "mlx"})
_AGAIN = "again"
"""What failures are called that have no traceback of their own."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is slow comes last: a mistake shows by hand before it shows in a whole model.

    Backends whose kernels would run in the place of a learner's code are left out.
    """
    items[:] = [item for item in items if not _OTHERS & set(_parameters(item))]
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def _parameters(item: pytest.Item) -> Iterator[str]:
    spec = getattr(item, "callspec", None)
    return (value for value in (spec.params.values() if spec else ()) if isinstance(value, str))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep the first report of each error among the failures, before the terminal shows them."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None, "it shows what this sorts"
    for outcome in ("failed", "error"):
        kept = dict[object, pytest.TestReport]()
        for report in reporter.stats.get(outcome, []):
            if kept.setdefault(_error(report), report) is not report:
                reporter.stats.setdefault(_AGAIN, []).append(report)
        if kept:
            reporter.stats[outcome] = list(kept.values())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests are not shown."""
    again = len(terminalreporter.stats.get(_AGAIN, ()))
    if again:
        terminalreporter.write_line(f"{again} more failed as one of these did.")


def _error(report: pytest.TestReport) -> object:
    """Where an error arose: a file and a line."""
    traceback = getattr(report.longrepr, "reprtraceback", None)
    if traceback is None:
        return str(report.longrepr)
    places = [(str(e.reprfileloc.path), e.reprfileloc.lineno) for e in traceback.reprentries if e.reprfileloc]
    folder = Path(os.environ.get("TINY_LLM_COURSE", "."))
    own = [place for place in places if folder in Path(place[0]).absolute().parents]
    return (own or places)[-1] if places else report.nodeid
