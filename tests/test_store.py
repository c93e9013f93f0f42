"""Every operation of the store, on both databases."""

import asyncio
import datetime as dt
import logging
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import create_async_engine

from hayhost.installs import Auth, NotLoadedError, ToolLists
from hayhost.store import (
    ConflictError,
    ExistsError,
    NotAllowedError,
    NotFoundError,
    Store,
    StoreUnavailableError,
    StoreVersionError,
    records,
    schema,
)
from hayhost.store.installations import Installations
from hayhost.store.migrating import MIGRATIONS

from .storing import BACKENDS, KEYS, make_url, opened, run, settle, sql

AUTH = Auth("apiKey", {"apiKey": "sk_5ecret"})


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return make_url(request.param, tmp_path)


async def install(store: Store, plugin: str = "stripe", org: str = "acme", **values: Any) -> Any:
    try:
        await store.orgs.create(org, actor="test")
    except ExistsError:
        pass
    return await store.installations.put(plugin, org, if_revision=0, actor="test", **values)


def test_orgs(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            for org in ("b", "A", "a.b", "Z-1"):
                await store.orgs.create(org, actor="test")
            await store.orgs.create("acme", "Acme Ltd ☂", actor="test")
            assert (await store.orgs.get("acme")).name == "Acme Ltd ☂"
            with pytest.raises(ExistsError, match="org acme already"):
                await store.orgs.create("acme", actor="test")
            for wrong in ("", "-a", "a/b", "a" * 129, "é", "a\n", "a\0"):
                with pytest.raises(NotAllowedError):
                    await store.orgs.create(wrong, actor="test")
            for wrong in (" ", "a\nb", "x" * 201, "\ud800"):
                with pytest.raises(NotAllowedError):
                    await store.orgs.create("new", wrong, actor="test")
            assert (await store.orgs.rename("acme", "Acme", actor="test")).name == "Acme"
            seen, after, pages = [], "", 0
            while True:
                page = await store.orgs.list(after, 2)
                seen += [org.id for org in page.items]
                pages += 1
                if page.next is None:
                    break
                after = page.next
            assert seen == sorted(["b", "A", "a.b", "Z-1", "acme"])
            assert pages == 3
            assert not (await store.orgs.list("zzz\0\ud800")).items
            await store.orgs.delete("b", actor="test")
            for missing in (
                store.orgs.get("b"),
                store.orgs.delete("b", actor="x"),
                store.orgs.rename("b", "n", actor="x"),
            ):
                with pytest.raises(NotFoundError, match="no org b"):
                    await missing

    run(main())


def test_installations(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            with pytest.raises(NotFoundError, match="no org acme"):
                await store.installations.put("stripe", "acme", if_revision=None, actor="test")
            config = {"n": 1, "secret": {"deep": ["☂", "\0"]}, "text": "x"}
            made = await install(store, config=config, sensitive=["secret", "absent"], auth=AUTH)
            assert await store.installations.get("stripe", "acme") == made
            assert made.config == config
            assert made.auth == AUTH
            assert (made.sealed, made.auth_validity, made.enabled) == (("secret",), "unknown", True)
            assert made.installation().org_name == "acme"
            changed = await store.installations.put(
                "stripe", "acme", if_revision=made.revision, actor="test", enabled=False, auth_validity="valid"
            )
            assert changed.revision == made.revision + 1
            assert (changed.config, changed.auth, changed.auth_validity) == (config, AUTH, "valid")
            again = await store.installations.get("stripe", "acme")
            assert msgspec.structs.replace(again, updated=changed.updated) == changed
            for stale in (0, made.revision):
                with pytest.raises(ConflictError) as caught:
                    await store.installations.put("stripe", "acme", if_revision=stale, actor="test", config={})
                assert caught.value.current == changed.revision
            with pytest.raises(ConflictError) as caught:
                await store.installations.put("crm", "acme", if_revision=7, actor="test")
            assert caught.value.current == 0
            other = Auth("oauth", {"token": "t"})
            newer = await store.installations.put("stripe", "acme", if_revision=None, actor="test", auth=other)
            assert newer.auth_validity == "unknown"
            await store.installations.set_auth_validity(
                "stripe", "acme", "invalid", actor="t", if_revision=newer.revision
            )
            with pytest.raises(ConflictError):
                await store.installations.set_auth_validity(
                    "stripe", "acme", "valid", actor="t", if_revision=newer.revision
                )
            found = await store.installations.get("stripe", "acme")
            assert (found.auth_validity, found.revision) == ("invalid", newer.revision + 1)
            gone = await store.installations.put("stripe", "acme", if_revision=None, actor="t", auth=None, config={})
            assert (gone.auth, gone.auth_method, gone.sealed) == (None, None, ())
            with pytest.raises(ConflictError):
                await store.installations.delete("stripe", "acme", actor="test", if_revision=1)
            await store.installations.delete("stripe", "acme", actor="test", if_revision=gone.revision)
            with pytest.raises(NotFoundError, match="stripe is not installed for acme"):
                await store.installations.get("stripe", "acme")
            with pytest.raises(NotFoundError):
                await store.installations.delete("stripe", "acme", actor="test")
            with pytest.raises(NotFoundError):
                await store.installations.set_auth_validity("stripe", "acme", "valid", actor="test")
            assert (await install(store)).revision > gone.revision
            for wrong in ({1, 2}, object(), float("nan"), dt.date(2026, 1, 1), "\ud800", "x" * (5 << 20)):
                with pytest.raises(NotAllowedError):
                    await store.installations.put("crm", "acme", if_revision=0, actor="t", config={"a": wrong})
            with pytest.raises(NotAllowedError):
                await store.installations.put("CRM", "acme", if_revision=0, actor="t")
            with pytest.raises(NotAllowedError):
                await store.installations.set_auth_validity("stripe", "acme", "maybe", actor="t")  # type: ignore[arg-type]

    run(main())


def test_installations_are_listed_in_pages_without_secrets(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            for org in ("a", "B", "c"):
                for plugin in ("crm", "echo", "stripe"):
                    await install(store, plugin, org, config={"s": "5ecret", "n": 1}, sensitive={"s"}, auth=AUTH)
            first = await store.installations.of_org("a", limit=2)
            assert [item.plugin for item in first.items] == ["crm", "echo"]
            assert first.items[0].config == {"n": 1}
            assert (first.items[0].sealed, first.items[0].auth, first.items[0].auth_method) == (("s",), None, "apiKey")
            rest = await store.installations.of_org("a", first.next or "", 2)
            assert ([item.plugin for item in rest.items], rest.next) == (["stripe"], None)
            page = await store.installations.of_plugin("crm", limit=2)
            assert [item.org_id for item in page.items] == ["B", "a"]
            assert [item.org_id for item in (await store.installations.of_plugin("crm", "a")).items] == ["c"]

    run(main())


def test_deleting_an_org_deletes_what_it_has_but_not_its_history(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            await install(store, auth=AUTH)
            _, secret = await store.tokens.create("t", org="acme", actor="test")
            state = await store.flows.begin("stripe", "acme", "oauth", verifier="v", browser="b", actor="test")
            assert await store.tokens.verify(secret)
            assert await store.installs.load("stripe", "acme")
            await store.orgs.delete("acme", actor="test")
            assert await store.tokens.verify(secret) is None
            assert await store.installs.load("stripe", "acme") is None
            with pytest.raises(NotFoundError):
                await store.flows.take(state, browser="b", actor="test")
            for table in ("installations", "tokens", "oauth_flows"):
                assert await sql(url, f"SELECT count(*) FROM {table}") == [(0,)]
            assert len((await store.audit.list(org="acme")).items) == 5

    run(main())


def test_states_are_stored_later_and_change_no_revision(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            made = await install(store)
            store.installations.set_state("stripe", "acme", "starting")
            store.installations.set_state("stripe", "acme", "error", "no\0 reason \ud800" + "x" * 5_000)
            store.installations.set_state("gone", "acme", "ready")
            await store.flush()
            found = await store.installations.get("stripe", "acme")
            assert (found.state, found.revision) == ("error", made.revision)
            assert found.error.startswith("no")
            assert len(found.error) == 2_000
            await store.installations.put("stripe", "acme", if_revision=made.revision, actor="t", enabled=False)
            assert (await store.installations.get("stripe", "acme")).state == "error"
            store.installations.set_state("stripe", "acme", "ready")
        assert await sql(url, "SELECT state, error FROM installations") == [("ready", "")]

    run(main())


def test_of_concurrent_changes_exactly_one_wins(url: str) -> None:
    async def main() -> None:
        async with opened(url) as one, opened(url) as two:
            await one.orgs.create("acme", actor="t")
            revision = 0
            for _ in range(5):
                tries = [
                    store.installations.put("stripe", "acme", if_revision=revision, actor="t", config={"n": number})
                    for number, store in enumerate([one, two] * 5)
                ]
                results = await asyncio.gather(*tries, return_exceptions=True)
                [winner] = [result for result in results if not isinstance(result, BaseException)]
                assert sum(isinstance(result, ConflictError) for result in results) == 9
                assert (await two.installations.get("stripe", "acme")).config == winner.config
                revision = winner.revision
            assert len((await one.audit.list(action="install.put")).items) == 5

    run(main())


def test_concurrent_changes_of_different_parts_all_count(url: str) -> None:
    async def main() -> None:
        async with opened(url) as one, opened(url) as two:

            async def change(store: Installations, **values: Any) -> None:
                await store.put("stripe", "acme", if_revision=None, actor="t", **values)

            await one.orgs.create("acme", actor="t")
            for number in range(5):
                auth = Auth("apiKey", {"n": number})
                await asyncio.gather(
                    change(one.installations, config={"n": number}, sensitive=["n"]),
                    change(two.installations, auth=auth),
                    change(one.installations, enabled=bool(number % 2)),
                )
                found = await two.installations.get("stripe", "acme")
                assert (found.config, found.auth, found.enabled) == ({"n": number}, auth, bool(number % 2))

    run(main())


def test_tokens(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store, opened(url) as other:
            assert not await store.tokens.exist()
            assert not await other.tokens.exist()
            await store.orgs.create("acme", actor="t")
            admin, secret = await store.tokens.create("admin", actor="t")
            scoped, theirs = await store.tokens.create("acme's", org="acme", actor="t")
            assert re.fullmatch(r"hay_[0-9a-f]{16}_[\w-]{43}", secret)
            assert await store.tokens.exist()
            assert await store.tokens.verify(secret) == admin
            assert (found := await other.tokens.verify(theirs))
            assert found.org_id == "acme"
            for wrong in ("", "x", secret[:-1], secret[:20] + theirs[20:], secret[:-1] + "A", secret + "\n", "hay_é"):
                if wrong != secret:
                    assert await store.tokens.verify(wrong) is None
            assert await other.tokens.verify(secret)
            await store.tokens.revoke(admin.id, actor="t")
            assert await store.tokens.verify(secret) is None
            await settle(lambda: not other.tokens._known, "the news of the revocation")
            assert await other.tokens.verify(secret) is None
            assert await other.tokens.exist()
            first = (await store.tokens.list()).items
            await store.tokens.revoke(admin.id, actor="t")
            assert [item.revoked for item in (await store.tokens.list()).items] == [item.revoked for item in first]
            assert [token.id for token in (await store.tokens.list(org="acme")).items] == [scoped.id]
            await other.flush()
            assert (await store.tokens.list(org="acme")).items[0].last_used
            soon = records.now() + dt.timedelta(microseconds=1)
            _, brief = await store.tokens.create("brief", actor="t", expires=soon)
            assert await store.tokens.verify(brief) is None
            assert len((await store.tokens.list(limit=2)).items) == 2
            with pytest.raises(NotFoundError):
                await store.tokens.revoke("nope\0", actor="t")
            with pytest.raises(NotFoundError):
                await store.tokens.create("x", org="nobody", actor="t")
            with pytest.raises(NotAllowedError):
                await store.tokens.create("x", actor="t", expires=dt.datetime(2030, 1, 1))  # noqa: DTZ001
            stored = str(await sql(url, "SELECT * FROM tokens")) + str(await sql(url, "SELECT * FROM audit"))
            assert secret[21:] not in stored
            assert theirs[21:] not in stored

    run(main())


def test_verified_tokens_are_remembered_and_bounded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hayhost.store.tokens._CACHED", 2)

    async def main() -> None:
        async with opened(url) as store:
            secrets = [(await store.tokens.create(str(number), actor="t"))[1] for number in range(3)]
            for secret in secrets:
                assert await store.tokens.verify(secret)
            assert len(store.tokens._known) == 2
            await sql(url, "DELETE FROM tokens")
            assert await store.tokens.verify(secrets[2])
            assert await store.tokens.verify(secrets[0]) is None

    run(main())


def test_the_audit_log(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            await install(store, config={"key": "5ecret"}, sensitive=["key"], auth=AUTH)
            for number in range(5):
                await store.audit.append("ann\0", "login", org="acme", outcome="refused", details={"n": number})
            entries = (await store.audit.list()).items
            assert [entry.id for entry in entries] == sorted((entry.id for entry in entries), reverse=True)
            put = next(entry for entry in entries if entry.action == "install.put")
            assert (put.actor, put.org_id, put.plugin, put.outcome) == ("test", "acme", "stripe", "ok")
            assert (put.details["config"], put.details["auth"]) == (["key"], "apiKey")
            assert "5ecret" not in str(entries)
            page = await store.audit.list(limit=2, action="login")
            assert [entry.details["n"] for entry in page.items] == [4, 3]
            page = await store.audit.list(page.next, 3, action="login", org="acme")
            assert ([entry.details["n"] for entry in page.items], page.next) == ([2, 1, 0], None)
            assert len((await store.audit.list(plugin="stripe")).items) == 1
            assert not (await store.audit.list(actor="nobody")).items
            for wrong in ("x", "-1", "9" * 30):
                with pytest.raises(NotAllowedError):
                    await store.audit.list(wrong)
            with pytest.raises(NotAllowedError):
                await store.audit.append("a", "b", details={"x": object()})
            await store.audit.append("a", "long", details={"x": "y" * 10_000})
            assert (await store.audit.list(action="long")).items[0].details == {"omitted": True}

    run(main())


def test_calls_are_written_together_and_those_that_are_too_many_counted(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hayhost.store.audit.MOST_WAITING", 450)

    async def main() -> None:
        async with opened(url) as store, opened(url) as other:
            assert store._flusher is not None
            store._flusher.cancel()  # nobody else writes
            seen: list[Any] = []
            other.installs.changed_elsewhere = lambda *change: seen.append(change)
            for number in range(460):
                store.audit.note_call(
                    "token:1", "acme", "stripe" if number % 2 else None, "ok", {"tool": f"t{number}\0"}
                )
            assert store.audit.waiting == 450
            await store.flush()
            assert store.audit.waiting == 0
            found = (await other.audit.list(limit=1_000, action="mcp.call")).items
            assert [entry.details["tool"][:-1] for entry in found] == [f"t{number}" for number in range(449, -1, -1)]
            assert {(entry.action, entry.org_id, entry.actor) for entry in found} == {("mcp.call", "acme", "token:1")}
            assert len((await other.audit.list(limit=1_000, action="mcp.call", plugin="stripe")).items) == 225
            (lost,) = (await other.audit.list(action="mcp.calls_lost")).items
            assert (lost.details, lost.outcome) == ({"calls": 10}, "lost")
            assert "mcp.call" not in {entry.action for entry in (await other.audit.list(limit=1_000)).items}
            await store.flush()
            assert len((await other.audit.list(action="mcp.calls_lost")).items) == 1, "they are told once"
            assert not seen

    run(main())


def test_calls_wait_for_a_database_that_is_away(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(f"sqlite:///{tmp_path / 'store.db'}") as store:
            assert store._flusher is not None
            store._flusher.cancel()
            store.audit.note_call("a", "acme", None, "ok", {"tool": "t"})
            engine, store._database.engine = store._database.engine, create_async_engine("sqlite+aiosqlite:////no/such")
            with pytest.raises(StoreUnavailableError):
                await store.audit.flush()
            assert store.audit.waiting == 1
            await store._database.engine.dispose()
            store._database.engine = engine
            await store.audit.flush()
            assert len((await store.audit.list(action="mcp.call")).items) == 1

    run(main())


def test_lists_of_tools(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store, opened(url) as other:
            assert await store.tools.tool_lists("acme") == ToolLists(), "an org that is not there has no limits"
            await store.orgs.create("acme", actor="t")
            first, second = ToolLists(deny=("a__*",)), ToolLists(allow=("b__c",))
            assert await store.tools.get("acme") == await other.tools.tool_lists("acme") == ToolLists()
            await store.tools.put("acme", first, actor="t", if_lists=ToolLists())
            assert await store.tools.tool_lists("acme") == store.tools.known("acme") == first
            with pytest.raises(ConflictError):
                await other.tools.put("acme", second, actor="t", if_lists=ToolLists())
            await settle(lambda: other.tools.known("acme") is None, "the other to hear of it")
            assert await other.tools.tool_lists("acme") == first
            with pytest.raises(NotFoundError):
                await store.tools.put("nobody", first, actor="t")
            with pytest.raises(NotAllowedError):
                await store.tools.put("acme", ToolLists(deny=("all",)), actor="t")
            await store.orgs.delete("acme", actor="t")
            assert await store.tools.tool_lists("acme") == ToolLists()

    run(main())


def test_the_audit_log_is_append_only(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            await store.audit.append("a", "b")
            before = await sql(url, "SELECT * FROM audit")
            store.audit.note_call("a", "acme", None, "ok", {})
            await store.flush()
            statements = ["UPDATE audit SET actor = 'x'", "DELETE FROM audit"]
            statements += ["UPDATE audit_calls SET actor = 'x'", "DELETE FROM audit_calls"]
            if url.startswith("sqlite"):
                statements += [f"INSERT OR REPLACE INTO {log} SELECT * FROM {log}" for log in ("audit", "audit_calls")]
            else:
                statements += ["TRUNCATE audit", "TRUNCATE audit_calls"]
            for statement in statements:
                with pytest.raises(Exception, match="append-only"):
                    await sql(url, statement)
            assert await sql(url, "SELECT * FROM audit") == before

    run(main())


def test_oauth_flows(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(url) as store, opened(url) as other:
            await store.orgs.create("acme", actor="t")

            async def begin(**options: Any) -> str:
                return await store.flows.begin(
                    "crm", "acme", "oauth", verifier="v3rifier", browser="b", actor="t", **options
                )

            state = await begin()
            stored = str(await sql(url, "SELECT * FROM oauth_flows"))
            assert state not in stored
            assert "v3rifier" not in stored
            takes = [host.flows.take(state, browser="b", actor="t") for host in (store, other) * 3]
            results = await asyncio.gather(*takes, return_exceptions=True)
            [flow] = [result for result in results if not isinstance(result, BaseException)]
            assert (flow.org_id, flow.plugin, flow.method_id, flow.verifier) == ("acme", "crm", "oauth", "v3rifier")
            assert "v3rifier" not in repr(flow)
            assert all(isinstance(result, NotFoundError) for result in results if result is not flow)
            state = await begin()
            with pytest.raises(NotFoundError, match="another browser"):
                await store.flows.take(state, browser="x", actor="t")
            with pytest.raises(NotFoundError, match="used already"):
                await store.flows.take(state, browser="b", actor="t")
            state = await begin(lifetime=-dt.timedelta(seconds=1))
            with pytest.raises(NotFoundError, match="expired"):
                await store.flows.take(state, browser="b", actor="t")
            await begin(lifetime=-dt.timedelta(seconds=1))
            assert await store.flows.expire() == 1
            monkeypatch.setattr("hayhost.store.flows._MAX_OPEN", 2)
            await begin(), await begin()
            with pytest.raises(NotAllowedError, match="under way"):
                await begin()
            with pytest.raises(NotFoundError):
                await store.flows.begin("crm", "nobody", "oauth", verifier="v", browser="b", actor="t")

    run(main())


def test_the_cache_answers_at_once_and_follows_changes(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store, opened(url) as other:
            told: list[tuple[str | None, str | None]] = []
            store.installs.changed_elsewhere = lambda plugin, org: told.append((plugin, org))
            with pytest.raises(NotLoadedError):
                store.installs.find("stripe", "acme")
            assert await store.installs.load("stripe", "acme") is None
            assert store.installs.find("stripe", "acme") is None
            assert store.installs.find("stripe", "../x") is None
            made = await install(store, config={"n": 1})
            assert await store.installs.load("stripe", "acme") == made.installation()
            assert store.installs.find("stripe", "acme") == made.installation()
            assert not told
            await other.installations.put("stripe", "acme", if_revision=None, actor="t", config={"n": 2})
            await settle(lambda: told == [("stripe", "acme")], "the news of the change")
            assert (
                await store.installs.load("stripe", "acme")
                == (await store.installations.get("stripe", "acme")).installation()
            )
            await other.orgs.rename("acme", "New", actor="t")
            await settle(lambda: told[1:] == [(None, "acme")], "the news of the name")
            assert getattr(await store.installs.load("stripe", "acme"), "org_name", "") == "New"
            await other.installations.delete("stripe", "acme", actor="t")
            await settle(lambda: len(told) == 3, "the news of the end")
            assert await store.installs.load("stripe", "acme") is None

    run(main())


def test_a_load_that_a_change_overtakes_is_not_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(url) as store:
            await install(store, config={"n": 1})
            read, reads, go = store.installations.find, 0, asyncio.Event()

            async def slow(plugin: str, org: str) -> Any:
                nonlocal reads
                reads += 1
                found = await read(plugin, org)
                if reads == 1:
                    await go.wait()
                return found

            monkeypatch.setattr(store.installations, "find", slow)
            loads = [asyncio.create_task(store.installs.load("stripe", "acme")) for _ in range(10)]
            await settle(lambda: reads == 1)
            await store.installations.put("stripe", "acme", if_revision=None, actor="t", config={"n": 2})
            go.set()
            assert {load.config["n"] for load in await asyncio.gather(*loads) if load} == {2}
            assert reads == 2

    run(main())


def test_the_cache_is_bounded(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            cache = type(store.installs)(store.installations, most=2, most_bytes=1_000)
            for plugin in ("a", "b", "c"):
                await install(store, plugin, config={"x": plugin * 100})
                assert await cache.load(plugin, "acme")
                assert await cache.load(plugin, "none") is None
            assert list(cache._found) == [("b", "acme"), ("c", "acme")]
            assert len(cache._absent) == 2
            await install(store, "large", config={"x": "y" * 900})
            assert await cache.load("large", "acme")
            assert list(cache._found) == [("large", "acme")]
            await install(store, "huge", config={"x": "y" * 2_000})
            assert await cache.load("huge", "acme")
            assert list(cache._found) == [("large", "acme")]
            cache.forget()
            assert cache._bytes == 0

    run(main())


def test_migrations_make_what_queries_expect_and_only_once(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            await store.orgs.create("acme", actor="t")

            def compare(connection: sa.Connection) -> Any:
                return compare_metadata(
                    MigrationContext.configure(connection, opts={"version_table": schema.VERSION_TABLE}),
                    schema.metadata,
                )

            async with store._database.read() as connection:
                assert await connection.run_sync(compare) == []
        async with opened(url) as store:
            assert await store.orgs.get("acme")
            assert await sql(url, "SELECT version_num FROM hayhost_version") == [(schema.HEAD,)]
            await store.ping()
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        assert ScriptDirectory.from_config(config).get_current_head() == schema.HEAD

    run(main())


def test_a_newer_or_foreign_database_is_refused(url: str) -> None:
    async def main() -> None:
        await sql(url, "CREATE TABLE tokens (mine TEXT)")
        with pytest.raises(StoreVersionError, match="not a hayhost store, and has a table 'tokens' already"):
            await opened(url).__aenter__()
        await sql(url, "DROP TABLE tokens")
        async with opened(url):
            pass
        await sql(url, "UPDATE hayhost_version SET version_num = '9999'")
        with pytest.raises(
            StoreVersionError, match=rf"newer hayhost \(tables 9999; this one knows up to {schema.HEAD}\)"
        ):
            await opened(url).__aenter__()

    run(main())


def test_secrets_show_nowhere(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        with caplog.at_level(logging.DEBUG):
            async with opened(url) as store:
                made = await install(store, config={"key": "5ecret"}, sensitive=["key"], auth=AUTH)
                _, secret = await store.tokens.create("t", actor="t")
                await store.tokens.verify(secret)
                shown = [
                    repr(thing) for thing in (made, made.installation(), store, KEYS, store._database, store.installs)
                ]
                await sql(url, "DROP TABLE installations")
                with pytest.raises(Exception, match="the database failed") as caught:
                    await store.installations.put("stripe", "acme", if_revision=0, actor="t", config={"key": "5ecret"})
                assert caught.value.__suppress_context__
                shown += [str(caught.value), repr(caught.value), caplog.text]
        assert "5ecret" not in "".join(shown)
        assert secret not in "".join(shown)
        assert "INSERT" not in caplog.text

    run(main())
