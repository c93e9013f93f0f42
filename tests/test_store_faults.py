"""The store when something is wrong: killed writers, full disks, bad files, servers that are away, hosts that race."""

import asyncio
import contextlib
import json
import os
import random
import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hayhost.store import Keyring, Store, StoreError, StoreUnavailableError, database

from .storing import BACKENDS, KEYS, PASSWORD, Server, child, make_url, new_server, opened, run, server, settle, sql

WRITER = """
import asyncio, itertools, sys
from hayhost.installs import Auth
from hayhost.store import Keyring, NotFoundError, Store
async def main():
    async with Store(sys.argv[1], Keyring([b"k" * 32])) as store:
        begin = int(sys.argv[2])
        async def write(name):
            for number in itertools.count(begin):
                auth = Auth("m", {"n": number})
                await store.installations.put(
                    name, "acme", if_revision=None, actor="t",
                    config={"n": number, "s": number}, sensitive=["s"], auth=auth)
                print("put", name, number, flush=True)
                if number % 5 == 0:
                    await store.orgs.create(f"{name}-{number}", actor="t")
                    print("org", f"{name}-{number}", 1, flush=True)
                store.installations.set_state(name, "acme", "ready", str(number))
        await asyncio.gather(*(write(f"p{number}") for number in range(3)))
asyncio.run(main())
"""

STARTER = """
import asyncio, sys
from pathlib import Path
from hayhost.store import Keyring, Store
async def main():
    async with Store(sys.argv[1], Keyring.load(Path(sys.argv[2]), {})) as store:
        await store.orgs.create(sys.argv[3], actor="t")
sys.stdin.readline()
asyncio.run(main())
"""

FULL_DISK = """
import asyncio, os, resource, sys
from hayhost.store import Keyring, Store, StoreUnavailableError
async def main():
    async with Store(sys.argv[1], Keyring([b"k" * 32])) as store:
        await store.orgs.create("acme", actor="t")
        size = max(os.path.getsize(sys.argv[1] + end) for end in ("", "-wal"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100_000, resource.RLIM_INFINITY))
        done = 0
        try:
            for done in range(1_000):
                await store.installations.put(f"p{done}", "acme", if_revision=0, actor="t", config={"x": "y" * 5_000})
        except StoreUnavailableError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await store.installations.put("after", "acme", if_revision=0, actor="t")
        print(done)
asyncio.run(main())
"""


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return make_url(request.param, tmp_path)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_BUSY", 0.2)


@pytest.fixture
def own_server() -> Iterator[Server]:
    made = new_server()
    yield made
    made.remove()


async def refusal(url: str | Path, keys: Keyring = KEYS) -> str:
    """Why a store does not open: one line, and no password."""
    with pytest.raises(StoreError) as caught:
        await Store(str(url), keys).__aenter__()
    assert "\n" not in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


