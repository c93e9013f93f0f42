"""Imports dill such that it works on a machine without room for temporary files. Import this before it.

When dill is imported it asks where they would be, for a default that is not used here. ``tempfile`` writes one to find
out, and where none can be written nothing would start, not even to say so.
"""

import tempfile

_before, tempfile.tempdir = tempfile.tempdir, tempfile.tempdir or "/"
import dill  # noqa: E402, F401

tempfile.tempdir = _before

__all__: list[str] = []
