"""The commands chat, generate, embed, serve, agent, follow, bench, models, course, memory, simulate, doctor.

``python main.py --help`` says what they do; without a command's name it is chat.
"""

import sys

from tiny_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
