"""What was answered 2xx is there after a SIGKILL, nothing is half done, and two hosts overwrite nothing silently.

A longer look: HAYHOST_TEST_KILLS=20 kills so often per database.
"""

import asyncio
import http.client
import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .conftest import wait_until
from .managing import API, Manager, managed, write_recorder
from .storing import BACKENDS, make_url, sql

KILLS = int(os.environ.get("HAYHOST_TEST_KILLS", "2"))
SEED = int(os.environ.get("HAYHOST_TEST_SEED", "20260"))
WRITES = 500
THREADS = 16
ORGS = 40


class Writes:
    """Many changes at once, each with a value of its own, and what was answered to them."""

    def __init__(self, manager: Manager, round: int) -> None:
        self.answered: dict[str, list[tuple[int, str]]] = {}
        self.sent: dict[str, set[str]] = {}
        self.made: list[str] = []
        self.done = 0
        self._manager = manager
        self._round = round
        self._lock = threading.Lock()

    def one(self, number: int) -> None:
        """One change, or a new org with its installation; what comes after the kill is nobody's business."""
        new = number % 5 == 0
        org = f"new{self._round}x{number}" if new else f"org{number % ORGS}"
        value = f"{self._round}.{number}"
        body = {"config": {"value": value, "apiKey": value}}
        with self._lock:
            self.sent.setdefault(org, set()).add(value)
        try:
            answer = self._manager.call("PUT", f"/orgs/{org}/plugins/recorder", body)
        except (OSError, http.client.HTTPException):
            return
        assert answer.status in (200, 201, 503), answer
        with self._lock:
            self.done += 1
            if answer.status != 503:
                self.answered.setdefault(org, []).append((answer.json()["revision"], value))

    def run(self) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self.one, range(WRITES)))


def _wait_for(writes: Writes, done: int) -> None:
    wait_until(lambda: writes.done >= done, "writes are under way")


