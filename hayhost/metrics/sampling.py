"""What processes take of the machine, as /proc says. It blocks: call it on a thread."""

import os
from collections.abc import Iterable
from typing import Final

import msgspec

__all__ = ["Sample", "sample", "sample_all"]

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_SIZES: Final = {b"Rss:": "rss", b"Pss:": "pss", b"Private_Dirty:": "private_dirty"}


class Sample(msgspec.Struct, frozen=True, gc=False):
    """Sizes in bytes, processor time in seconds; ``None`` where the kernel does not say."""

    rss: int | None = None
    pss: int | None = None
    private_dirty: int | None = None
    cpu_seconds: float | None = None


def sample(pid: int) -> Sample:
    """Look at one process. Its memory is a walk through its pages for the kernel: about 0.1 ms for a small worker."""
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
