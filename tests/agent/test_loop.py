"""The loop by a model that is a plain function: approval, receipts, budgets, repeats, long results."""

from __future__ import annotations

from typing import Any

import pytest

from tiny_llm.agent.loop import Budget
from tiny_llm.agent.receipts import read_log
from tiny_llm.agent.workspace import digest_of

EDIT = ("edit", {"path": "a", "old": "one", "new": "two"})
ADD = ("calculator", {"expression": "1 + 1"})


def look(number: int) -> tuple[str, dict[str, Any]]:
    return "calculator", {"expression": f"{number} + {number}"}


def test_an_effect_is_asked_for_noted_before_and_proved_after(bench: Any) -> None:
    bench.write("a", "one")
    end = bench.run([ADD, EDIT, "done"])
    assert (end["reason"], end["answer"], bench.text("a")) == ("finished", "done", "two")
    assert [(one.what, one.before, one.after) for one in bench.asked] == [
        ("edit a", digest_of(b"one"), digest_of(b"two"))
    ], "a calculation is no effect"
    records = read_log(bench.folder)
    kinds = [record["kind"] for record in records]
    assert kinds == ["begin", "action", "receipt", "action", "intent", "receipt", "end"]
    intent, receipt = records[4:6]
    assert "-one\n+two" in intent["preview"]
    assert [receipt[name] for name in ("what", "before", "after", "exit")] == [
        "edit a",
        digest_of(b"one"),
        digest_of(b"two"),
        0,
    ]


def test_what_is_refused_is_not_done_and_the_model_is_told(bench: Any) -> None:
    bench.write("a", "one")
    bench.run([EDIT, "done"], approve=lambda _: "not today")
    assert bench.text("a") == "one"
    (receipt,) = bench.receipts()
    assert receipt["shown"] == "refused: not today" and receipt["before"] == receipt["after"]
    assert "intent" not in [record["kind"] for record in bench.noted]


@pytest.mark.parametrize(
    ("budget", "reason", "steps"),
    [
        (Budget(steps=3), "steps", 3),
        (Budget(tokens=25), "tokens", 3),
        (Budget(seconds=0), "seconds", 0),
    ],
)
def test_a_budget_ends_a_run_and_a_larger_one_goes_on(
    bench: Any, budget: Budget, reason: str, steps: int
) -> None:
    def speaks(history: Any) -> Any:
        return look(len(history.steps)) if len(history.steps) < 5 else "done"

    end = bench.run(speaks, budget=budget)
    assert (end["reason"], bench.agent.steps) == (reason, steps)
    assert bench.run(speaks)["reason"] == "finished" and bench.agent.steps == 5


def test_the_time_that_the_user_thinks_is_not_the_runs(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def approve(_: object) -> str:
        now[0] += 10_000
        return ""

    bench.write("a", "one")
    assert bench.run([EDIT, "done"], approve=approve, budget=Budget(seconds=60))["worked_s"] == 0


def test_a_repeated_action_is_not_done_again_and_stops_the_run(bench: Any) -> None:
    end = bench.run(lambda _: ADD)
    assert end["reason"] == "repeated" and bench.agent.steps == 2
    first, second = bench.receipts()
    assert first["shown"] == "2" and "done before" in second["shown"] and second["repeated"]


def test_the_same_command_after_a_change_is_no_repeat(bench: Any) -> None:
    bench.write("a", "one")
    cat = ("run", {"command": "cat a", "arguments": []})
    assert bench.run([cat, EDIT, cat, "done"], allow=["cat a"])["reason"] == "finished"
    assert [one["shown"] for one in bench.receipts()] == ["[exit 0]\none", "a is changed.", "[exit 0]\ntwo"]


def test_actions_that_are_none_are_told_and_three_stop_the_run(bench: Any) -> None:
    model = bench.scripted([("launch", {}), ("read", {"path": "a"}), ("edit", {}), "done"])
    end = bench.run(model)
    assert end["reason"] == "malformed" and bench.agent.steps == 3
    assert "no action 'launch'" in model.seen[1].steps[0].shown
    assert not bench.asked and not bench.receipts()


def test_what_fails_is_told_and_the_run_goes_on(bench: Any) -> None:
    end = bench.run([("read", {"path": "../x", "first": 1, "last": 2}), EDIT, "done"])
    assert end["reason"] == "finished"
    assert all(one["shown"].startswith("error:") and one["exit"] == 1 for one in bench.receipts())


def test_a_long_result_stays_outside_of_the_prompt(bench: Any) -> None:
    bench.write("a", "\n".join(f"line {number}" for number in range(1, 5001)))
    model = bench.scripted(
        lambda h: [
            ("read", {"path": "a", "first": 1, "last": 5000}),
            ("recall", {"result": h.steps[0].shown[8:20] if h.steps else "", "first": 2501, "last": 2502}),
            ("recall", {"result": "0" * 12, "first": 1, "last": 2}),
            "done",
        ][len(h.steps)]
    )
    assert bench.run(model)["reason"] == "finished"
    long, lines, absent = (one["shown"] for one in bench.receipts())
    assert len(long) < 4400 and "line 1\n" in long and "line 5000" in long and "line 2500" not in long
    assert "\nline 2500\nline 2501" in lines  # its first line says the range
    assert "no result" in absent


def test_old_steps_become_lines_that_receipts_back(bench: Any) -> None:
    for number in range(12):
        bench.write(f"f{number}", f"{number} " + "word " * 200)

    def speaks(history: Any) -> Any:
        number = len(history.steps)
        return ("read", {"path": f"f{number}", "first": 1, "last": 9}) if number < 12 else "done"

    model = bench.scripted(speaks, room=1000)
    assert bench.run(model)["reason"] == "finished"
    assert max(model.size(history) for history in model.seen) <= 750, "each prompt fits"
    last, receipts = model.seen[-1], bench.receipts()
    assert 0 < last.short < 12 and last.summary.count("\n") == last.short
    for number, line in enumerate(last.summary.split("\n")[1:]):
        receipt = receipts[number]
        assert line == f"{number + 1}. {receipt['what']} [result {receipt['result']}]"
        kept = (bench.folder / "results" / receipt["result"]).read_text()
        assert digest_of(kept.encode()).startswith(receipt["result"])


def test_a_history_that_cannot_fit_ends_the_run(bench: Any) -> None:
    end = bench.run(bench.scripted(["done"], room=10), task="much " * 100)
    assert (end["reason"], end["room"]) == ("context", 10)
