"""Which tiny_llm this is."""

__version__ = "0.1.0"  # as pyproject.toml has it; a checkout need not be installed
