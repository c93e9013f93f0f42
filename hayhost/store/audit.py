"""The audit log: entries are added and read, and never changed. What the store does is in it by itself."""

from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from hayhost.errors import NotAllowedError

from .database import Database, whole
from .orgs import MAX_PAGE, page_of
from .records import AuditEntry, Page, check_org, check_plugin, clean
from .schema import audit

__all__ = ["Audit"]

_T = audit.c


class Audit:
    """The audit log of a store. All methods raise ``StoreUnavailableError`` if the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

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
        """Entries, the latest first, from the one that precedes ``before``, with what is given as a filter."""
        limit = max(1, min(limit, MAX_PAGE))
        query = sa.select(audit).order_by(_T.id.desc()).limit(limit + 1)
        if before is not None:
            if not before.isascii() or not before.isdigit() or len(before) > 18:
                raise NotAllowedError("not where a page of the audit log begins")
            query = query.where(_T.id < int(before))
        for column, value in ((_T.org, org), (_T.plugin, plugin), (_T.actor, actor), (_T.action, action)):
            if value is not None:
                query = query.where(column == clean(value, 200))
        async with self._database.read() as connection:
            rows, following = page_of(list((await connection.execute(query)).all()), limit, "id")
        entries = [
            AuditEntry(
                row.id,
                row.at,
                row.actor,
                row.action,
                row.org,
                row.plugin,
                row.outcome,
                msgspec.json.decode(row.details),
            )
            for row in rows
        ]
        return Page(entries, following)
