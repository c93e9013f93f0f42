"""How a host's start, an org's first request and a page of a list depend on how many orgs are installed, on SQLite."""

import asyncio
import http.client
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from hayhost.bench.figures import machine
from hayhost.bench.host import Host, running

from .store import fill

__all__ = ["KEY", "main", "measure"]

KEY: Final = (b"k" * 32).hex()
"""What decrypts the stores of ``fill``, as in a key file or ``HAYHOST_SECRET_KEY``."""

_PLUGINS: Final = Path(__file__).parent.parent / "plugins"
_ROUNDS: Final = 7
_FIRST: Final = 20  # orgs, each asked for the first time
_PAGES: Final = 20


def _timed(host: Host, path: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", host.port, timeout=60)
    begin = time.perf_counter()
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    took = (time.perf_counter() - begin) * 1_000
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"{path}: {response.status}")
    return took


def measure(store: Path, orgs: list[str], chance: random.Random) -> dict[str, float]:
    """Milliseconds of one start, of first requests to some of ``orgs``, and of pages at both ends."""
    key = store.with_suffix(".key")
    key.write_text(KEY)
    key.chmod(0o600)
    begin = time.perf_counter()
    with running(
        _PLUGINS, "--mode", "production", "--store", str(store), "--key-file", str(key), "--spares", "0"
    ) as host:
        times = {"start": (time.perf_counter() - begin) * 1_000}
        chosen = chance.sample(orgs, _FIRST + 1)
        _timed(host, f"/plugins/echo/{chosen.pop()}/hello/you")  # the very first also opens a connection and more
        times["first request"] = statistics.median(_timed(host, f"/plugins/echo/{org}/hello/you") for org in chosen)
        ordered = sorted(orgs)
        for name, path, after in (
            ("first page of orgs", "/api/v1/orgs", ""),
            ("last page of orgs", "/api/v1/orgs", ordered[-11]),
            ("first page of installations", "/api/v1/plugins/echo/installations", ""),
            ("last page of installations", "/api/v1/plugins/echo/installations", ordered[-11]),
        ):
            pages = [_timed(host, f"{path}?limit=10&after={after}") for _ in range(_PAGES)]
            times[name] = statistics.median(pages)
    return times


def main(counts: tuple[int, ...] = (50, 100_000)) -> None:
    """Print medians of several starts, by number of orgs, and their ratio to the first."""
    chance = random.Random(1)
    orgs = {count: [f"org{number}" for number in range(count)] for count in counts}
    rounds: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            asyncio.run(fill(str(Path(folder) / str(count)), ["echo"], orgs[count]))
        for _ in range(_ROUNDS):  # by turns, so that a busy machine is as busy for all
            for count in counts:
                rounds[count].append(measure(Path(folder) / str(count), orgs[count], chance))
    results: dict[int, dict[str, float]] = {
        count: {name: round(statistics.median(one[name] for one in measured), 2) for name in measured[0]}
        for count, measured in rounds.items()
    }
    first, last = results[counts[0]], results[counts[-1]]
    whole: dict[str, Any] = {"machine": machine(), "rounds": _ROUNDS, "milliseconds, by orgs": results}
    whole["ratio"] = {name: round(last[name] / first[name], 2) for name in first}
    json.dump(whole, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
