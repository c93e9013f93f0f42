"""What is counted where it happens, by plugin: plain numbers, which become metrics when somebody asks for them.

All that a plugin can vary is bounded: routes are those that it has declared, tools are the first few that were called.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from hayhost.errors import StoreUnavailableError

from .histogram import BOUNDS, Histogram

__all__ = ["LEFT", "OTHER", "Counts", "LogCounts", "PluginCounts", "RouteCounts", "StoreCounts"]

OTHER: Final = "other"
"""The label of whatever has none of its own."""
LEFT: Final = 499
"""The status that requests count with whose client did not wait for the answer."""

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PHASES: Final = frozenset({"forked", "confined", "identity", "on_start"})
_TOOLS: Final = 100
_LONGEST: Final = 3600.0  # seconds; a worker may say what it likes

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class RouteCounts:
    """The requests of one route: answers by status, and how long they took to begin."""

    __slots__ = ("codes", "of", "took")

    def __init__(self, of: "Counts") -> None:
        self.of = of
        """All of the same plugin, or of the host's own paths."""
        self.codes: dict[int, int] = {}
        self.took = Histogram()

    def add(self, status: int, seconds: float) -> None:
        """Count a request that is answered after ``seconds``."""
        codes, took = self.codes, self.took
        if status in codes:
            codes[status] += 1
        else:
            codes[status] = 1
        took.counts[bisect_left(BOUNDS, seconds)] += 1  # and no call: every request comes by
        took.sum += seconds


class Counts:
    """Requests by route; and those that the host refused, or broke off, because nothing could answer them."""

    def __init__(self) -> None:
        self.routes: dict[tuple[str, str], RouteCounts] = {}
        """The plugin's routes by method and path, as declared."""
        self.own: dict[tuple[str, str], RouteCounts] = {}
        """The host's own paths, by method."""
        self.other = RouteCounts(self)
        """Of requests that no route was found for."""
        self.refused: Counter[tuple[int, str]] = Counter()
        """By status and reason."""
        self.broken_off = 0

    def route(self, method: str, path: str) -> RouteCounts:
        """Those of a route that the plugin has declared."""
        found = self.routes.get((method, path))
        if found is None:
            found = self.routes[method, path] = RouteCounts(self)
        return found

    def host(self, method: str, path: str) -> RouteCounts:
        """Those of a path, or a template of paths, that the host answers itself."""
        return _of(self.own, (method if method in _METHODS else OTHER, path), lambda: RouteCounts(self))

    def keep(self, routes: Iterable[tuple[str, str]]) -> None:
        """Forget routes that are not declared any more."""
        kept = set(routes)
        self.routes = {key: counts for key, counts in self.routes.items() if key in kept}


class LogCounts:
    """Records of a plugin's log."""

    __slots__ = ("by_level", "dropped")

    def __init__(self) -> None:
        self.by_level: Counter[str] = Counter()
        self.dropped = 0


class StoreCounts:
    """Transactions of a store, with all that is done and waited for in them."""

    def __init__(self) -> None:
        self.reads = Histogram()
        self.writes = Histogram()
        self.failed = 0
        """Those in which the database could not be reached, read or written."""

    @contextmanager
    def counting(self, histogram: Histogram) -> Iterator[None]:
        """Count what is done within it."""
        began = time.monotonic()
        try:
            yield
        except StoreUnavailableError:
            self.failed += 1
            raise
        finally:
            histogram.add(time.monotonic() - began)


class PluginCounts(Counts):
    """All that is counted of a plugin."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: dict[str, Histogram] = {}
        """Starts of workers that became ready: by phase, and ``all`` from the demand to the end."""
        self.failed_starts = 0
        self.restarts = 0
        self.breakers_opened = 0
        self.stopped: Counter[str] = Counter()
        """Workers that were stopped for want of requests (``idle``) or of room (``evicted``)."""
        self.hooks: dict[str, Histogram] = {}
        self.failed_hooks: Counter[str] = Counter()
        self.waits = Histogram()
        """Of requests that had to wait for a worker, until they got it."""
        self.loads: dict[tuple[str, str], Histogram] = {}
        """By action and outcome."""
        self.tools: dict[tuple[str, str], Histogram] = {}
        """Calls through the MCP endpoints, by tool and outcome."""
        self.log = LogCounts()
        self._known_tools: set[str] = set()

    def started(self, phases: dict[str, float], seconds: float) -> None:
        """A worker became ready after ``seconds``. ``phases`` is what it says of that itself."""
        for phase, took in phases.items():
            if phase in _PHASES:
                _of(self.starts, phase, Histogram).add(min(max(took, 0.0), seconds))
        _of(self.starts, "all", Histogram).add(seconds)

    def hook(self, name: str, seconds: float, failed: bool) -> None:
        """A lifecycle hook is over. ``seconds`` is what its worker says."""
        _of(self.hooks, name, Histogram).add(min(max(seconds, 0.0), _LONGEST))
        self.failed_hooks[name] += failed

    def load(self, action: str, outcome: str, seconds: float) -> None:
        """A load, reload, restart or rollback is over."""
        _of(self.loads, (action, outcome), Histogram).add(seconds)

    def tool(self, name: str, outcome: str, seconds: float) -> None:
        """A call of a tool is over. ``name`` is empty if there is no such tool."""
        if name not in self._known_tools:
            if name and len(self._known_tools) < _TOOLS:
                self._known_tools.add(name)
            else:
                name = OTHER
        _of(self.tools, (name, outcome), Histogram).add(seconds)


def _of(kept: dict[K, V], key: K, make: Callable[[], V]) -> V:
    if (value := kept.get(key)) is None:
        value = kept[key] = make()
    return value