def _items(manager: Manager, path: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    after: str | None = ""
    while True:
        page = manager.get(f"{path}?limit=1000&after={after}")
        found |= {item.get("org", item.get("id")): item for item in page["items"]}
        if (after := page["next"]) is None:
            return found


def _check(manager: Manager, writes: list[Writes]) -> None:
    """Every answered change is there, or a later one of those that were sent; and all of it, not a part."""
    kept = _items(manager, "/plugins/recorder/installations")
    orgs = _items(manager, "/orgs")
    audited: dict[str, set[int]] = {}
    before: str | None = ""
    while before is not None:
        page = manager.get(f"/audit?limit=1000&action=install.put{before and '&before=' + before}")
        for entry in page["items"]:
            audited.setdefault(entry["org"], set()).add(entry["details"]["revision"])
        before = page["next"]
    answered: dict[str, list[tuple[int, str]]] = {}
    sent: dict[str, set[str]] = {}
    for one in writes:
        for org, values in one.sent.items():
            sent.setdefault(org, set()).update(values)
        for org, pairs in one.answered.items():
            answered.setdefault(org, []).extend(pairs)
    for org, pairs in answered.items():
        revision, value = max(pairs)
        assert org in kept, (org, pairs)
        assert kept[org]["revision"] >= revision, org
        if kept[org]["revision"] == revision:
            assert kept[org]["config"]["value"] == value
        assert {revision for revision, _ in pairs} <= audited[org], "each has its entry in the audit log"
    for org, installation in kept.items():
        assert org in orgs
        assert installation["config"]["value"] in sent[org]
        assert installation["config"]["apiKey"] == "********"
        assert installation["revision"] in audited[org], "nothing is kept without its entry"
        # Decrypted, both halves are of one change.
        found = manager.host.get(f"/plugins/recorder/{org}/value").json() if org.startswith("org") else None
        assert found is None or found["key"] == found["value"] == installation["config"]["value"]


@pytest.mark.timeout(120 + 60 * KILLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_host_has_kept_what_it_answered(backend: str, tmp_path: Path) -> None:
    url = make_url(backend, tmp_path)
    chance = random.Random(SEED)
    write_recorder(tmp_path / "plugins")
    options = ("--store", url, "--key-file", tmp_path / "keys", "--spares", 0)
    all_writes: list[Writes] = []
    for round in range(KILLS):
        with managed(tmp_path, *options) as manager:
            writes = Writes(manager, round)
            all_writes.append(writes)
            thread = threading.Thread(target=writes.run)
            thread.start()
            _wait_for(writes, chance.randrange(1, WRITES // 2))
            manager.host.process.kill()
            thread.join()
            assert writes.answered
            assert writes.done < WRITES
        if backend == "sqlite":
            assert asyncio.run(sql(url, "PRAGMA integrity_check")) == [("ok",)]
            assert asyncio.run(sql(url, "PRAGMA foreign_key_check")) == []
        with managed(tmp_path, *options) as manager:
            _check(manager, all_writes)
            assert manager.host.stop() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_hosts_of_one_store_overwrite_nothing_silently(backend: str, tmp_path: Path) -> None:
    url = make_url(backend, tmp_path)
    write_recorder(tmp_path / "plugins")
    options = ("--store", url, "--key-file", tmp_path / "keys", "--spares", 0)
    one = "/orgs/acme/plugins/recorder"
    with managed(tmp_path, *options) as first, managed(tmp_path, *options) as second:
        tag = first.ok("PUT", one, {"config": {"extra": []}}).headers["ETag"]
        stale = second.call("GET", one).headers["ETag"]
        assert stale == tag
        first.ok("PUT", one, {"config": {"extra": [1]}}, If_Match=tag)
        for method in ("PUT", "PATCH", "DELETE"):
            refused = second.call(
                method, one, {"config": {"extra": [2]}} if method != "DELETE" else None, If_Match=stale
            )
            assert refused.status == 412, refused
        assert second.get(one)["config"] == {"extra": [1]}

        # Whoever reads, adds and writes with the ETag again and again until it is taken loses nothing.
        def add(manager: Manager, number: int) -> None:
            while True:
                answer = manager.call("GET", one)
                extra = [*answer.json()["config"]["extra"], number]
                written = manager.call("PUT", one, {"config": {"extra": extra}}, If_Match=answer.headers["ETag"])
                if written.status == 200:
                    return
                assert written.status == 412, written

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(add, [first, second] * 10, range(100, 120)))
        assert sorted(first.get(one)["config"]["extra"]) == [1, *range(100, 120)]
        # Of two who make an org with If-None-Match, one does.
        new = "/orgs/new/plugins/recorder"
        with ThreadPoolExecutor(2) as pool:
            made = list(pool.map(lambda manager: manager.call("PUT", new, {}, If_None_Match="*"), (first, second)))
        assert sorted(answer.status for answer in made) == [201, 412]


@pytest.mark.parametrize("backend", BACKENDS)
def test_workers_follow_what_another_host_changes(backend: str, tmp_path: Path) -> None:
    url = make_url(backend, tmp_path)
    write_recorder(tmp_path / "plugins")
    options = ("--store", url, "--key-file", tmp_path / "keys", "--spares", 0)
    with managed(tmp_path, *options) as first, managed(tmp_path, *options) as second:
        path = "/plugins/recorder/acme/value"
        first.put("acme", config={"value": "one"})
        wait_until(lambda: second.host.get(path).status == 200, "the other has it, too", 5)
        first.put("acme", config={"value": "two"})
        assert first.host.get(path).json()["value"] == "two"
        wait_until(lambda: second.host.get(path).json()["value"] == "two", "its worker follows", 5)
        assert second.hooks("acme").count("on_config_update") == 0, "whoever changed it has told the plugin"
        token = first.new_token("admin")
        wait_until(lambda: second.call("GET", "/orgs").status == 401, "the token closes both", 5)
        first.token = second.token = token
        second.ok("POST", "/orgs/acme/plugins/recorder/disable")
        assert second.host.get(path).status == 404
        wait_until(lambda: first.host.get(path).status == 404, "it is disabled on both", 5)
        assert (first.hooks("acme") + second.hooks("acme")).count("on_disable") == 1
        first.ok("DELETE", f"/tokens/{token.split('_')[1]}")
        wait_until(lambda: second.call("GET", "/orgs").status == 401, "the token is revoked on both", 6)
        assert json.loads(second.host.request("GET", f"{API}/orgs").body)["error"]
