"""What processes take of the machine, as /proc says. It blocks: call it on a thread."""

import os
import time
from collections.abc import Container, Iterable, Mapping
from typing import Final

import msgspec

__all__ = ["Key", "Sample", "Sampler", "sample", "sample_all"]

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_SIZES: Final = {b"Rss:": "rss", b"Pss:": "pss", b"Private_Dirty:": "private_dirty"}


_LEAST: Final = 5.0  # seconds between looks at all workers
_SHARE: Final = 20  # times as long as a look took: looking takes a twentieth of a processor at most
_LONGEST: Final = 3.0  # seconds for one look; what there was no time for is as it was

Key = tuple[str, str, int]
"""A worker: its plugin, its org (empty: none yet), and when it was made."""


class Sample(msgspec.Struct, frozen=True, gc=False):
    """Sizes in bytes, processor time in seconds; ``None`` where the kernel does not say."""

    rss: int | None = None
    pss: int | None = None
    private_dirty: int | None = None
    cpu_seconds: float | None = None


def sample(pid: int) -> Sample:
    """Look at one process. The kernel walks through all its pages for that: half a millisecond for a small worker."""
    found: dict[str, int] = {}
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines()[1:]:
        name, size, *_ = line.split()
        if name in _SIZES:
            found[_SIZES[name]] = int(size) * 1024
    fields = _read(f"/proc/{pid}/stat").rpartition(b") ")[2].split()
    spent = (int(fields[11]) + int(fields[12])) / _TICKS if fields else None
    return Sample(**found, cpu_seconds=spent)


def sample_all(pids: Iterable[int]) -> dict[int, Sample]:
    """Look at each of them."""
    return {pid: sample(pid) for pid in pids}


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(8 << 10)
    except OSError:  # it is gone, or nobody may look
        return b""


class Sampler:
    """Remembers what workers take, and looks again no more often than its looking is worth.

    Used by one thread at a time. ``spent`` is the processor time of all workers of a plugin, also of those that have
    ended, up to the last look at them.
    """

    def __init__(self) -> None:
        self.at = 0.0
        """When the last look began, by the monotonic clock."""
        self.spent: dict[str, float] = {}
        self._seen: dict[Key, Sample] = {}
        self._took = 0.0

    def look(self, workers: Mapping["Key", int]) -> Mapping["Key", Sample]:
        """What the workers with these process ids took at the last look; ``Key`` begins with the plugin's name."""
        began = time.monotonic()
        if began - self.at < max(_LEAST, self._took * _SHARE):
            return self._seen
        seen: dict[Key, Sample] = {}
        for key, pid in sorted(workers.items(), key=lambda worker: worker[0] in self._seen):
            before = self._seen.get(key)
            if time.monotonic() - began < _LONGEST or before is None:
                now = sample(pid)
                seen[key] = now if now.cpu_seconds is not None else before or now
            else:
                seen[key] = before
            spent = (seen[key].cpu_seconds or 0.0) - ((before.cpu_seconds or 0.0) if before else 0.0)
            self.spent[key[0]] = self.spent.get(key[0], 0.0) + max(0.0, spent)
        self._seen, self.at, self._took = seen, began, time.monotonic() - began
        return seen

    def forget(self, plugins: Container[str]) -> None:
        """Forget all plugins but these."""
        self.spent = {name: seconds for name, seconds in self.spent.items() if name in plugins}
