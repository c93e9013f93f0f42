"""Who attacks aim at, seen from the test: files and a process, and what can be seen to have happened to them."""

import contextlib
import ctypes
import json
import os
import resource
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["VictimFiles", "VictimProcess", "snapshot"]

_LIBC = ctypes.CDLL(None, use_errno=True)


def snapshot(path: Path) -> dict[str, Any]:
    """All that can be changed about a file or folder and what is below it."""
    found: dict[str, Any] = {}
    for entry in [path, *sorted(path.rglob("*"))]:
        if "__pycache__" in entry.parts:
            continue
        status = entry.lstat()
        attributes = {}
        with contextlib.suppress(OSError):
            attributes = {name: os.getxattr(entry, name) for name in os.listxattr(entry, follow_symlinks=False)}
        regular = entry.is_file() and not entry.is_symlink()
        content = entry.read_bytes() if regular else b""
        times = status.st_mtime_ns if regular else 0
        found[str(entry)] = (status.st_mode, status.st_uid, status.st_gid, status.st_size if regular else 0, times)
        found[f"{entry}:"] = (attributes, content, status.st_ctime_ns if regular else 0)
    return found


class VictimFiles:
    """A folder with a secret in every place where a file can have one."""

    def __init__(self, folder: Path) -> None:
        self.secret = secrets.token_hex(12)
        self.folder = folder
        folder.mkdir()
        folder.chmod(0o777)
        (folder / "empty").mkdir()
        self.file = folder / "file"
        self.file.write_text(self.secret)
        (folder / f"name-{self.secret}").touch()
        (folder / "link").symlink_to(f"/nowhere/{self.secret}")
        with contextlib.suppress(OSError):
            os.setxattr(self.file, "user.secret", self.secret.encode())
        self._before = snapshot(folder)

    def places(self) -> dict[str, Any]:
        """Where it is, for the attack."""
        return {"file": str(self.file), "directory": str(self.folder), "link": str(self.folder / "link")}

    def harmed(self) -> bool:
        """Whether anything about it is different now."""
        return snapshot(self.folder) != self._before


class VictimProcess:
    """A process in a session of its own that listens and counts, with a secret in its memory and environment."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        folder.chmod(0o755)
        self.secret = secrets.token_hex(12)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("victim.py")), str(folder), self.secret],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"SECRET": self.secret},
            start_new_session=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout
        self.places: dict[str, Any] = json.loads(self._output.readline())
        self._before = self._state()
        self._told = self._tell()

    def _tell(self) -> dict[str, Any]:
        self._input.write(b"\n")
        self._input.flush()
        told: dict[str, Any] = json.loads(self._output.readline())
        return told

    def _state(self) -> dict[str, Any]:
        pid = self._process.pid
        with open(f"/proc/{pid}/oom_score_adj") as file:
            score = file.read()
        return {
            "nice": os.getpriority(os.PRIO_PROCESS, pid),
            "affinity": os.sched_getaffinity(pid),
            "policy": os.sched_getscheduler(pid),
            "files": resource.prlimit(pid, resource.RLIMIT_NOFILE),
            "disk": _LIBC.syscall(252 if os.uname().machine == "x86_64" else 31, 1, pid),
            "score": score,
        }

    def harms(self) -> set[str]:
        """What has been done to it since this was last asked."""
        pid = self._process.pid
        if self._process.poll() is not None:
            return {"signal"}
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] in "Tt":
                return {"signal"}
        found = {"process"} if self._state() != self._before else set()
        before, self._told = self._told, self._tell()
        changed = {name for name, value in self._told.items() if value != before.get(name)}
        return found | {"memory" if name == "cell" else name for name in changed}

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._input.close()
        self._output.close()
