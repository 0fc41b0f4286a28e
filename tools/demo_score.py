"""Score the bundled model on held-out prompts, skill by skill, with greedy decoding.

    python tools/demo_score.py --count 200

Prints a table and one JSON line. The tests take smaller counts through ``score``.
"""

import argparse
import json
import random
from dataclasses import dataclass

from demo_corpus import SKILLS
from demo_skills.base import Example
from demo_skills.records import parses
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tiny_llm import LLM, SamplingParams


@dataclass(frozen=True)
class Answered:
    """One held-out example and what the model said."""

    example: Example
    answer: str
    prompt_tokens: int
    right: bool


def held_out_examples(skill: str, count: int, seed: int = 7) -> list[Example]:
    """Return ``count`` held-out examples; of serving, that many different questions."""
    rng = random.Random(seed)
    if skill == "serving":
        entries = SKILLS[skill].entries()
        chosen = entries if count >= len(entries) else rng.sample(entries, count)
        return [SKILLS[skill].ask(entry, entry["questions"][-1]) for entry in chosen]
    return [SKILLS[skill].make(rng, True) for _ in range(count)]


def score(llm: LLM, skill: str, count: int) -> list[Answered]:
    """Ask the model ``count`` held-out examples of a skill, all at once, and judge its answers."""
    examples = held_out_examples(skill, count)
    prompts = [llm.chat_prompt(example.messages[:-1], tools=example.tools) for example in examples]
    completions = llm.generate(prompts, SamplingParams(max_tokens=160))
    answers = []
    for example, done in zip(examples, completions, strict=True):
        right = SKILLS[skill].right(example, done.text) and done.finish_reason == "stop"
        answers.append(Answered(example, done.text, len(done.prompt_token_ids), right))
    return answers


def share(answers: list[Answered]) -> float:
    """Return the share of right answers."""
    return sum(a.right for a in answers) / len(answers)


def main() -> None:
    """Print the seven scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--misses", action="store_true", help="print every wrong answer")
    args = parser.parse_args()
    llm, scores = LLM(args.model), {}
    table = Table("skill", "right", "of", "%")
    for skill in track(SKILLS, transient=True):
        answers = score(llm, skill, args.count)
        scores[skill] = share(answers)
        if skill == "records":
            scores["records_parse"] = sum(parses(a.answer) for a in answers) / len(answers)
        table.add_row(
            skill, str(sum(a.right for a in answers)), str(len(answers)), f"{100 * scores[skill]:.1f}"
        )
        for miss in answers if args.misses else []:
            if not miss.right:
                print(f"{skill}: {miss.example.messages[-2]['content']!r}: {miss.answer!r}")
                print(f"   expected {miss.example.messages[-1]['content']!r}")
    Console().print(table)
    print(json.dumps({name: round(value, 4) for name, value in scores.items()}))


if __name__ == "__main__":
    main()
