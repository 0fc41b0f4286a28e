"""Modules that take named arrays, strictly, and compose ops. No cache, no checkpoint format."""
