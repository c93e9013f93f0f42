"""A running host to measure."""

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hayhost.errors import HostError

__all__ = ["Host", "running"]


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

    def json(self, path: str) -> Any:
        """What ``path`` answers, as JSON. Raises ``HostError`` unless it is a 200."""
        status, body = self.get(path)
        if status != 200:
            raise HostError(f"{path} was answered {status}: {body[:500].decode(errors='replace')}")
        return json.loads(body)

    def events(self, name: str) -> list[dict[str, Any]]:
        """All log records called ``name``."""
        lines = [line for line in self.log.read_text().splitlines() if f'"event":"{name}"' in line]
        return [json.loads(line) for line in lines]

    def processes(self) -> list[int]:
        """The pids of all processes below it."""
        children: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    parent = int(Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()[1])
                    children.setdefault(parent, []).append(int(entry))
        found = [self.process.pid]
        for pid in found:
            found += children.get(pid, [])
        return found[1:]

    def descriptors(self) -> int:
        """How many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def rss(self) -> float:
        """Its resident memory, in MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


@contextlib.contextmanager
def running(plugins: Path, *options: str) -> Iterator[Host]:
    """Serve ``plugins`` in test mode until the end of the block. Raises ``HostError`` if it does not start."""
    with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        command = [sys.executable, "-m", "hayhost", "serve", str(plugins), "--mode", "test", "--port", "0"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HAYHOST_")}
        process = subprocess.Popen(
            [*command, "--log-format", "json", *options], stdout=log, stderr=log, env=environment
        )
        try:
            deadline = time.monotonic() + 60
            while '"event":"ready"' not in (text := Path(log.name).read_text()):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise HostError(f"the host did not start:\n{text}")
                time.sleep(0.02)
            found = re.search(r'"url":"http://[^"]*:(\d+)"', text)
            assert found
            yield Host(process, int(found[1]), Path(log.name))
        finally:
            process.terminate()
            process.wait(60)
