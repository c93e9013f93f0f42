"""A multi-tenant plugin host: one HTTP front, one sandboxed worker process per (plugin, org)."""

__all__ = ["__version__"]

__version__ = "0.1.0"
