"""The connection to the database: transactions that are durable once they return, and errors that say no secrets."""

import asyncio
import contextlib
import functools
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from hayhost.errors import NotAllowedError, StoreError, StoreUnavailableError
from hayhost.metrics.counts import StoreCounts

from . import schema
from .records import clean, now

__all__ = ["Change", "Database", "Transaction", "explain", "parse_url", "whole"]

P = ParamSpec("P")
T = TypeVar("T")
CHANNEL: Final = "hayhost"
_BUSY: Final = 10.0  # seconds to wait for another process that writes
_MAX_PAYLOAD: Final = 7_000  # PostgreSQL takes notifications of 8,000 bytes
_MAX_DETAILS: Final = 4 << 10
_PARAMETERS: Final = ("host", "port", "sslmode")
# SQLSTATE classes whose messages are about the server and never quote a value of ours.
_TELLING: Final = ("08", "25", "28", "3D", "40", "53", "55", "57", "58")


class Change(msgspec.Struct, frozen=True, array_like=True):
    """Something that was changed, as whoever caches it needs to know."""

    action: str
    org: str | None
    plugin: str | None


def parse_url(text: str) -> URL:
    """The database that ``text`` names: a file, ``sqlite:///FILE`` or ``postgresql://...``.

    Raises ``StoreError``, without repeating what may be a password.
    """
    if text and "\0" not in text and "://" not in text:
        return URL.create("sqlite+aiosqlite", database=text)
    try:
        url = sa.make_url(text)
    except (ArgumentError, ValueError):
        raise StoreError(
            "the store's URL is malformed; use sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        ) from None
    scheme = url.drivername.split("+")[0]
    if scheme == "sqlite" and not url.host and not url.query:
        if not url.database or url.database == ":memory:" or "\0" in url.database:
            raise StoreError("the store's URL names no file; use sqlite:///FILE")
        return URL.create("sqlite+aiosqlite", database=url.database)
    if scheme in ("postgresql", "postgres"):
        if unknown := sorted(set(url.query) - set(_PARAMETERS)):
            raise StoreError(
                f"the store's URL has the parameter {clean(unknown[0], 40)!r}; there are {', '.join(_PARAMETERS)}"
            )
        query = {"ssl" if key == "sslmode" else key: value for key, value in url.query.items()}
        return url.set(drivername="postgresql+asyncpg", query=query)
    if scheme == "sqlite":
        raise StoreError(
            "the store's URL has more than a file; use sqlite:///FILE, or sqlite:////FILE for an absolute path"
        )
    raise StoreError(
        f"the store's URL begins with {clean(scheme, 40)!r}; use sqlite:///FILE or postgresql://USER@HOST/DATABASE"
    )


class Transaction:
    """One transaction that writes. What ``record`` was told is in the audit log if, and only if, it is committed."""

    def __init__(self, database: "Database", connection: AsyncConnection) -> None:
        self._database = database
        self.connection = connection
        self.changes: list[Change] = []

    async def execute(self, statement: sa.Executable, values: Any = None) -> sa.CursorResult[Any]:
        """Run one statement."""
        return await self.connection.execute(statement, values)

    async def record(
        self,
        actor: str,
        action: str,
        org: str | None = None,
        plugin: str | None = None,
        outcome: str = "ok",
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Add to the audit log. ``details`` must have no secrets."""
        try:
            encoded = msgspec.json.encode(details or {}).decode()
        except (TypeError, ValueError, OverflowError, RecursionError):
            raise NotAllowedError("details of the audit log can be JSON values only") from None
        values = {
            "at": now(),
            "source": self._database.source,
            "actor": clean(actor, 200),
            "action": clean(action, 100),
            "org": org,
            "plugin": plugin,
            "outcome": clean(outcome, 200),
            "details": encoded if len(encoded) <= _MAX_DETAILS else '{"omitted":true}',
        }
        await self.execute(sa.insert(schema.audit), values)
        self.changes.append(Change(action, org, plugin))

    async def announce(self) -> None:
        """Tell other hosts, at the commit, what was changed."""
        if not self.changes or not self._database.is_postgresql:
            return
        message = msgspec.json.encode([self._database.source, self.changes])
        if len(message) > _MAX_PAYLOAD:
            message = msgspec.json.encode([self._database.source, None])
        await self.execute(sa.select(sa.func.pg_notify(CHANNEL, message.decode())))


class Database:
    """An engine, with what is particular to the two databases."""

    def __init__(self, url: str, source: str) -> None:
        """Raises ``StoreError`` if ``url`` is not of a database that it can work with."""
        self.url = parse_url(url)
        self.source: Final = source
        """Marks what this host wrote."""
        self.is_postgresql: Final = self.url.drivername.startswith("postgresql")
        self.committed: list[Callable[[Sequence[Change]], None]] = []
        """Called with what was changed, once that is durable."""
        self.running: set[asyncio.Task[Any]] = set()
        self.counts = StoreCounts()
        self._writing = asyncio.Lock()  # SQLite has one writer, and among threads its wait is not fair
        if self.is_postgresql:
            self.where = (
                f"PostgreSQL {self.url.database or ''} on {self.url.host or self.url.query.get('host', 'localhost')}"
            )
            options: dict[str, Any] = {
                "pool_pre_ping": True,
                "connect_args": {
                    "timeout": _BUSY,
                    "command_timeout": 60,
                    "server_settings": {"synchronous_commit": "on", "application_name": "hayhost"},
                },
            }
        else:
            self.where = str(self.url.database)
            options = {"connect_args": {"timeout": _BUSY}}
        try:
            self.engine: AsyncEngine = create_async_engine(
                self.url, hide_parameters=True, echo=False, pool_size=8, max_overflow=0, pool_timeout=_BUSY, **options
            )
        except ModuleNotFoundError as error:
            raise StoreError(
                f"{error.name} is not installed; PostgreSQL needs `pip install hayhost[postgresql]`"
            ) from None
        for name in ("aiosqlite", "alembic", "sqlalchemy"):
            logging.getLogger(name).setLevel(logging.WARNING)  # more would be every value that is written
        if not self.is_postgresql:
            sa.event.listen(self.engine.sync_engine, "connect", _on_connect)
            sa.event.listen(self.engine.sync_engine, "begin", _on_begin)

    def __repr__(self) -> str:
        return f"Database({self.where!r})"

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` to its end, also if who waits for it is cancelled: drivers do not survive being broken off."""
        task = asyncio.create_task(work)
        self.running.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self.running.discard(task)
        if not task.cancelled():
            task.exception()  # who waits raises it, if nobody was cancelled

    async def close(self) -> None:
        """Let what is under way finish, and close all connections."""
        while self.running:
            await asyncio.wait(self.running)
        await self.engine.dispose()

    @contextlib.asynccontextmanager
    async def translating(self) -> AsyncIterator[None]:
        """Raise ``StoreUnavailableError`` and the like instead of what drivers raise."""
        try:
            yield
        except StoreError:
            raise
        except (SQLAlchemyError, OSError, TimeoutError, sqlite3.Error) as error:
            raise explain(error, self.where) from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "asyncpg":
                raise
            raise explain(error, self.where) from None

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection to read with, in one transaction. Raises ``StoreUnavailableError``."""
        with self.counts.counting(self.counts.reads):
            async with self.translating(), self.engine.connect() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def write(self, *, quiet: bool = False) -> AsyncIterator[Transaction]:
        """A transaction that writes: when it is left without an error, it is on the disk.

        Raises ``StoreUnavailableError``; then it is undone, or, if the connection was lost with the commit under way,
        done as a whole. ``quiet`` is for what need not be on the disk at once.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self.counts.counting(self.counts.writes))
            await stack.enter_async_context(self.translating())
            if not self.is_postgresql:
                await stack.enter_async_context(self._writing)
            connection = await stack.enter_async_context(self.engine.connect())
            await connection.execution_options(hayhost_write=True)
            async with connection.begin() as begun:
                transaction = Transaction(self, connection)
                if quiet and self.is_postgresql:
                    await transaction.execute(sa.text("SET LOCAL synchronous_commit = off"))
                yield transaction
                await transaction.announce()
                try:
                    await begun.commit()
                finally:  # also when nobody knows whether it was committed
                    if transaction.changes:
                        for listener in self.committed:
                            listener(transaction.changes)


class _Owner(Protocol):
    _database: Database


Owner = TypeVar("Owner", bound=_Owner)


def whole(
    method: Callable[Concatenate[Owner, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Owner, P], Coroutine[Any, Any, T]]:
    """Have a method of an object with a ``_database`` run to its end, also if who waits for it is cancelled."""

    @functools.wraps(method)
    async def run(self: Owner, /, *arguments: P.args, **options: P.kwargs) -> T:
        return await self._database.finish(method(self, *arguments, **options))

    return run


def _on_connect(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # else the driver begins and commits as it sees fit
    cursor = connection.cursor()
    for pragma in (
        "foreign_keys=ON",
        "synchronous=FULL",
        f"busy_timeout={_BUSY * 1000:.0f}",
        "trusted_schema=OFF",
        "secure_delete=ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _on_begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("hayhost_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def explain(error: BaseException, where: str) -> StoreError:
    """What a driver's error means, in one line that has none of the values that were to be written."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = getattr(current, "orig", None) or current.__cause__ or current.__context__
    for cause in chain:
        if isinstance(cause, PoolTimeoutError):
            return StoreUnavailableError(f"{where}: too many requests wait for the database")
        if isinstance(cause, sqlite3.Error):
            return _of_sqlite(cause, where)
        if state := getattr(cause, "sqlstate", None):
            return _of_postgresql(cause, str(state), where)
    for cause in chain:
        if isinstance(cause, TimeoutError):
            return StoreUnavailableError(f"{where}: the database does not answer")
        if isinstance(cause, OSError):
            return StoreUnavailableError(f"{where}: cannot be reached: {cause.strerror or type(cause).__name__}")
    return StoreUnavailableError(f"{where}: the database failed ({type(chain[-1]).__name__})")


def _of_sqlite(error: sqlite3.Error, where: str) -> StoreError:
    name = getattr(error, "sqlite_errorname", "") or type(error).__name__
    for code, told in (
        ("SQLITE_NOTADB", "is not a database"),
        ("SQLITE_CORRUPT", "is a damaged database"),
        ("SQLITE_CANTOPEN", "cannot be opened, nor made"),
        ("SQLITE_READONLY", "cannot be written to, or its folder cannot"),
        ("SQLITE_PERM", "cannot be written to"),
        ("SQLITE_BUSY", "another process keeps it locked"),
        ("SQLITE_FULL", "the disk is full"),
        ("SQLITE_IOERR", "the disk has an error, or is full"),
    ):
        if name.startswith(code):
            return StoreUnavailableError(f"{where}: {told}")
    return StoreUnavailableError(f"{where}: the database failed ({name})")


def _of_postgresql(error: BaseException, state: str, where: str) -> StoreError:
    if state == "28P01":
        return StoreUnavailableError(f"{where}: wrong password, or no such user")
    if state == "3D000":
        return StoreUnavailableError(f"{where}: there is no such database")
    if state == "42501":
        return StoreUnavailableError(f"{where}: the user lacks a permission")
    if state.startswith(_TELLING):
        return StoreUnavailableError(f"{where}: {clean(str(error).splitlines()[0], 200) if str(error) else state}")
    return StoreUnavailableError(f"{where}: the database failed ({state})")
