"""Makes the tables, or brings them up to date, while other hosts may be about to do the same."""

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from hayhost.errors import StoreUnavailableError, StoreVersionError

from . import schema
from .database import Database

__all__ = ["MIGRATIONS", "migrate"]

MIGRATIONS: Final = Path(__file__).parent / "migrations"
_LOCK: Final = 0x68617968  # of PostgreSQL's advisory ones
_PATIENCE: Final = 60.0


async def migrate(database: Database) -> None:
    """Have the database with the tables of ``schema``.

    Raises ``StoreVersionError`` if it is newer, or somebody else's, and ``StoreUnavailableError`` if it cannot be used.
    """
    if database.is_postgresql:
        if await _is_current(database):
            return
        async with database.write() as transaction:
            await transaction.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            await transaction.connection.run_sync(_upgrade, database.where)
        return
    path = Path(database.where)
    _make_file(path)
    if await _is_current(database):
        return
    async with _locked(path):
        async with database.translating():
            await asyncio.to_thread(_use_wal, path)
        async with database.write() as transaction:
            await transaction.connection.run_sync(_upgrade, database.where)


async def _is_current(database: Database) -> bool:
    """Whether there is nothing to do, found out without loading Alembic."""
    async with database.read() as connection:
        if not database.is_postgresql:
            mode = (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar()
            if mode != "wal":
                return False
        if not await connection.run_sync(lambda sync: sa.inspect(sync).has_table(schema.VERSION_TABLE)):
            return False
        found = await connection.scalar(sa.text(f"SELECT version_num FROM {schema.VERSION_TABLE}"))
        return bool(found == schema.HEAD)


def _upgrade(connection: sa.Connection, where: str) -> None:
    from alembic import command  # loaded only when there is something to do: it takes longer than all the rest
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config(attributes={"connection": connection, "version_table": schema.VERSION_TABLE})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    tables = set(sa.inspect(connection).get_table_names())
    if schema.VERSION_TABLE in tables:
        found = connection.scalar(sa.text(f"SELECT version_num FROM {schema.VERSION_TABLE}"))
        known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
        if found is not None and found not in known:
            raise StoreVersionError(
                f"{where}: made by a newer hayhost (tables {str(found)[:40]}; this one knows up to {schema.HEAD})"
            )
    elif taken := sorted(tables & set(schema.metadata.tables)):
        raise StoreVersionError(f"{where}: not a hayhost store, and has a table {taken[0]!r} already")
    command.upgrade(config, "head")


def _use_wal(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, timeout=_PATIENCE)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def _make_file(path: Path) -> None:
    """Make an empty file that only its owner can read, unless there is one."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise StoreUnavailableError(f"{path}: is not a file")
        return
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StoreUnavailableError(f"{path}: cannot be opened: {error.strerror}") from None
    try:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StoreUnavailableError(f"{path}: cannot be made: {error.strerror}") from None


@contextlib.asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Keep other processes from preparing the same file. The lock goes with the process that has it."""
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreUnavailableError(f"{path}.lock: cannot be made: {error.strerror}") from None
    try:
        async with asyncio.timeout(_PATIENCE):
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(0.02)
        yield
    except TimeoutError:
        raise StoreUnavailableError(f"{path}: another process has been preparing it for {_PATIENCE:.0f} s") from None
    finally:
        os.close(descriptor)
