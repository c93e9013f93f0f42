"""Very many installed orgs: each is found, lists are whole, and what is asked of the database follows an index."""

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.orgs import KEY
from benchmarks.store import fill

from .managing import Manager, managed

COUNT = 5_000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("many") / "store.db"
    asyncio.run(fill(str(file), ["recorder"], [f"org{number:05}" for number in range(COUNT)]))
    return file


@pytest.fixture(scope="module")
def manager(store: Path) -> Iterator[Manager]:
    with managed(store.parent, "--store", store, "--spares", 0, env={"HAYHOST_SECRET_KEY": KEY}) as manager:
        yield manager


@pytest.mark.parametrize("path", ["/orgs", "/plugins/recorder/installations"])
@pytest.mark.parametrize("limit", [100, 999])
def test_pages_have_everything_once(manager: Manager, path: str, limit: int) -> None:
    seen: list[str] = []
    after: str | None = ""
    while after is not None:
        page = manager.get(f"{path}?limit={limit}&after={after}")
        assert len(page["items"]) == limit or page["next"] is None
        seen += [item.get("org", item.get("id")) for item in page["items"]]
        after = page["next"]
    assert seen == [f"org{number:05}" for number in range(COUNT)]


@pytest.mark.parametrize("org", ["org00000", f"org{COUNT // 2:05}", f"org{COUNT - 1:05}"])
def test_any_of_them_is_served(manager: Manager, org: str) -> None:
    assert manager.host.get(f"/plugins/recorder/{org}/value").status == 200
    assert manager.get(f"/orgs/{org}/plugins/recorder")["org"] == org


def test_no_worker_is_started_for_those_whom_nobody_asks_for(manager: Manager) -> None:
    assert len(manager.get("/workers")["items"]) <= 3


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM orgs WHERE id > 'x' ORDER BY id LIMIT 101",
        "SELECT * FROM installations WHERE plugin = 'p' AND org > 'x' ORDER BY org LIMIT 101",
        "SELECT * FROM installations WHERE org = 'o' AND plugin > 'x' ORDER BY plugin LIMIT 101",
        "SELECT * FROM tokens WHERE id > 'x' ORDER BY id LIMIT 101",
        "SELECT * FROM tokens WHERE org = 'o' AND id > 'x' ORDER BY id LIMIT 101",
        "SELECT * FROM audit WHERE org = 'o' AND id < 9 ORDER BY id DESC LIMIT 101",
        "SELECT * FROM audit WHERE plugin = 'p' AND id < 9 ORDER BY id DESC LIMIT 101",
        "SELECT * FROM audit WHERE id < 9 ORDER BY id DESC LIMIT 101",
    ],
)
def test_pages_are_found_by_an_index(store: Path, query: str) -> None:
    connection = sqlite3.connect(store)
    try:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}")]
    finally:
        connection.close()
    assert len(plan) == 1, plan
    assert plan[0].startswith("SEARCH"), plan
