"""Memory made ready to be shared with forks, so that these write to as few of its pages as can be.

The garbage collector never touches what is frozen. What remains are two habits of CPython that spread a fork's writes
over all that its parent ever imported:

- A new object goes where one of its size was freed last. After the imports such holes are everywhere, and each one that
  a fork fills is a page that it shares no longer. With the holes filled by nothing of use, its objects are together.
- The cache of attributes of types keeps a reference to each name that was looked up last. A fork that looks others up
  gives those back, one page for nearly each. Emptied before, there is nothing to give back.
"""

import gc
import sys
from typing import Any, Final

__all__ = ["pack"]

# From CPython's Objects/obmalloc.c: objects of up to 512 bytes, in classes of 16, are in pools of 16 KiB that begin
# with a header. Should a version have it otherwise, a bound is reached and nothing is kept.
_CLASS: Final = 16
_LARGEST: Final = 512
_POOL: Final = 16 << 10
_HEADER: Final = 48
_MOST: Final = 4 << 20
"""Bytes of each class that are filled at most."""
_IN_A_ROW: Final = 4
_NUMBERS: Final = 32
"""The class of what is counted with here, which takes and gives back places all the while."""
_EMPTY: Final = sys.getsizeof(b"")

_filled: list[list[Any]] = []


def pack() -> None:
    """Do all that, once everything is imported and before the first fork."""
    clear: Any = getattr(sys, "_clear_internal_caches", None) or sys._clear_type_cache  # the first from 3.13 on
    clear()
    gc.collect()
    for size in range(_CLASS, _LARGEST + 1, _CLASS):
        if size != _NUMBERS:
            _filled.append(_fill(size))
    gc.freeze()


def _fill(size: int) -> list[Any]:
    """What fills the holes of a size."""
    made: list[Any] = []
    fresh = 0
    for _ in range(_MOST // size):
        made.append(object() if size == _CLASS else bytes(size - _EMPTY))
        offset = id(made[-1]) % _POOL
        fresh = fresh + 1 if offset == _HEADER + fresh * size else int(offset == _HEADER)
        if fresh == _IN_A_ROW:  # the first ones of a pool, one after the other: there was no hole left
            return made[:-fresh]
    return []
