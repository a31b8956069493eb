"""Safeguards that are taken away one at a time, to see whether a test turns red: `python -m tests.mutants`."""
