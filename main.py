"""The command line, from a checkout; ``python main.py --help`` says what it can."""

import sys

from tiny_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
