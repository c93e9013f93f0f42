"""What the management API says of workers."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import wait_until
from .managing import Manager, managed


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    folder = tmp_path_factory.mktemp("workers")
    folder.chmod(0o755)
    with managed(folder) as manager:
        yield manager


def _org(manager: Manager, org: str) -> str:
    manager.ok("POST", "/orgs", {"id": org})
    manager.put(org)
    return f"/plugins/recorder/{org}"


def _worker(manager: Manager, org: str, more: str = "") -> Any:
    (item,) = manager.get(f"/workers?org={org}{more}")["items"]
    return item


def test_latency_by_window(manager: Manager) -> None:
    base = _org(manager, "timed")
    for _ in range(20):
        assert manager.call("POST", f"{base}/echo", "x").status == 200
    worker = _worker(manager, "timed")
    latency = worker["latency"]
    assert set(latency) == {"p50_ms", "p99_ms", "history"}
    assert 0 < latency["p50_ms"] <= latency["p99_ms"]
    assert sum(window["requests"] for window in latency["history"]) == 20
    for window in latency["history"]:
        assert set(window) == {"at", "requests", "errors", "p50_ms", "p99_ms"}
        assert window["errors"] == 0
        assert 0 < window["p50_ms"] <= window["p99_ms"]
        assert worker["started_at"] - 11 < window["at"]
    assert worker["errors"] == 0


def test_errors_are_counted_over_restarts(manager: Manager) -> None:
    base = _org(manager, "failing")
    assert manager.call("GET", f"{base}/gated").status == 500, "it has no gate"
    assert manager.call("GET", f"{base}/nothing").status == 404
    worker = _worker(manager, "failing")
    assert worker["errors"] == 1
    assert sum(window["errors"] for window in worker["latency"]["history"]) == 1
    os.kill(worker["pid"], 9)
    wait_until(lambda: _worker(manager, "failing")["restarts"] == 1)
    wait_until(lambda: _worker(manager, "failing")["state"] == "ready")
    again = _worker(manager, "failing")
    assert again["errors"] == 1
    assert again["started_at"] > worker["started_at"]


def test_what_a_worker_takes_is_only_looked_at_if_that_is_wanted(manager: Manager) -> None:
    base = _org(manager, "large")
    assert manager.call("POST", f"{base}/echo", "x").status == 200
    worker = _worker(manager, "large")
    assert 0 < worker["private_dirty"] <= worker["pss"] <= worker["rss"]
    assert worker["cpu_seconds"] >= 0
    without = _worker(manager, "large", "&memory=false")
    assert [without[name] for name in ("rss", "pss", "private_dirty", "cpu_seconds")] == [None] * 4
    assert without["requests"] == 1


def test_an_org_without_requests_has_no_latency(manager: Manager) -> None:
    _org(manager, "quiet")
    manager.ok("POST", "/orgs/quiet/plugins/recorder/restart")
    items = manager.get("/workers?org=quiet")["items"]
    for worker in items:
        assert worker["latency"] == {"p50_ms": None, "p99_ms": None, "history": []}
    assert manager.call("POST", "/plugins/recorder/quiet/echo", "x").status == 200
    assert len(_worker(manager, "quiet")["latency"]["history"]) == 1
