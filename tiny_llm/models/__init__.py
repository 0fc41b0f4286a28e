"""Whole models, and the registry that builds one from a folder."""
