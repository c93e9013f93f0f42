"""Which tokens are due, and that each is claimed once."""

import asyncio
import datetime as dt
import time
from pathlib import Path
from typing import Any

import pytest

from hayhost.installs import Auth
from hayhost.store import Store, refreshing
from hayhost.store.records import Installed, now

from .storing import BACKENDS, make_url, opened, run, sql

HOUR = 3_600


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return make_url(request.param, tmp_path)


def tokens(expires_in: float, **more: Any) -> Auth:
    return Auth("oauth", {"accessToken": "a", "refreshToken": "r", "expiresAt": time.time() + expires_in, **more})


async def install(store: Store, org: str, auth: Auth | None, plugin: str = "crm", **values: Any) -> Installed:
    if org not in [known.id for known in (await store.orgs.list()).items]:
        await store.orgs.create(org, actor="test")
    return await store.installations.put(plugin, org, if_revision=None, actor="test", auth=auth, **values)


def test_tokens_are_due_before_they_expire() -> None:
    at = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)

    def early(seconds: float) -> float:
        moment = refreshing.due(Auth("m", {"refreshToken": "r", "expiresAt": at.timestamp() + seconds}), at)
        assert moment is not None
        return seconds - (moment - at).total_seconds()

    assert all(300 <= early(HOUR) <= 600 for _ in range(100))
    assert all(6 <= early(60) <= 12 for _ in range(100))
    assert all(300 <= early(30 * 24 * HOUR) <= 600 for _ in range(100))
    assert early(-5) == 0
    assert len({early(HOUR) for _ in range(10)}) == 10
    for none in ({}, {"refreshToken": "r"}, {"expiresAt": 1}, {"refreshToken": "r", "expiresAt": "1"}):
        assert refreshing.due(Auth("m", none), at) is None
    assert refreshing.due(Auth("m", {"refreshToken": "r", "expiresAt": True}), at) is None
    assert refreshing.due(Auth("m", {"refreshToken": "r", "expiresAt": 10**30}), at)
    assert refreshing.due(None, at) is None


def test_the_pause_between_attempts_doubles_up_to_an_hour() -> None:
    pauses = [refreshing.retry(failures).total_seconds() for failures in (0, 1, 2, 9, 10_000)]
    for pause, least in zip(pauses, (60, 120, 240, HOUR, HOUR), strict=True):
        assert least <= pause <= least * 1.25


