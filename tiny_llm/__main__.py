"""``python -m tiny_llm``: the command line, wherever the package lies."""

import sys

from tiny_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