def test_what_a_killed_writer_had_acknowledged_is_there(url: str) -> None:
    chance = random.Random(1)

    async def setup() -> None:
        async with opened(url) as store:
            await store.orgs.create("acme", actor="t")

    async def check(acknowledged: dict[str, int], orgs: set[str]) -> int:
        async with opened(url) as store:
            last = 0
            for name, number in acknowledged.items():
                found = await store.installations.get(name, "acme")
                assert found.auth
                assert found.config["n"] == found.config["s"] == found.auth.credentials["n"]
                assert number <= found.config["n"] <= number + 1  # the one under way may have been done, as a whole
                last = max(last, found.config["n"])
                [entry] = (await store.audit.list(plugin=name, limit=1)).items
                assert entry.details["revision"] == found.revision
                [(entries,)] = await sql(
                    url, f"SELECT count(*) FROM audit WHERE plugin = '{name}' AND action = 'install.put'"
                )
                [(low,)] = await sql(
                    url, f"SELECT min(id) FROM audit WHERE plugin = '{name}' AND action = 'install.put'"
                )
                [first] = (await store.audit.list(str(low + 1), 1)).items
                assert found.revision - first.details["revision"] == entries - 1
            there = {row[0] for row in await sql(url, "SELECT id FROM orgs")}
            assert orgs <= there
            logged = {row[0] for row in await sql(url, "SELECT org FROM audit WHERE action = 'org.create'")}
            assert there == logged
        if url.startswith("sqlite"):
            assert await sql(url, "PRAGMA integrity_check") == [("ok",)]
        return last

    run(setup())
    begin, orgs = 0, set[str]()
    for _ in range(8):
        writer = child(WRITER, url, str(begin))
        assert writer.stdout
        wanted, acknowledged = chance.randint(1, 60), dict[str, int]()
        for lines, line in enumerate(writer.stdout):
            if lines == wanted:
                writer.kill()  # the lines that come after this one were acknowledged too
            kind, name, number = line.split()
            if kind == "put":
                acknowledged[name] = int(number)
            else:
                orgs.add(name)
        assert writer.wait() == -9, writer.stderr and writer.stderr.read()
        writer.communicate()
        begin = run(check(acknowledged, orgs)) + 2
    assert begin > 16


def test_hosts_that_start_at_once_on_an_empty_database_all_come_up(url: str, tmp_path: Path) -> None:
    key = tmp_path / "secret.key"
    starters = [child(STARTER, url, str(key), f"org{number}") for number in range(4)]
    for starter in starters:
        assert starter.stdin
        starter.stdin.write("\n")
        starter.stdin.flush()
    for starter in starters:
        _, errors = starter.communicate(timeout=60)
        assert (starter.returncode, errors) == (0, "")

    async def main() -> None:
        async with opened(url, Keyring.load(key, {})) as store:
            assert [org.id for org in (await store.orgs.list()).items] == ["org0", "org1", "org2", "org3"]
            assert await sql(url, "SELECT count(*) FROM hayhost_version") == [(1,)]
            assert await sql(url, "SELECT count(*) FROM secret_keys") == [(1,)]

    run(main())