def test_what_is_due_is_claimed_once_and_due_again_later(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store, opened(url) as other:
            await install(store, "late", tokens(-100))
            await install(store, "later", tokens(-50))
            await install(store, "fresh", tokens(HOUR))
            await install(store, "off", tokens(-100), enabled=False)
            await install(store, "key", Auth("apiKey", {"key": "x"}))
            await install(store, "late", tokens(-100), "stripe")
            due = await store.refreshes.next(["crm", "stripe", "none"])
            assert set(due) == {"crm", "stripe"}
            assert abs((now() - due["crm"]).total_seconds() - 100) < 30
            assert await store.refreshes.next([]) == {}
            assert await store.refreshes.claim("none", 10) == []
            assert [found.org_id for found in await store.refreshes.claim("crm", 1)] == ["late"]
            assert await other.refreshes.claim("crm", 10, "fresh") == []
            claims = await asyncio.gather(*(each.refreshes.claim("crm", 10) for each in (store, other) * 10))
            assert [found.org_id for claim in claims for found in claim] == ["later"]
            [found] = await other.refreshes.claim("stripe", 10, "late")
            assert found.auth
            assert found.auth.credentials["refreshToken"] == "r"
            soon = (await store.refreshes.next(["crm"]))["crm"]
            assert 50 < (soon - now()).total_seconds() < 76

    run(main())


def test_only_new_credentials_end_a_claim(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(url) as store:
            await install(store, "acme", tokens(-1))
            [claimed] = await store.refreshes.claim("crm", 1)
            for change in ({"config": {"a": 1}}, {"enabled": False}, {"enabled": True}, {"auth": claimed.auth}):
                await store.installations.put("crm", "acme", if_revision=None, actor="t", **change)
                assert await store.refreshes.claim("crm", 1) == []
            await store.installations.put("crm", "acme", if_revision=None, actor="t", auth=tokens(-1))
            soon = (await store.refreshes.next(["crm"]))["crm"]
            assert 5 < (soon - now()).total_seconds() <= 10  # a provider whose tokens expire at once is no busy loop
            monkeypatch.setattr(refreshing, "_LEAST", dt.timedelta())
            await store.installations.put("crm", "acme", if_revision=None, actor="t", auth=tokens(-2))
            assert len(await store.refreshes.claim("crm", 1)) == 1
            await store.installations.put("crm", "acme", if_revision=None, actor="t", auth=None)
            assert await store.refreshes.next(["crm"]) == {}

    run(main())


def test_failures_are_kept_until_there_are_new_credentials(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            made = await install(store, "acme", tokens(-1))
            assert await store.refreshes.failed(made, "it is\0 down")
            found = await store.installations.get("crm", "acme")
            assert (found.revision, found.auth_validity) == (made.revision, "unknown")
            assert found.auth_error == found.installation().problem != ""
            assert not await store.refreshes.failed(found, found.auth_error)
            renewed = await store.installations.put("crm", "acme", if_revision=None, actor="t", auth=tokens(-1, a=1))
            assert renewed.auth_error == ""
            assert not await store.refreshes.failed(made, "of credentials that are there no more", revoked=True)
            assert await store.refreshes.failed(renewed, "revoked", revoked=True)
            found = await store.installations.get("crm", "acme")
            assert (found.auth_validity, found.revision) == ("invalid", renewed.revision + 1)
            assert await store.refreshes.next(["crm"]) == {}
            for change in ({"config": {"b": 1}}, {"enabled": False}, {"enabled": True}):
                await store.installations.put("crm", "acme", if_revision=None, actor="t", **change)
                assert await store.refreshes.next(["crm"]) == {}
            outcomes = [entry.outcome for entry in (await store.audit.list(action="install.refresh")).items]
            assert outcomes == ["revoked", "failed"]

    run(main())


def test_a_changed_config_is_tried_soon(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            await install(store, "acme", tokens(-1))
            [claimed] = await store.refreshes.claim("crm", 1)
            await sql(url, "UPDATE installations SET refresh_failures = 20, refresh_at = refresh_at + 3600000000")
            assert await store.refreshes.failed(claimed, "wrong client")
            await store.installations.put("crm", "acme", if_revision=None, actor="t", config={"clientId": "right"})
            soon = (await store.refreshes.next(["crm"]))["crm"]
            assert 50 < (soon - now()).total_seconds() <= 60

    run(main())


def test_what_does_not_decrypt_holds_up_no_other(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            await install(store, "acme", tokens(-100))
            await install(store, "beta", tokens(-1))
            moved = "(SELECT credentials FROM installations WHERE org = 'beta')"
            await sql(url, f"UPDATE installations SET credentials = {moved} WHERE org = 'acme'")
            assert [found.org_id for found in await store.refreshes.claim("crm", 10)] == ["beta"]
            assert await store.refreshes.claim("crm", 10) == []

    run(main())


def test_a_store_of_the_first_version_is_migrated(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            made = await install(store, "acme", tokens(-1), config={"s": 1}, sensitive={"s"})
        await sql(url, "DROP TABLE audit_calls")
        await sql(url, "ALTER TABLE orgs DROP COLUMN tools")
        await sql(url, "DROP INDEX installations_by_refresh")
        for column in ("auth_error", "refresh_at", "refresh_failures"):
            await sql(url, f"ALTER TABLE installations DROP COLUMN {column}")
        await sql(url, "UPDATE hayhost_version SET version_num = '0001'")
        async with opened(url) as store:
            found = await store.installations.get("crm", "acme")
            assert (found.auth, found.config, found.auth_error) == (made.auth, made.config, "")
            await store.installations.put("crm", "acme", if_revision=made.revision, actor="t", auth=tokens(-1, b=1))
            assert set(await store.refreshes.next(["crm"])) == {"crm"}

    run(main())
