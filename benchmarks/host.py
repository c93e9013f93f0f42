"""A host to measure, its machine, and numbers made presentable."""

import contextlib
import http.client
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["Host", "machine", "percentile", "running", "summary"]

_PACKAGES = ("tornado", "msgspec", "watchdog", "dill", "multiprocess", "typeguard")


class Host:
    """A running ``hayhost serve`` on ``port``."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def get(self, path: str) -> tuple[int, bytes]:
        """GET over one kept connection: status and body."""
        self._connection.request("GET", path)
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def events(self, name: str) -> list[dict[str, Any]]:
        """All log records called ``name``."""
        lines = [line for line in self.log.read_text().splitlines() if f'"event":"{name}"' in line]
        return [json.loads(line) for line in lines]

    def processes(self) -> int:
        """How many processes are below it."""
        children: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    parent = int(Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()[1])
                    children.setdefault(parent, []).append(int(entry))
        count, front = 0, [self.process.pid]
        while front:
            below = children.get(front.pop(), [])
            count += len(below)
            front += below
        return count

    def descriptors(self) -> int:
        """How many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def rss(self) -> float:
        """Its resident memory, in MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


@contextlib.contextmanager
def running(plugins: Path, *options: str) -> Iterator[Host]:
    """Serve ``plugins`` in test mode until the end of the block."""
    with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        command = [sys.executable, "-m", "hayhost", "serve", str(plugins), "--mode", "test", "--port", "0"]
        process = subprocess.Popen([*command, "--log-format", "json", *options], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while '"event":"ready"' not in (text := Path(log.name).read_text()):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the host did not start:\n{text}")
                time.sleep(0.02)
            found = re.search(r'"url":"http://[^"]*:(\d+)"', text)
            assert found
            yield Host(process, int(found[1]), Path(log.name))
        finally:
            process.terminate()
            process.wait(60)


def machine() -> dict[str, str]:
    """What the figures are of."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": ?")
    return {
        "cpu": f"{os.cpu_count()} x {model.partition(':')[2].strip()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        **{name: version(name) for name in _PACKAGES},
    }


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(values: list[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile, and number of values."""
    return {
        "p50": round(statistics.median(values), 2),
        "p10": round(percentile(values, 0.1), 2),
        "p90": round(percentile(values, 0.9), 2),
        "n": len(values),
    }
