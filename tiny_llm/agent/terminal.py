"""Owns how a run is shown in a terminal, and how the user is asked. No result can steer the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from tiny_llm.agent.action import Prepared
from tiny_llm.agent.receipts import Record

_LINES = 8
_ENDS: Mapping[str, str] = {
    "finished": "",
    "steps": "the steps are used up (--steps)",
    "tokens": "the tokens are used up (--tokens)",
    "seconds": "the time is over (--seconds)",
    "repeated": "the model repeats itself",
    "unsolved": "no way passes the check",
    "refused": "not all of the best way's changes were allowed",
    "malformed": "the model makes no valid action",
    "context": "the prompt has {size} tokens, and the context room for {room}: choose fewer --actions",
}


class Terminal:
    """Shows records on stderr, and asks there; ``mode`` "never" and "always" answer all questions."""

    def __init__(self, mode: Literal["never", "ask", "always"]) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._mode = mode

    def approve(self, prepared: Prepared) -> str:
        """ "" allows it; else why not."""
        if self._mode == "always":
            return ""
        if self._mode == "never":
            return "the user allows no effects in this run"
        if not sys.stdin.isatty():
            return "there is no terminal in which the user could be asked (--approve always allows all)"
        shown = _coloured(prepared.preview or prepared.what)
        self._console.print(Panel(shown, title=Text(_plain(prepared.what))))
        try:
            said = self._console.input("Allow it? [b]y[/b]es, [b]n[/b]o, or say why not: ").strip()
        except EOFError:
            said = ""
        return "" if said.lower() in ("y", "yes") else f"the user said no. {said}"

    def show(self, record: Record) -> None:
        """What was noted, as far as it is for people."""
        match record["kind"]:
            case "action" if record["said"]:
                self._print(record["said"], "italic")
            case "intent" if self._mode == "always" and record["preview"]:
                self._console.print(_coloured(record["preview"]))
            case "receipt":
                failed = record["exit"] not in (0, None) or record["shown"].startswith(("error", "refused"))
                mark, style = ("✗", "red") if failed else ("✓", "green")
                before, after = record["before"][:8], record["after"][:8]
                digests = f"  {before} → {after}" if before != after else ""
                self._print(f"{mark} {record['step']:>2} {record['what']}{digests}", style)
                lines = record["shown"].split("\n")
                self._print("\n".join([*lines[:_LINES], *["..."] * (len(lines) > _LINES)]), "dim")
            case "malformed":
                self._print(f"✗ no valid action: {record['fault']}", "red")
            case "compact":
                self._print(f"The first {record['short']} steps are told in short from here on.", "dim")
            case "end" if record["reason"] != "finished":
                self._print(f"Stopped: {_ENDS[record['reason']].format(**record)}.", "yellow")

    def close(self, told: Mapping[str, Any]) -> None:
        """The answer, on stdout, and the figures of the run."""
        if told["answer"]:
            print(_plain(told["answer"]))
        for way in told.get("ways", ()):
            mark = "✓" if way["is_right"] else "✗"
            shared = f"{way['shared_tokens']} of {way['prompt_tokens']} tokens of its first prompt shared"
            self._print(f"{mark} {way['hint']}: {way['steps']} steps, {shared}", "dim")
        counts = f"{told['steps']} steps · {told['worked_s']:.1f} s · log in {told['run']}"
        self._print(f"{counts}, last digest {told['head'][:16]}", "dim")

    def _print(self, text: str, style: str) -> None:
        self._console.print(Text(_plain(text), style))


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _coloured(diff: str) -> Text:
    styles = {"+": "green", "-": "red", "@": "cyan"}
    lines = [Text(line, styles.get(line[:1], "")) for line in _plain(diff).split("\n")]
    return Text("\n").join(lines)
