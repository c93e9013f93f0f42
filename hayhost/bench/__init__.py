"""Measurements of a host as its users see it: what ``hayhost bench`` and ``benchmarks/`` run."""

__all__: list[str] = []
