"""The interactive chat in a terminal: its commands, what is typed, and where lines break."""
