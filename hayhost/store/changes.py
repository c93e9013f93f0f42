"""What other processes changed in the same database, so that nobody serves from a stale cache for long."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from hayhost.errors import StoreError
from hayhost.logs import get_logger

from . import schema
from .database import CHANNEL, Change, Database

__all__ = ["Feed"]

_MOST: Final = 1_000  # changes that are looked at one by one; if there are more, all is forgotten
_PING: Final = 5.0
_RETRY: Final = 1.0


class Feed:
    """Calls ``changed`` with what other processes changed; with ``None`` if that may be anything.

    PostgreSQL tells at once. SQLite is asked every ``interval`` seconds whether anybody wrote; the audit log says what.
    """

    def __init__(self, database: Database, changed: Callable[[Sequence[Change] | None], None], interval: float) -> None:
        self._database = database
        self._changed = changed
        self._interval = interval
        self._task: asyncio.Task[None] | None = None
        self._last = 0
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        """Listen from now on. Raises ``StoreUnavailableError``."""
        started = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(started))
        await started

    async def stop(self) -> None:
        """Listen no more."""
        self._stopping.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=2 * _PING)  # drivers do not survive being broken off
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _pause(self, seconds: float) -> bool:
        """Whether to go on after that."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return not self._stopping.is_set()

    async def _run(self, started: asyncio.Future[None]) -> None:
        follow = self._listen if self._database.is_postgresql else self._poll
        while not self._stopping.is_set():
            try:
                async with self._database.translating():
                    await follow(started)
            except StoreError as error:
                if not started.done():
                    started.set_exception(error)
                    return
                get_logger().warning("changes by other hosts are not seen now", reason=str(error))
            except Exception as error:  # whoever was told of a change could not cope with it
                if not started.done():
                    started.set_exception(error)
                    return
                get_logger().error("a change by another host was not followed", reason=type(error).__name__)
            except BaseException:
                if not started.done():
                    started.cancel()
                raise
            await self._pause(_RETRY)

    def _began(self, started: asyncio.Future[None]) -> None:
        if started.done():  # what happened while nobody listened is unknown
            self._changed(None)
        else:
            started.set_result(None)

    async def _listen(self, started: asyncio.Future[None]) -> None:
        async with self._database.engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            try:
                await driver.add_listener(CHANNEL, self._notified)
                self._began(started)
                while await self._pause(_PING):
                    await driver.execute("SELECT 1", timeout=_PING)
            finally:
                with contextlib.suppress(Exception):
                    await connection.invalidate()

    def _notified(self, _connection: object, _pid: int, _channel: str, payload: str) -> None:
        try:
            source, changes = msgspec.json.decode(payload, type=tuple[str, list[Change] | None])
        except msgspec.MsgspecError:
            self._changed(None)
            return
        if source != self._database.source:
            self._changed(changes)

    async def _poll(self, started: asyncio.Future[None]) -> None:
        async with self._database.engine.connect() as connection:
            seen = (await connection.exec_driver_sql("PRAGMA data_version")).scalar()
            self._last = await connection.scalar(sa.select(sa.func.coalesce(sa.func.max(schema.audit.c.id), 0))) or 0
            await connection.rollback()
            self._began(started)
            while await self._pause(self._interval):
                version = (await connection.exec_driver_sql("PRAGMA data_version")).scalar()
                await connection.rollback()
                if version == seen:
                    continue
                seen = version
                columns = schema.audit.c
                query = (
                    sa.select(columns.id, columns.source, columns.action, columns.org, columns.plugin)
                    .where(columns.id > self._last)
                    .order_by(columns.id)
                    .limit(_MOST + 1)
                )
                rows = (await connection.execute(query)).all()
                await connection.rollback()
                if len(rows) > _MOST:
                    self._last = rows[-1].id
                    seen = None  # there may be more
                    self._changed(None)
                elif rows:
                    self._last = rows[-1].id
                    others = [
                        Change(row.action, row.org, row.plugin) for row in rows if row.source != self._database.source
                    ]
                    if others:
                        self._changed(others)
