"""Chapter 4.7: the ledger's claims as quotients, read from its page. Prints a table; --svg draws.

python book/experiments/ledger.py [--svg book/docs/img/ledger.svg]
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from command_line import parser_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "week4" / "ledger.md"
HEADER = "| claim | ours | theirs | who | machine | stands in | command |"


class Claim(NamedTuple):
    """A line of the ledger, as it is written."""

    what: str
    ours: str
    theirs: str
    who: str
    machine: str
    stands_in: str
    command: str

    def quotient(self) -> tuple[float, str]:
        """Ours over theirs by the end that speaks against the claim, and which claim that is."""
        ours, theirs = sorted(numbers(self.ours)), sorted(numbers(self.theirs))
        if (least := ours[0] / theirs[-1]) > 1:
            return least, "won"
        most = ours[-1] / theirs[0]
        return (most, "lost") if most < 1 else (1.0, "neither")


def numbers(text: str) -> list[float]:
    """The figures in a cell: one, or both ends of a range."""
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", text)]


def rows(page: str, header: str) -> list[list[str]]:
    """The cells of each row below a table's header."""
    lines = page.partition(header + "\n")[2].splitlines()[1:]
    end = next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]


def claims(page: str) -> list[Claim]:
    """The table of those with somebody on the other side."""
    return [Claim(*row) for row in rows(page, HEADER)]


def table(ledger: Sequence[Claim]) -> str:
    """Each line's quotient, the highest first."""
    lines = [f"{'claim':<36}{'machine':<9}{'against':<14}{'times theirs':>12}"]
    for claim in sorted(ledger, key=Claim.quotient, reverse=True):
        quotient, side = claim.quotient()
        told = f"{quotient:.2f}" if side != "neither" else "about 1"
        lines.append(f"{claim.what:<36}{claim.machine:<9}{claim.who:<14}{told:>12}   {side}")
    return "\n".join(lines)


def picture(ledger: Sequence[Claim]) -> str:
    """The quotients as bars from 1, to the right where ours is larger; a line for each doubling."""
    middle, width, parts = 492, 165, list[str]()
    for number, claim in enumerate(sorted(ledger, key=Claim.quotient, reverse=True)):
        quotient, side = claim.quotient()
        y, reach = 34 + 22 * number, width * math.log2(quotient)
        left = min(middle, middle + reach)
        name = f"{claim.what}, {claim.machine}, {claim.who}"
        parts.append(f'<text x="16" y="{y + 12}">{name}</text>')
        parts.append(
            f'<rect class="{side}" x="{left:.1f}" y="{y}" width="{max(abs(reach), 2):.1f}" height="15"/>'
        )
    bottom = 34 + 22 * len(ledger)
    for doublings in (0, 1):
        x = middle + width * doublings
        parts.append(f'<path d="M{x} 28V{bottom}"/><text class="mid" x="{x}" y="20">{2**doublings} x</text>')
    style = "svg{background:#fff}text{font:11px monospace;fill:#333}.mid{text-anchor:middle}path{stroke:#999}"
    style += ".won{fill:#a9c8e6}.lost{fill:#e6862b}.neither{fill:#aaa}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {bottom + 10}">'
    return "\n".join([f"{head}<style>{style}</style>", *parts, "</svg>\n"])


def main() -> None:
    """Print the table, and draw."""
    arguments = parser_of(__doc__).parse_args()
    ledger = claims(PAGE.read_text(encoding="utf-8"))
    print(table(ledger))
    if arguments.svg:
        arguments.svg.write_text(picture(ledger), encoding="utf-8")


if __name__ == "__main__":
    main()
