"""The audit log: entries are added and read, and never changed. What the store does is in it by itself."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from hayhost.errors import NotAllowedError
from hayhost.logs import get_logger

from .database import Database, whole
from .orgs import MAX_PAGE, page_of
from .records import AuditEntry, Page, check_org, check_plugin, clean, now
from .schema import audit, calls

__all__ = ["CALL", "MOST_WAITING", "Audit"]

CALL: Final = "mcp.call"
"""The action of calls of tools, which are a part of the log for themselves."""

MOST_WAITING: Final = 20_000
"""Calls that may wait to be written: with a database that is away for long, they cost no more than some megabytes."""

_AT_ONCE: Final = 200  # rows are made ready on the loop: more of them would be felt by requests


class Audit:
    """The audit log of a store. All methods raise ``StoreUnavailableError`` if the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._calls: list[dict[str, Any]] = []
        self._lost = 0

    @property
    def waiting(self) -> int:
        """How many calls are not written yet."""
        return len(self._calls)

    def note_call(self, actor: str, org: str, plugin: str | None, outcome: str, details: Mapping[str, Any]) -> None:
        """Note a call of a tool; it is written soon, with others. Calls that come while too many wait are counted."""
        if len(self._calls) < MOST_WAITING:
            row = {"at": now(), "actor": actor, "org": org, "plugin": plugin, "outcome": outcome, "details": details}
            self._calls.append(row)
        else:
            self._lost += 1

    @whole
    async def flush(self) -> None:
        """Write the calls noted so far. Calls that were too many are said, in the log and in the audit log."""
        while self._calls:
            batch, self._calls = self._calls[:_AT_ONCE], self._calls[_AT_ONCE:]
            try:
                async with self._database.write(quiet=True) as transaction:
                    await transaction.execute(sa.insert(calls), [{**row, "details": _told(row)} for row in batch])
            except BaseException:
                self._calls = batch + self._calls
                raise
        if lost := self._lost:
            get_logger().warning("calls of tools are missing in the audit log", calls=lost)
            async with self._database.write() as transaction:
                await transaction.record("host", "mcp.calls_lost", outcome="lost", details={"calls": lost})
                transaction.changes.clear()
            self._lost -= lost

    @whole
    async def append(
        self,
        actor: str,
        action: str,
        *,
        org: str | None = None,
        plugin: str | None = None,
        outcome: str = "ok",
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Add an entry about something that the store did not do itself. ``details`` must have no secrets.

        Raises ``NotAllowedError`` for a malformed org or plugin.
        """
        if org is not None:
            check_org(org)
        if plugin is not None:
            check_plugin(plugin)
        async with self._database.write() as transaction:
            await transaction.record(actor, action, org, plugin, outcome, details)
            transaction.changes.clear()  # nothing that anybody caches

    @whole
    async def list(
        self,
        before: str | None = None,
        limit: int = 100,
        *,
        org: str | None = None,
        plugin: str | None = None,
        actor: str | None = None,
        action: str | None = None,
    ) -> Page[AuditEntry]:
        """Entries, the latest first, from the one that precedes ``before``, with what is given as a filter.

        Calls of tools are not among them, unless ``action`` is ``CALL``: then nothing else is.
        """
        limit = max(1, min(limit, MAX_PAGE))
        table, action = (calls, None) if action == CALL else (audit, action)
        columns = table.c
        query = sa.select(table).order_by(columns.id.desc()).limit(limit + 1)
        if before is not None:
            if not before.isascii() or not before.isdigit() or len(before) > 18:
                raise NotAllowedError("not where a page of the audit log begins")
            query = query.where(columns.id < int(before))
        for name, value in (("org", org), ("plugin", plugin), ("actor", actor), ("action", action)):
            if value is not None:
                query = query.where(columns[name] == clean(value, 200))
        async with self._database.read() as connection:
            rows, following = page_of(list((await connection.execute(query)).all()), limit, "id")
        entries = [
            AuditEntry(
                row.id,
                row.at,
                row.actor,
                CALL if table is calls else row.action,
                row.org,
                row.plugin,
                row.outcome,
                msgspec.json.decode(row.details),
            )
            for row in rows
        ]
        return Page(entries, following)


def _told(row: Mapping[str, Any]) -> str:
    """The details of a call, with names as they were asked for made fit for both databases."""
    details = {key: clean(value, 200) if isinstance(value, str) else value for key, value in row["details"].items()}
    return msgspec.json.encode(details).decode()
