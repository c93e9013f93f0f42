"""Measurements of the host; each module is a command of its own: ``python -m benchmarks.reload --help``."""
