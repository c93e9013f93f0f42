"""The last lines of each worker, and the host's own, in memory: bounded, and each worker's apart from the others'."""

import time
from collections import OrderedDict, deque
from typing import Final

from .records import Record, Wanted

__all__ = ["Rings"]

# What a record and a ring cost beside the line.
_RECORD: Final = 300
_RING: Final = 1_000
# However few workers there are, none has more than this part of the whole.
_PART: Final = 16

Key = tuple[str, str]


class _Ring:
    __slots__ = ("forgotten", "records", "size")

    def __init__(self) -> None:
        self.records: deque[Record] = deque()
        self.size = _RING
        self.forgotten = 0

    def forget_one(self) -> int:
        """Drop the oldest; its size."""
        record = self.records.popleft()
        self.forgotten = record.id
        size = _size(record)
        self.size -= size
        return size


def _size(record: Record) -> int:
    return len(record.line) + _RECORD


class Rings:
    """A ring of records for each plugin of each org, those of a plugin without an org, and the host's own.

    There are ``most`` records in one at most, and ``size`` bytes in all. A ring stays when its worker has left, until
    others need the room: then one that has more than its share gives its oldest records, else the ring that has not
    been added to for the longest goes.
    """

    def __init__(self, size: int, most: int) -> None:
        self.size = _RING
        """Bytes in all."""
        self._limit = size
        self._most = most
        self._rings: OrderedDict[Key, _Ring] = OrderedDict()
        self._forgotten = time.time_ns() // 1_000  # the last record of all the rings that went, and of hosts before

    def add(self, record: Record) -> None:
        """Keep ``record``."""
        key = (record.plugin, record.org)
        ring = self._rings.get(key)
        if ring is None:
            ring = self._rings[key] = _Ring()
            ring.forgotten = self._forgotten
            self.size += _RING
        else:
            self._rings.move_to_end(key)
        ring.records.append(record)
        size = _size(record)
        ring.size += size
        self.size += size
        while len(ring.records) > self._most or (ring.size > self._limit // _PART and len(ring.records) > 1):
            self.size -= ring.forget_one()
        while self.size > self._limit:
            if len(ring.records) > 1 and ring.size > self._limit // len(self._rings):
                self.size -= ring.forget_one()
            elif len(self._rings) > 1:
                self._drop_longest_unused()
            else:
                break  # this one alone is larger

    def _drop_longest_unused(self) -> None:
        _, ring = self._rings.popitem(last=False)
        self.size -= ring.size
        self._forgotten = max(self._forgotten, ring.records[-1].id)

    def find(self, wanted: Wanted) -> tuple[list[list[Record]], int]:
        """The rings that may have what is ``wanted``, oldest record first in each, and the id up to which such records
        may have been forgotten."""
        if wanted.plugin is not None and wanted.org is not None:
            ring = self._rings.get((wanted.plugin, wanted.org))
            rings = [ring] if ring is not None else []
        else:
            rings = [
                ring
                for (plugin, org), ring in self._rings.items()
                if wanted.plugin in (None, plugin) and wanted.org in (None, org)
            ]
        forgotten = max((ring.forgotten for ring in rings), default=0)
        return [list(ring.records) for ring in rings], max(forgotten, self._forgotten)
