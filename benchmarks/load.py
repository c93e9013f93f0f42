"""Clients of a host, in a process of their own: ``python -m benchmarks.load PORT CONNECTIONS ORGS``.

Each asks for ``/version`` again and again until a line comes on standard input, then a report is printed as JSON.
"""

import json
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection, HTTPException
from typing import Any, Self

from hayhost.bench.figures import percentile

__all__ = ["Load"]


class Load:
    """Runs the clients for the length of a ``with`` block; ``report`` is what they saw."""

    def __init__(self, port: int, connections: int, orgs: int) -> None:
        self._command = [sys.executable, "-m", "benchmarks.load", str(port), str(connections), str(orgs)]
        self.report: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        self._process.stdout.readline()  # they are at work
        return self

    def __exit__(self, *_: object) -> None:
        output, _errors = self._process.communicate("\n", timeout=120)
        self.report = json.loads(output)


class _Clients:
    def __init__(self, port: int, orgs: int) -> None:
        self.port = port
        self.failed: list[str] = []
        self.stale = 0
        self.times: list[float] = []
        self.newest = [0] * orgs
        self.stop = threading.Event()

    def run(self, org: int) -> None:
        """Ask until told to stop; an answer older than what the org had given before it was asked for is stale."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        while not self.stop.is_set():
            floor, begun = self.newest[org], time.perf_counter()
            try:
                connection.request("GET", f"/plugins/p/org{org}/version")
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, HTTPException) as error:
                self.failed.append(repr(error))
                connection.close()
                continue
            self.times.append((time.perf_counter() - begun) * 1000)
            if answer.status != 200:
                self.failed.append(f"{answer.status} {body[:100]!r}")
            elif int(body) < floor:
                self.stale += 1
            else:
                self.newest[org] = max(self.newest[org], int(body))


def main() -> None:
    """Be the clients."""
    port, connections, orgs = (int(argument) for argument in sys.argv[1:4])
    clients = _Clients(port, orgs)
    threads = [threading.Thread(target=clients.run, args=(number % orgs,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    print("running", flush=True)
    sys.stdin.readline()
    clients.stop.set()
    for thread in threads:
        thread.join()
    report = {
        "requests": len(clients.times),
        "failed": len(clients.failed),
        "failures": clients.failed[:5],
        "stale": clients.stale,
        "p50 ms": round(percentile(clients.times, 0.5), 2),
        "p99 ms": round(percentile(clients.times, 0.99), 2),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
