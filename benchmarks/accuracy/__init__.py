"""Accuracy against cost, on scenes whose contents are known: `python -m benchmarks.accuracy --help`."""
