"""Runnable studies: ``python -m benchmarks.<name>``."""
