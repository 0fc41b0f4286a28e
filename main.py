"""python main.py [chat|generate|serve|models] --model qwen2-1.5b; see python main.py --help."""

import sys

from tiny_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
