"""Orgs."""

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from hayhost.errors import ConflictError, ExistsError, NotFoundError

from .database import Database, Transaction, whole
from .records import Org, Page, check_name, check_org, clean, now
from .schema import orgs

__all__ = ["MAX_PAGE", "Orgs", "ensure_org", "page_of"]

MAX_PAGE: Final = 1_000


def page_of(rows: list[Any], limit: int, key: str) -> tuple[list[Any], str | None]:
    """The rows of a page, of which one more than ``limit`` was asked for, and where the next one begins."""
    return rows[:limit], str(getattr(rows[limit - 1], key)) if len(rows) > limit else None


async def ensure_org(transaction: Transaction, org: str, actor: str) -> None:
    """Make the org, called by its id, if there is none."""
    if (await transaction.execute(sa.select(orgs.c.id).where(orgs.c.id == org))).first() is not None:
        return
    insert = postgresql.insert if transaction.connection.dialect.name == "postgresql" else sqlite.insert
    made = insert(orgs).values(id=check_org(org), name=org, created=now()).on_conflict_do_nothing()
    if (await transaction.execute(made)).rowcount:
        await transaction.record(actor, "org.create", org)


class Orgs:
    """The orgs of a store. All methods raise ``StoreUnavailableError`` if the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @whole
    async def create(self, org: str, name: str | None = None, *, actor: str) -> Org:
        """Add an org. Raises ``ExistsError``, or ``NotAllowedError`` for a malformed id or name."""
        made = Org(check_org(org), check_name(name or org), now())
        async with self._database.write() as transaction:
            try:
                await transaction.execute(sa.insert(orgs), {"id": made.id, "name": made.name, "created": made.created})
            except IntegrityError:
                raise ExistsError(f"there is an org {org} already") from None
            await transaction.record(actor, "org.create", org)
        return made

    @whole
    async def get(self, org: str) -> Org:
        """The org. Raises ``NotFoundError``."""
        async with self._database.read() as connection:
            row = (await connection.execute(sa.select(orgs).where(orgs.c.id == check_org(org)))).first()
        if row is None:
            raise NotFoundError(f"there is no org {org}")
        return Org(row.id, row.name, row.created)

    @whole
    async def list(self, after: str = "", limit: int = 100) -> Page[Org]:
        """Orgs by id, from the one that follows ``after``; at most ``limit`` of them, and 1,000."""
        limit = max(1, min(limit, MAX_PAGE))
        query = sa.select(orgs).where(orgs.c.id > clean(after, 200)).order_by(orgs.c.id).limit(limit + 1)
        async with self._database.read() as connection:
            rows, following = page_of(list((await connection.execute(query)).all()), limit, "id")
        return Page([Org(row.id, row.name, row.created) for row in rows], following)

    @whole
    async def rename(self, org: str, name: str, *, actor: str, if_name: str | None = None) -> Org:
        """Change an org's name, if that is ``if_name`` where it is given; its id stays.

        Raises ``NotFoundError``, ``ConflictError`` or ``NotAllowedError``.
        """
        check_org(org), check_name(name)
        async with self._database.write() as transaction:
            change = sa.update(orgs).where(orgs.c.id == org).values(name=name).returning(orgs.c.created)
            if if_name is not None:
                change = change.where(orgs.c.name == if_name)
            row = (await transaction.execute(change)).first()
            if row is None:
                if (await transaction.execute(sa.select(orgs.c.id).where(orgs.c.id == org))).first() is not None:
                    raise ConflictError(f"{org} was changed by somebody else meanwhile", 0)
                raise NotFoundError(f"there is no org {org}")
            await transaction.record(actor, "org.rename", org)
        return Org(org, name, row.created)

    @whole
    async def delete(self, org: str, *, actor: str) -> None:
        """Remove an org with its installations, tokens and flows; the audit log stays. Raises ``NotFoundError``."""
        async with self._database.write() as transaction:
            if not (await transaction.execute(sa.delete(orgs).where(orgs.c.id == check_org(org)))).rowcount:
                raise NotFoundError(f"there is no org {org}")
            await transaction.record(actor, "org.delete", org)