def test_a_start_that_is_broken_off_leaves_nothing_half_made(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        from alembic import command

        upgrade = command.upgrade

        def interrupted(*arguments: Any) -> None:
            upgrade(*arguments)
            raise KeyError("interrupted")

        monkeypatch.setattr(command, "upgrade", interrupted)
        with pytest.raises(KeyError):
            await opened(url).__aenter__()
        monkeypatch.setattr(command, "upgrade", upgrade)
        catalog = (
            "sqlite_master WHERE type = 'table'"
            if url.startswith("sqlite")
            else "pg_tables WHERE schemaname = 'public'"
        )
        assert await sql(url, f"SELECT count(*) FROM {catalog}") == [(0,)]
        async with opened(url) as store:
            await store.orgs.create("acme", actor="t")

    run(main())


def test_a_change_that_is_cancelled_is_done_or_not_as_a_whole(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            await store.orgs.create("acme", actor="t")
            for pauses in range(40):
                change = asyncio.create_task(
                    store.installations.put("p", "acme", if_revision=None, actor="t", config={"n": pauses})
                )
                for _ in range(pauses):
                    await asyncio.wait({change}, timeout=0)
                change.cancel()
                await asyncio.wait({change})
                await settle(lambda: not store._database.running, "the end of what is under way")
                found = await store.installations.find("p", "acme")
                puts = (await store.audit.list(action="install.put", limit=1)).items
                assert (found and found.revision) == (puts[0].details["revision"] if puts else None)
                cached = await store.installs.load("p", "acme")
                assert cached == (found and found.installation())
            await store.installations.put("p", "acme", if_revision=None, actor="t", config={"n": 100})

    run(main())


def test_bad_files_are_explained(tmp_path: Path, impatient: None) -> None:
    async def main() -> None:
        noise = tmp_path / "noise"
        noise.write_bytes(b"this is not a database, but long enough to be one" * 100)
        assert await refusal(noise) == f"{noise}: is not a database"
        assert await refusal(tmp_path) == f"{tmp_path}: is not a file"
        missing = tmp_path / "no" / "store.db"
        assert await refusal(missing) == f"{missing}: cannot be made: No such file or directory"
        below = noise / "store.db"
        assert await refusal(below) == f"{below}: cannot be opened: Not a directory"
        damaged = tmp_path / "damaged"
        async with opened(f"sqlite:///{damaged}"):
            pass
        data = bytearray(damaged.read_bytes())
        data[100:8_000] = b"\xff" * 7_900
        damaged.write_bytes(data)
        assert await refusal(damaged) == f"{damaged}: is a damaged database"
        foreign = tmp_path / "foreign"
        await sql(f"sqlite:///{foreign}", "CREATE TABLE orgs (x)")
        assert "not a hayhost store" in await refusal(foreign)

    run(main())


def test_a_file_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    sqlite3.connect(file).close()
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    with pytest.raises(sqlite3.OperationalError) as caught:
        connection.execute("CREATE TABLE x (y)")
    connection.close()
    assert str(database.explain(caught.value, "F")) == "F: cannot be written to, or its folder cannot"
    if os.geteuid():
        tmp_path.chmod(0o500)
        try:
            assert "cannot be" in asyncio.run(refusal(file))
        finally:
            tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("mysql://u:pg-5ecret/@:%@h/d", "malformed"),
        ("mysql://u:5ecret@h/d", "begins with 'mysql'; use sqlite:///FILE or postgresql://"),
        ("://", "malformed"),
        ("postgresql://u:5ecret@h:port/d", "malformed"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite://host/file", "more than a file"),
        ("postgresql://u@h/d?password=5ecret", "has the parameter 'password'; there are host, port, sslmode"),
        ("", "malformed"),
    ],
)
def test_wrong_urls_are_explained(url: str, told: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store(url, KEYS)
    assert told in str(caught.value)
    assert "5ecret" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_path_is_a_url(tmp_path: Path) -> None:
    async def main() -> None:
        async with Store(str(tmp_path / "100% ?#.db"), KEYS) as store:
            await store.ping()

    run(main())
    assert (tmp_path / "100% ?#.db").stat().st_mode & 0o777 == 0o600


def test_sqlite_is_set_up_to_lose_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(make_url("sqlite", tmp_path)) as store, store._database.read() as connection:
            for pragma, value in (
                ("journal_mode", "wal"),
                ("synchronous", 2),
                ("foreign_keys", 1),
                ("busy_timeout", 10_000),
            ):
                assert (await connection.exec_driver_sql(f"PRAGMA {pragma}")).scalar() == value

    run(main())


def test_a_database_that_another_process_keeps_locked_is_explained(tmp_path: Path, impatient: None) -> None:
    async def main() -> None:
        url = make_url("sqlite", tmp_path)
        async with opened(url) as store:
            other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreUnavailableError, match="another process keeps it locked"):
                await store.orgs.create("acme", actor="t")
            assert not (await store.orgs.list()).items
            other.execute("ROLLBACK")
            other.close()
            await store.orgs.create("acme", actor="t")

    run(main())


def test_a_full_disk_fails_a_change_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    writer = child(FULL_DISK, str(file))
    output, errors = writer.communicate(timeout=60)
    assert writer.returncode == 0, errors
    told, done = output.splitlines()
    assert told == f"{file}: the disk has an error, or is full" or told == f"{file}: the disk is full"

    async def main() -> None:
        async with opened(f"sqlite:///{file}") as store:
            page = await store.installations.of_org("acme", limit=1_000)
            assert {item.plugin for item in page.items} == {"after", *(f"p{number}" for number in range(int(done)))}

    run(main())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_servers_that_are_not_there_are_explained(impatient: None) -> None:
    async def main() -> None:
        given = server()
        where = "PostgreSQL {} on 127.0.0.1: "
        wrong = given.url(password="wr0ng-5ecret")
        assert await refusal(wrong) == where.format("postgres") + "wrong password, or no such user"
        assert await refusal(given.url("nowhere")) == where.format("nowhere") + "there is no such database"
        assert "cannot be reached" in await refusal("postgresql://u:5ecret@127.0.0.1:1/d")
        assert "cannot be reached" in await refusal("postgresql://u:5ecret@name.invalid/d")

    run(main())


def test_a_server_that_goes_away_and_comes_back(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hayhost.store.changes._PING", 0.1)
    monkeypatch.setattr("hayhost.store.changes._RETRY", 0.1)

    async def main() -> None:
        url = own_server.url()
        async with opened(url) as store, opened(url) as other:
            await store.orgs.create("acme", actor="t")
            made = await store.installations.put("stripe", "acme", if_revision=0, actor="t", config={"n": 1})
            assert await store.installs.load("stripe", "acme")
            told: list[Any] = []
            store.installs.changed_elsewhere = lambda plugin, org: told.append((plugin, org))
            await asyncio.to_thread(own_server.stop)
            for attempt in (store.ping(), store.installations.put("x", "acme", if_revision=0, actor="t")):
                with pytest.raises(StoreUnavailableError) as caught:
                    await attempt
                assert PASSWORD not in str(caught.value)
            assert store.installs.find("stripe", "acme") == made.installation()  # what is known is served on
            store.installations.set_state("stripe", "acme", "ready")
            with pytest.raises(StoreUnavailableError):
                await store.flush()
            await asyncio.to_thread(own_server.start)
            await settle(lambda: told == [(None, None)], "the server is listened to again")
            await store.flush()
            assert (await other.installations.get("stripe", "acme")).state == "ready"
            await other.installations.put("stripe", "acme", if_revision=made.revision, actor="t", config={"n": 2})
            await settle(lambda: told[1:] == [("stripe", "acme")], "the news of the change")

    run(main())


def test_a_change_on_a_lost_connection_is_not_done_twice(own_server: Server) -> None:
    async def main() -> None:
        url = own_server.url()
        async with opened(url) as store:
            await store.orgs.create("acme", actor="t")
            async with store._database.write() as transaction:
                await transaction.record("t", "lost")
                with contextlib.suppress(Exception):
                    await sql(
                        url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                    )
                with pytest.raises(StoreUnavailableError):
                    async with store._database.translating():
                        await transaction.record("t", "lost")
            assert not (await store.audit.list(action="lost")).items

    with pytest.raises(StoreUnavailableError):
        run(main())


def test_a_rotation_that_is_killed_is_finished_later(url: str) -> None:
    source = """
import asyncio, sys
from hayhost.store import Keyring, Store, rotation
rotation._BATCH = 1
async def main():
    async with Store(sys.argv[1], Keyring([b"n" * 32, b"k" * 32])) as store:
        batch = rotation._batch
        async def told(*arguments):
            done = await batch(*arguments)
            print(len(done), flush=True)
            return done
        rotation._batch = told
        await store.rotate(actor="t")
asyncio.run(main())
"""

    async def setup() -> None:
        async with opened(url) as store:
            await store.orgs.create("acme", actor="t")
            for number in range(30):
                await store.installations.put(
                    f"p{number}", "acme", if_revision=0, actor="t", config={"n": number}, sensitive=["n"]
                )

    async def finish() -> None:
        new = Keyring([b"n" * 32])
        async with opened(url, Keyring([b"n" * 32, b"k" * 32])) as store:
            assert 0 < await store.rotate(actor="t") < 30
        async with opened(url, new) as store:
            for number in range(30):
                assert (await store.installations.get(f"p{number}", "acme")).config == {"n": number}

    run(setup())
    rotating = child(source, url)
    assert rotating.stdout
    for _ in range(5):
        assert json.loads(rotating.stdout.readline()) == 1
    rotating.kill()
    rotating.communicate()
    run(finish())
