"""Calculators: what a model takes, before it is loaded."""
