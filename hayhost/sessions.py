"""What programs that a worker has started leave behind: they cannot leave its session, and are found by that."""

import os
import signal
import time
from typing import Final

__all__ = ["began", "end_session"]

_TRIES: Final = 50
_PAUSE: Final = 0.02  # seconds; who was killed may take a moment to be gone, or has forked just before


def end_session(session: int, began: int) -> None:
    """Kill what is left of the session that the process ``session``, started at ``began``, led. Not for the event loop.

    A plugin's programs cannot leave their worker's session, and may be in process groups of their own.
    """
    for _ in range(_TRIES):
        left = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            fields = _stat(pid)
            if not fields or int(fields[3]) != session or fields[0] == b"Z":
                continue
            if pid == session and int(fields[19]) != began:
                return  # another process has the number now, and is nobody's business here
            if pid != session:
                left.append(pid)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue  # gone meanwhile, or of a user that the nursery alone can end
        if not left:
            return
        time.sleep(_PAUSE)


def began(pid: int) -> int:
    """When the process ``pid`` started, in clock ticks since the machine did; 0 if there is none."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/<pid>/stat after the name of the program (proc(5)); none if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []
