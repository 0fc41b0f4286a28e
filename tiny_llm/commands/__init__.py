"""One file a command of the command line; ``cli.py`` imports it when it is called."""
