"""What every experiment's command line has: its docstring as help, and --svg to draw its picture."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """A parser with that one option, for an experiment whose docstring is ``about``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, help="draw the page's picture into this file")
    return parser
