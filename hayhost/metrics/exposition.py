"""From counts to what Prometheus reads. On a thread: nothing here touches the loop.

Label sets are bounded: of a family with more than ``MOST`` of them, the rest is told together, as ``other``.
"""

import time
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, Final

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from hayhost import __version__
from hayhost.egress import Counters
from hayhost.metadata import OAuth2
from hayhost.states import WorkerState

from .counts import OTHER, Counts, PluginCounts
from .endpoint import Sources
from .histogram import BOUNDS, Histogram
from .sampling import Key, Sample, Sampler

__all__ = ["MOST", "Exposition"]

MOST: Final = 2_000
"""Label sets of one family."""
_MOST_ORGS: Final = 10_000  # of those by org, whose series are few and short

_SHOWN: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0),
)
_PLACES: Final = [(str(bound), BOUNDS.index(bound)) for bound in _SHOWN]

_NOTHING: Final = Counters()

Labels = tuple[str, ...]


class _Numbers:
    """A family of counters or gauges."""

    def __init__(self, kind: type[Metric], name: str, help: str, labels: Labels = (), most: int = MOST) -> None:
        self._metric = kind(f"hayhost_{name}", help, labels=labels)  # type: ignore[call-arg]
        self._width = len(labels)
        self._most = most
        self._values: dict[Labels, float] = {}

    def add(self, value: float, *labels: str) -> None:
        """Add to what there is with these labels."""
        if labels not in self._values and len(self._values) >= self._most:
            labels = (OTHER,) * self._width
        self._values[labels] = self._values.get(labels, 0) + value

    def metric(self) -> Metric:
        add: Any = self._metric.add_metric  # type: ignore[attr-defined]
        for labels, value in self._values.items():
            add(labels, value)
        return self._metric


class _Durations:
    """A family of histograms."""

    def __init__(self, name: str, help: str, labels: Labels = ()) -> None:
        self._metric = HistogramMetricFamily(f"hayhost_{name}_seconds", help, labels=labels)
        self._width = len(labels)
        self._values: dict[Labels, Histogram] = {}

    def add(self, histogram: Histogram, *labels: str) -> None:
        """Add to what there is with these labels."""
        if labels not in self._values and len(self._values) >= MOST:
            labels = (OTHER,) * self._width
        self._values.setdefault(labels, Histogram()).merge(histogram)

    def metric(self) -> Metric:
        for labels, histogram in self._values.items():
            upto = list(accumulate(histogram.counts))
            buckets = [(bound, upto[place]) for bound, place in _PLACES]
            self._metric.add_metric(labels, [*buckets, ("+Inf", upto[-1])], histogram.sum)
        return self._metric


class _Families:
    """All metrics of one scrape, by what they are called here."""

    def __init__(self) -> None:
        self._all: list[_Numbers | _Durations] = []

    def counter(self, name: str, help: str, *labels: str, most: int = MOST) -> _Numbers:
        return self._kept(_Numbers(CounterMetricFamily, name, help, labels, most))

    def gauge(self, name: str, help: str, *labels: str, most: int = MOST) -> _Numbers:
        return self._kept(_Numbers(GaugeMetricFamily, name, help, labels, most))

    def durations(self, name: str, help: str, *labels: str) -> _Durations:
        self._all.append(family := _Durations(name, help, labels))
        return family

    def _kept(self, family: _Numbers) -> _Numbers:
        self._all.append(family)
        return family

    def metrics(self) -> Iterator[Metric]:
        for family in self._all:
            yield family.metric()


