"""Planted ranks: does the budget find the layers that need it? ``python -m benchmarks.planted``."""
