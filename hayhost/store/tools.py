"""Which tools the orgs' MCP clients may use."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import msgspec
import sqlalchemy as sa

from hayhost.errors import ConflictError, NotAllowedError, NotFoundError
from hayhost.installs import ToolLists

from .database import Change, Database, whole
from .records import check_org
from .schema import orgs

__all__ = ["Tools"]

_MOST: Final = 10_000


class Tools:
    """The orgs' lists of tools. It remembers those that were asked for last, and forgets what is changed, here at once
    and elsewhere as soon as word of it comes. All methods raise ``StoreUnavailableError`` if the database cannot be
    used."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: OrderedDict[str, asyncio.Future[ToolLists]] = OrderedDict()

    def known(self, org: str) -> ToolLists | None:
        """As ``tool_lists``, if that needs no waiting; else ``None``."""
        reading = self._known.get(org)
        return reading.result() if reading is not None and reading.done() and not reading.exception() else None

    async def tool_lists(self, org: str) -> ToolLists:
        """As ``get``, from memory if it was asked for before; every tool may be used if there is no such org."""
        reading = self._known.get(org)
        if reading is None:
            reading = self._known[org] = asyncio.ensure_future(self._read(org))
            reading.add_done_callback(lambda done: self._was_read(org, done))
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
        self._known.move_to_end(org)
        return await asyncio.shield(reading)

    async def get(self, org: str) -> ToolLists:
        """The lists of an org. Raises ``NotFoundError``."""
        if (found := await self._find(check_org(org))) is None:
            raise NotFoundError(f"there is no org {org}")
        return found

    @whole
    async def put(self, org: str, lists: ToolLists, *, actor: str, if_lists: ToolLists | None = None) -> None:
        """Change the lists of an org, if they are ``if_lists`` where that is given.

        Raises ``NotFoundError``, ``ConflictError``, or ``NotAllowedError`` for an entry that can be none.
        """
        try:
            msgspec.convert(given := msgspec.to_builtins(lists), ToolLists)
        except msgspec.ValidationError as error:
            raise NotAllowedError(f"not a list of tools: {error}") from None
        async with self._database.write() as transaction:
            change = sa.update(orgs).where(orgs.c.id == check_org(org)).values(tools=_encoded(lists))
            if if_lists is not None:
                change = change.where(orgs.c.tools == _encoded(if_lists))
            if not (await transaction.execute(change)).rowcount:
                if (await transaction.execute(sa.select(orgs.c.id).where(orgs.c.id == org))).first() is not None:
                    raise ConflictError(f"the tools of {org} were changed by somebody else meanwhile", 0)
                raise NotFoundError(f"there is no org {org}")
            await transaction.record(actor, "tools.put", org, details=given)

    def changed(self, changes: Sequence[Change] | None) -> None:
        """Forget what may not be so any more."""
        if changes is None:
            self._known.clear()
            return
        for change in changes:
            if change.org is not None and change.action.startswith(("tools.", "org.")):
                self._known.pop(change.org, None)

    async def _read(self, org: str) -> ToolLists:
        return await self._find(org) or ToolLists()

    def _was_read(self, org: str, reading: asyncio.Future[ToolLists]) -> None:
        if (reading.cancelled() or reading.exception() is not None) and self._known.get(org) is reading:
            del self._known[org]

    @whole
    async def _find(self, org: str) -> ToolLists | None:
        async with self._database.read() as connection:
            row = (await connection.execute(sa.select(orgs.c.tools).where(orgs.c.id == org))).first()
        return None if row is None else msgspec.json.decode(row.tools, type=ToolLists)


def _encoded(lists: ToolLists) -> str:
    """As it is stored: the same lists are the same text."""
    return msgspec.json.encode(lists).decode()
