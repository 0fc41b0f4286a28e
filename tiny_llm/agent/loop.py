"""Owns the loop: propose, check, ask, note what is about to be done, do it, note what came of it.

The log is all the state there is: what a run knows is made of its records, one by one, whether they are
written now or were read after a kill.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tiny_llm.agent.action import Actions, AgentTool, Outcome, Prepared
from tiny_llm.agent.history import Proposal, Proposing, RunHistory, RunStep
from tiny_llm.agent.receipts import Log, Record
from tiny_llm.agent.results import Results, shortened
from tiny_llm.errors import RequestError

Approve = Callable[[Prepared], str]  # asked before an effect: "" allows it, all else is why not
Show = Callable[[Record], None]
_MOST_FAULTS, _MOST_REPEATS = 3, 2
_LEAST_SHOWN, _MOST_SHOWN = 400, 6000  # characters of a result in a prompt


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may take: actions, tokens of prompts that were computed and of answers, seconds at work."""

    steps: int = 30
    tokens: int = 200_000
    seconds: float = 1800.0


class Agent:
    """One run, as its ``log`` has it, going on. ``history``, ``tokens`` and ``ended`` follow the records.

    The log's first record is the task: see ``begin``.
    """

    def __init__(
        self, log: Log, actions: Actions, model: Proposing, budget: Budget, approve: Approve, show: Show
    ) -> None:
        self._log, self._actions, self._model, self._budget = log, actions, model, budget
        self._approve, self._show = approve, show
        self._results = Results(log.folder / "results")
        self._pending: Record | None = None  # an action that nothing has come of yet
        self._intent: Record | None = None  # its effect may have begun
        self._seen: Counter[str] = Counter()
        self._faults = self.tokens = self.steps = 0
        self._worked, self._since = 0.0, time.monotonic()
        self.ended: Record | None = None
        self.history = RunHistory("")
        for record in log.records:
            self._take(record)

    def run(self) -> Record:
        """Go on until the end, whose record has the ``reason`` and the ``answer``. It may be resumed."""
        self._since, self.ended = time.monotonic(), None
        if self._intent is not None:
            self._recover(self._intent)
        while self.ended is None:
            if self._pending is not None:
                self._carry_out(self._pending)
            elif reason := self._spent():
                self._note("end", reason=reason, answer="")
            else:
                self._propose()
        return self.ended

    def hint(self, text: str) -> None:
        """The user says ``text`` before the next step."""
        self._note("hint", text=text)

    def _propose(self) -> None:
        fitted = self.history.fitted(self._model.size, self._model.room)
        if fitted.short != self.history.short:
            self._note("compact", short=fitted.short)
        if (size := self._model.size(self.history)) > self._model.room:
            self._note("end", reason="context", answer="", size=size, room=self._model.room)
            return
        made = self._model.propose(self.history, self._left())
        counts = {
            "prompt_tokens": made.prompt_tokens,
            "tokens": made.tokens,
            "cached_tokens": made.cached_tokens,
        }
        fault = made.fault or self._fault(made)
        if fault:
            self._note("malformed", said=made.said[:_MOST_SHOWN], action=made.action, fault=fault, **counts)
        elif made.action is None:
            self._note("end", reason="finished", answer=made.said, **counts)
        else:
            self._note("action", action=made.action, said=made.said, **counts)

    def _fault(self, made: Proposal) -> str:
        try:
            if made.action is not None:
                self._actions.find(made.action)
        except RequestError as error:
            return str(error)
        return ""

    def _carry_out(self, pending: Record) -> None:
        tool, arguments = self._actions.find(pending["action"])
        if self._seen[_key(pending["action"])] >= 1:
            what = "This was done before, and nothing has changed since. Do something else, or answer."
            self._receipt(f"repeat {tool.name}", Outcome(what), repeated=True)
            return
        try:
            prepared = tool.prepare(arguments)
            refused = self._asked(prepared) if tool.has_effect else ""
        except RequestError as error:
            self._receipt(tool.name, Outcome(f"error: {error}", 1))
            return
        if refused:
            self._receipt(prepared.what, Outcome(f"refused: {refused}"), before=prepared.before)
            return
        if tool.has_effect:
            about = {"what": prepared.what, "before": prepared.before, "after": prepared.after}
            self._note("intent", **about, preview=prepared.preview[:_MOST_SHOWN])
        self._receipt(prepared.what, _performed(prepared, tool, arguments), before=prepared.before)

    def _asked(self, prepared: Prepared) -> str:
        """Why not, if not. The time that the user thinks is not the run's."""
        began = time.monotonic()
        try:
            return self._approve(prepared)
        finally:
            self._since += time.monotonic() - began

    def _recover(self, intent: Record) -> None:
        """An effect had begun when the process ended: what became of it is seen, and not done again."""
        assert self._pending is not None, "an intent is an action's"
        tool, arguments = self._actions.find(self._pending["action"])
        now = _digest_now(tool, arguments)
        told = "it may have been done, in part or whole"
        if intent["after"] and now in (intent["before"], intent["after"]):
            told = "it was done" if now == intent["after"] else "it was not done"
        outcome = Outcome(f"The run was interrupted during this: {told}.", None, now)
        self._receipt(intent["what"], outcome, before=intent["before"], recovered=True)

    def _receipt(self, what: str, outcome: Outcome, *, before: str = "", **more: Any) -> None:
        most = min(_MOST_SHOWN, max(_LEAST_SHOWN, self._model.room // 2))
        result = self._results.keep(outcome.text)
        told = {"what": what, "before": before, "after": outcome.after or before, "exit": outcome.exit}
        shown = shortened(outcome.text, result, most)
        self._note("receipt", step=self.steps, **told, result=result, shown=shown, **more)

    def _spent(self) -> str:
        """Which budget is, or what else keeps the run from going on; "" if nothing does."""
        if self._faults >= _MOST_FAULTS:
            return "malformed"
        if max(self._seen.values(), default=0) >= _MOST_REPEATS:
            return "repeated"
        if self.steps >= self._budget.steps:
            return "steps"
        if self.tokens >= self._budget.tokens:
            return "tokens"
        return "seconds" if self._left() <= 0 else ""

    def _left(self) -> float:
        return self._budget.seconds - self._worked - (time.monotonic() - self._since)

    def _note(self, kind: str, **said: Any) -> None:
        now = time.monotonic()
        record = self._log.append(kind, **said, worked_s=round(self._worked + now - self._since, 3))
        self._since = now
        self._take(record)
        self._show(record)

    def _take(self, record: Record) -> None:
        """Follow a record: of this run's, or read from its log."""
        self._worked = record["worked_s"]
        self.tokens += (
            record.get("prompt_tokens", 0) - record.get("cached_tokens", 0) + record.get("tokens", 0)
        )
        match record["kind"]:
            case "begin":
                self.history = RunHistory(record["task"])
            case "hint" if self.ended is not None and self.ended["answer"]:
                answered = RunStep(None, self.ended["answer"], record["text"], f"{self.steps}. answered")
                self.history = self.history.with_step(answered)
            case "hint":
                self.history = self.history.with_hint(record["text"])
            case "compact":
                self.history = replace(self.history, short=record["short"])
            case "malformed":
                self.steps, self._faults = self.steps + 1, self._faults + 1
                shown = f"That was no valid action: {record['fault']}"
                self.history = self.history.with_step(
                    RunStep(None, record["said"], shown, f"{self.steps}. no action")
                )
            case "action":
                self.steps, self._faults, self._pending = self.steps + 1, 0, record
            case "intent":
                self._intent = record
            case "receipt":
                self._take_receipt(record)
            case "end":
                self.ended = record

    def _take_receipt(self, record: Record) -> None:
        assert self._pending is not None, "a receipt is an action's"
        action, said = self._pending["action"], self._pending["said"]
        ended = "" if record["exit"] is None else f", exit {record['exit']}"
        changed = record["before"] != record["after"]
        digests = f", {record['before'][:12] or 'new'} -> {record['after'][:12] or 'gone'}" if changed else ""
        brief = f"{self.steps}. {record['what'][:200]}{ended}{digests} [result {record['result']}]"
        self.history = self.history.with_step(RunStep(action, said, record["shown"], brief))
        if changed:
            self._seen.clear()
        self._seen[_key(action)] += not record.get("recovered")
        self._pending = self._intent = None


def begin(log: Log, task: str, **about: Any) -> None:
    """Write a run's first record: its task, and what else is to be known of it."""
    log.append("begin", task=task, **about, worked_s=0.0)


def _performed(prepared: Prepared, tool: AgentTool, arguments: Any) -> Outcome:
    try:
        return prepared.perform()
    except RequestError as error:
        return Outcome(f"error: {error}", 1, _digest_now(tool, arguments) if tool.has_effect else "")


def _digest_now(tool: AgentTool, arguments: Any) -> str:
    """The digest of what arguments would change; "?" where it cannot be read: a folder may lie there now."""
    try:
        return tool.digest(arguments)
    except RequestError:
        return "?"


def _key(action: Any) -> str:
    return json.dumps(action, sort_keys=True)