class Exposition(Collector):
    """Writes metrics down."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        for collector in (ProcessCollector, PlatformCollector):
            collector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._sampler = Sampler()
        self._sources: Sources | None = None
        self._registry.register(self)

    def expose(self, sources: Sources, accepted: str) -> tuple[bytes, str]:
        """All metrics, and their media type: the text format or OpenMetrics, as is ``accepted``."""
        self._sources = sources
        try:
            encode, media = choose_encoder(accepted)
        except (ValueError, TypeError):  # a version that is none
            encode, media = choose_encoder("")
        return encode(self._registry), media

    def collect(self) -> Iterator[Metric]:
        if self._sources is None:  # the registry wants to know the names
            return
        sources, families = self._sources, _Families()
        plugins = {name: plugin.counts for name, plugin in list(sources.plugins.items())}
        info = families.gauge("info", "The host.", "version", "isolation")
        info.add(1, __version__, sources.pool.isolation.level.label)
        _requests(families, {"": sources.front.counts, **plugins})
        _host(families, sources)
        _plugins(families, sources)
        _starts(families, plugins)
        _hooks_and_loads(families, plugins)
        _egress(families, sources)
        _logs(families, plugins)
        self._workers(families, sources)
        yield from families.metrics()

    def _workers(self, families: _Families, sources: Sources) -> None:
        pool = sources.pool
        states = families.gauge("workers", "Orgs' plugins by the state of their worker.", "plugin", "state")
        spares = families.gauge("spare_workers", "Workers without an org that wait ready.", "plugin")
        open_ = families.gauge("breakers_open", "Orgs' plugins that are refused because they do not start.", "plugin")
        queued = families.gauge("queued_requests", "Requests that wait for a worker.", "plugin")
        in_flight = families.gauge("requests_in_flight", "Requests that workers have.", "plugin")
        slots = list(pool.slots.values())
        for name in list(sources.plugins):
            for state in (WorkerState.STARTING, WorkerState.READY, WorkerState.DEGRADED, WorkerState.ERROR):
                states.add(0, name, state.label)
            for family in (spares, open_, queued, in_flight):
                family.add(0, name)
        for slot in slots:
            name = slot.plugin.name
            states.add(1, name, slot.state.label)
            open_.add(slot.breaker.is_open, name)
            queued.add(len(slot.queue), name)
            in_flight.add(len(slot.worker.streams) if slot.worker is not None else 0, name)
        keys: dict[Key, int] = {}
        for worker, serves in list(pool.workers.items()):
            name = worker.version.manifest.name
            if worker.lifecycle.state is WorkerState.DRAINING:
                states.add(1, name, WorkerState.DRAINING.label)
            elif serves is None and worker.installation is None:
                spares.add(1, name)
            if worker.pid:
                org = worker.installation.org_id if worker.installation is not None else ""
                keys[name, org, worker.asked] = worker.pid
        families.gauge("max_workers", "Workers at most.").add(pool.settings.max_workers)
        samples = self._sampler.look(keys)
        self._sampler.forget(sources.plugins)
        self._taken(families, samples, sources)
        if pool.settings.metrics_orgs:
            _orgs(families, sources, samples)

    def _taken(self, families: _Families, samples: Mapping[Key, Sample], sources: Sources) -> None:
        """What plugins take of the machine."""
        pss = families.gauge(
            "plugin_pss_bytes", "Memory of a plugin's workers, with their share of what they share.", "plugin"
        )
        dirty = families.gauge("plugin_private_dirty_bytes", "Memory that only one worker has.", "plugin")
        spent = families.counter("plugin_cpu_seconds", "Processor time of a plugin's workers.", "plugin")
        for name in list(sources.plugins):
            pss.add(0, name)
            dirty.add(0, name)
            spent.add(self._sampler.spent.get(name, 0.0), name)
        for (name, _, _), sample in samples.items():
            if name in sources.plugins:
                pss.add(sample.pss or 0, name)
                dirty.add(sample.private_dirty or 0, name)
        age = families.gauge("sample_age_seconds", "How long ago it was looked at what workers take.")
        age.add(max(0.0, time.monotonic() - self._sampler.at))


def _requests(families: _Families, counted: Mapping[str, Counts]) -> None:
    total = families.counter("requests", "Requests by the status of their answer.", "plugin", "route", "method", "code")
    took = families.durations("request_duration", "Time until an answer began.", "plugin", "route", "method")
    refused = families.counter(
        "refused_requests", "Requests that the host refused for want of a worker's answer.", "plugin", "code", "reason"
    )
    broken = families.counter("broken_off_answers", "Answers that ended before their end.", "plugin")
    for plugin, counts in counted.items():
        routes = [*list(counts.routes.items()), *list(counts.own.items()), ((OTHER, OTHER), counts.other)]
        for (method, route), of in routes:
            for code, count in list(of.codes.items()):
                total.add(count, plugin, route, method, str(code))
            if of.codes:
                took.add(of.took, plugin, route, method)
        for (code, reason), count in list(counts.refused.items()):
            refused.add(count, plugin, str(code), reason)
        broken.add(counts.broken_off, plugin)


def _host(families: _Families, sources: Sources) -> None:
    front, store = sources.front, sources.store
    connections = families.gauge("connections", "Open connections to the host.", "state")
    connections.add(front.idle_connections, "idle")
    connections.add(len(front.open), "active")
    families.durations("event_loop_lag", "How late timers of the host are.").add(front.loop_lag)
    families.gauge("event_listeners", "Clients that listen to events.").add(sources.events.listeners)
    if store is not None:
        took = families.durations("store", "Transactions of the store.", "operation")
        took.add(store.reads, "read")
        took.add(store.writes, "write")
        families.counter("store_errors", "Transactions for which the store could not be used.").add(store.failed)
    refreshes = families.counter("oauth_refreshes", "Refreshes of OAuth2 tokens.", "plugin", "outcome")
    for plugin, served in list(sources.plugins.items()):
        methods = served.current.metadata.auth_methods if served.current is not None else ()
        if any(isinstance(method, OAuth2) for method in methods):
            for outcome in ("ok", "failed", "revoked"):
                refreshes.add(sources.refreshes.get((plugin, outcome), 0), plugin, outcome)


def _plugins(families: _Families, sources: Sources) -> None:
    up = families.gauge("plugin_up", "Whether the plugin is served.", "plugin")
    failing = families.gauge("plugin_load_failing", "Whether the plugin's files do not load.", "plugin")
    for name, plugin in list(sources.plugins.items()):
        up.add(plugin.current is not None, name)
        failing.add(bool(plugin.error), name)


def _starts(families: _Families, plugins: Mapping[str, PluginCounts]) -> None:
    took = families.durations("worker_start", "Starts of workers, by phase and all in all.", "plugin", "phase")
    failed = families.counter("worker_failed_starts", "Workers that never became ready.", "plugin")
    restarts = families.counter("worker_restarts", "Workers that died while they served.", "plugin")
    stops = families.counter("worker_stops", "Workers stopped for want of requests or room.", "plugin", "reason")
    opened = families.counter("breaker_openings", "How often a breaker opened.", "plugin")
    waits = families.durations("queue_wait", "Waits of requests that no worker could take at once.", "plugin")
    for plugin, counts in plugins.items():
        _each(took, plugin, counts.starts)
        failed.add(counts.failed_starts, plugin)
        restarts.add(counts.restarts, plugin)
        for reason in ("idle", "evicted"):
            stops.add(counts.stopped[reason], plugin, reason)
        opened.add(counts.breakers_opened, plugin)
        waits.add(counts.waits, plugin)


def _hooks_and_loads(families: _Families, plugins: Mapping[str, PluginCounts]) -> None:
    hooks = families.durations("hook", "Lifecycle hooks.", "plugin", "hook")
    failed = families.counter("hook_failures", "Lifecycle hooks that raised or ran out of time.", "plugin", "hook")
    loads = families.durations("plugin_load", "Loads of plugins.", "plugin", "action", "outcome")
    tools = families.durations("mcp_tool_call", "Calls of tools.", "plugin", "tool", "outcome")
    for plugin, counts in plugins.items():
        _each(hooks, plugin, counts.hooks)
        for hook, count in list(counts.failed_hooks.items()):
            failed.add(count, plugin, hook)
        for (action, outcome), took in list(counts.loads.items()):
            loads.add(took, plugin, action, outcome)
        for (tool, outcome), took in list(counts.tools.items()):
            tools.add(took, plugin, tool, outcome)


def _each(family: _Durations, plugin: str, histograms: Mapping[str, Histogram]) -> None:
    for name, histogram in list(histograms.items()):
        family.add(histogram, plugin, name)


def _egress(families: _Families, sources: Sources) -> None:
    dials = families.counter("egress_connections", "Connections that plugins asked for.", "plugin", "outcome")
    sizes = families.counter("egress_bytes", "Bytes over closed connections, as workers say.", "plugin", "direction")
    known = sources.pool.isolation.egress.totals
    for plugin, served in list(sources.plugins.items()):
        if not served.manifest.permissions.network:
            continue
        totals = known.get(plugin, _NOTHING)
        dials.add(totals.connected, plugin, "connected")
        dials.add(totals.refused, plugin, "refused")
        dials.add(totals.failed, plugin, "failed")
        sizes.add(totals.sent, plugin, "sent")
        sizes.add(totals.received, plugin, "received")


def _logs(families: _Families, plugins: Mapping[str, PluginCounts]) -> None:
    records = families.counter("log_records", "Records of plugins' logs.", "plugin", "level")
    dropped = families.counter("log_dropped_records", "Records of plugins' logs over their rate.", "plugin")
    for plugin, counts in plugins.items():
        for level, count in list(counts.log.by_level.items()):
            records.add(count, plugin, level)
        dropped.add(counts.log.dropped, plugin)


def _orgs(families: _Families, sources: Sources, samples: Mapping[Key, Sample]) -> None:
    labels = ("plugin", "org")
    requests = families.counter("org_requests", "Requests of an org.", *labels, most=_MOST_ORGS)
    errors = families.counter("org_errors", "Requests of an org that were answered 5xx.", *labels, most=_MOST_ORGS)
    restarts = families.counter("org_restarts", "Workers of an org that died.", *labels, most=_MOST_ORGS)
    pss = families.gauge("org_pss_bytes", "Memory of an org's worker.", *labels, most=_MOST_ORGS)
    for slot in list(sources.pool.slots.values()):
        one = slot.plugin.name, slot.org_id
        requests.add(slot.requests, *one)
        errors.add(slot.errors, *one)
        restarts.add(slot.restarts, *one)
    for (plugin, org, _), sample in samples.items():
        if org and plugin in sources.plugins:
            pss.add(sample.pss or 0, plugin, org)
