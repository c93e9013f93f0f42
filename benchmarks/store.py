"""How the store's start and first look-up depend on how many installations there are, on SQLite."""

import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from hayhost.installs import Auth
from hayhost.store import Keyring, Store, records, schema, sealing

__all__ = ["KEYS", "fill", "main"]

KEYS: Final = Keyring([b"k" * 32])
_ROUNDS: Final = 15
_PLUGINS: Final = 10


async def fill(url: str, plugins: list[str], orgs: list[str]) -> None:
    """Install each of ``plugins`` for each of ``orgs``, by the thousand; the keys are ``KEYS``."""
    auth = Auth("apiKey", {"apiKey": "sk_" + "x" * 40})
    async with Store(url, KEYS) as store:
        for begin in range(0, len(orgs), 1_000):
            at = records.now()
            made = [{"id": org, "name": org, "created": at} for org in orgs[begin : begin + 1_000]]
            rows: list[dict[str, Any]] = []
            for org, plugin in itertools.product(orgs[begin : begin + 1_000], plugins):
                config, sealed = sealing.seal_config(KEYS, org, plugin, {"a": "x" * 100, "s": "y"}, {"s"})
                credentials = sealing.seal_auth(KEYS, org, plugin, auth)
                values = {"org": org, "plugin": plugin, "enabled": True, "config": config, "sealed": sealed}
                values |= {"auth_method": "apiKey", "credentials": credentials, "auth_validity": "valid"}
                values |= {"key_id": KEYS.primary, "state": "ready", "error": "", "revision": 1}
                rows.append({**values, "created": at, "updated": at})
            async with store._database.write() as transaction:
                await transaction.execute(sa.insert(schema.orgs), made)
                await transaction.execute(sa.insert(schema.installations), rows)


async def _once(url: str) -> dict[str, float]:
    async def timed(name: str, work: Any) -> Any:
        begin = time.perf_counter()
        result = await work
        times[name] = (time.perf_counter() - begin) * 1_000
        return result

    times: dict[str, float] = {}
    store = Store(url, KEYS)
    await timed("start", store.__aenter__())
    assert await timed("first_find", store.installs.load("p0", "measured"))
    assert await timed("absent", store.installs.load("p0", "nobody")) is None
    begin = time.perf_counter()
    for _ in range(10_000):
        store.installs.find("p0", "measured")
    times["cached_find"] = (time.perf_counter() - begin) / 10  # ms per one of 10,000
    await timed("page_of_100", store.orgs.list())
    await timed("last_page_of_100", store.orgs.list("org990"))
    await timed("put", store.installations.put("p0", "measured", if_revision=None, actor="benchmark", config={"a": 1}))
    await store.__aexit__()
    return times


def main(counts: tuple[int, ...] = (0, 100_000)) -> None:
    """Print milliseconds, the median of several starts, by number of installations, and their ratio to the first."""
    results: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        urls = {count: f"sqlite:///{Path(folder) / str(count)}" for count in counts}
        for count, url in urls.items():
            names = [f"p{number}" for number in range(_PLUGINS)]
            asyncio.run(fill(url, names, ["measured", *(f"org{number}" for number in range(count // _PLUGINS))]))
        rounds: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
        for _ in range(_ROUNDS):  # by turns, so that a busy machine is as busy for all
            for count, url in urls.items():
                rounds[count].append(asyncio.run(_once(url)))
    for count, measured in rounds.items():
        results[count] = {name: statistics.median(one[name] for one in measured) for name in measured[0]}
    first, last = results[counts[0]], results[counts[-1]]
    ratio = {name: round(last[name] / first[name], 2) for name in first}
    rounded = {count: {name: round(value, 4) for name, value in result.items()} for count, result in results.items()}
    json.dump({"milliseconds": rounded, "ratio": ratio}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
