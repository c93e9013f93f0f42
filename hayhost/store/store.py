"""The store as a whole."""

import asyncio
import secrets
import stat
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from hayhost.errors import StoreError, StoreUnavailableError
from hayhost.logs import get_logger
from hayhost.settings import Settings

from .audit import Audit
from .changes import Feed
from .database import Change, Database, parse_url, whole
from .flows import Flows
from .installations import Installations
from .installs import StoreInstalls
from .keys import Keyring
from .migrating import migrate
from .orgs import Orgs
from .refreshes import Refreshes
from .rotation import KeyUse, prove, rotate, uses
from .tokens import Tokens
from .tools import Tools

__all__ = ["Store", "open_store"]

_FLUSH: Final = 1.0
_FLUSH_USES_EVERY: Final = 30  # flushes
_POLL: Final = 0.5
_EXPIRE_EVERY: Final = 60  # flushes


def open_store(settings: Settings, *, make: bool = True, watch: bool = True) -> "Store":
    """The store that ``settings`` name, to be entered. Without ``make`` it, and its key, have to be there already.

    Raises ``StoreError`` or ``SecretKeyError``.
    """
    url = "hayhost.db" if settings.store == "auto" else settings.store
    where = parse_url(url)
    file = Path(str(where.database)) if where.drivername.startswith("sqlite") else None
    if settings.key_file != "auto":
        key_file = Path(settings.key_file)
    else:
        key_file = file.with_suffix(".key") if file is not None else Path("hayhost.key")
    if file is not None:
        try:
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):
                raise StoreUnavailableError(f"{file}: is not a file")
            make = make and not status.st_size  # a new key would open nothing that is in there
        except FileNotFoundError:
            if not make:
                raise StoreUnavailableError(f"{file}: there is no store here; --store says where it is") from None
        except OSError as error:
            raise StoreUnavailableError(f"{file}: cannot be opened: {error.strerror}") from None
    return Store(url, Keyring.load(key_file, make=make), watch=watch)


class Store:
    """Orgs, installations, tokens, the audit log and OAuth2 flows in one database; an async context manager.

    What a method that changes something returns from is on the disk, together with its entry in the audit log.
    """

    def __init__(self, url: str, keyring: Keyring, *, poll: float = _POLL, watch: bool = True) -> None:
        """With ``watch`` the caches follow what other processes change, on SQLite within ``poll`` seconds.

        Raises ``StoreError`` if ``url`` is not that of a store.
        """
        self._database = Database(url, secrets.token_hex(8))
        self._keyring = keyring
        self.counts: Final = self._database.counts
        self.orgs: Final = Orgs(self._database)
        self.installations: Final = Installations(self._database, keyring)
        self.installs: Final = StoreInstalls(self.installations)
        self.tokens: Final = Tokens(self._database)
        self.tools: Final = Tools(self._database)
        self.audit: Final = Audit(self._database)
        self.flows: Final = Flows(self._database, keyring)
        self.refreshes: Final = Refreshes(self._database, self.installations)
        self._feed = Feed(self._database, self._changed_elsewhere, poll) if watch else None
        self._flusher: asyncio.Task[None] | None = None
        self._database.committed.append(self._changed_here)

    def __repr__(self) -> str:
        return f"Store({self._database.where!r})"

    async def __aenter__(self) -> "Store":
        """Make or migrate the tables, and check the keys.

        Raises ``StoreUnavailableError``, ``StoreVersionError`` or ``SecretKeyError``.
        """
        try:
            await self._database.finish(migrate(self._database))
            await self._database.finish(prove(self._database, self._keyring))
            if self._feed is not None:
                await self._feed.start()
        except BaseException:
            if self._feed is not None:
                await self._feed.stop()
            await self._database.close()
            raise
        self._flusher = asyncio.create_task(self._flush_always())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._flusher is not None:
            self._flusher.cancel()
            await asyncio.wait({self._flusher})
        if self._feed is not None:
            await self._feed.stop()
        await self._attempt(self.flush(), "states, times of use or calls of tools were not stored")
        if self.audit.waiting:
            get_logger().warning("calls of tools are missing in the audit log", calls=self.audit.waiting)
        await self._database.close()

    @whole
    async def ping(self) -> None:
        """Raises ``StoreUnavailableError`` unless the database answers."""
        async with self._database.read() as connection:
            await connection.execute(sa.select(1))

    @whole
    async def keys(self) -> list[KeyUse]:
        """The given keys, the one that encrypts first, and what they are used for."""
        return await uses(self._database, self._keyring)

    async def rotate(self, *, actor: str, progress: Callable[[int], None] = lambda rows: None) -> int:
        """Encrypt everything with the first key, and have the others not needed any more; how many rows were rewritten.

        All hosts must have the new key by then, be it first or not. A host that has an old key first can read no more
        than before, and is refused writes of secrets after this, until it is started with the new key first. It may be
        broken off and begun again. ``progress`` is called with the number of rows that were rewritten since the last
        time. Raises ``SecretKeyError`` if something does not decrypt.
        """
        return await rotate(self._database, self._keyring, actor=actor, progress=progress)

    async def flush(self) -> None:
        """Write states, times of use and calls now. Raises ``StoreUnavailableError``."""
        await self.audit.flush()
        await self.installations.flush()
        await self.tokens.flush()

    async def _attempt(self, work: Awaitable[object], failed: str) -> None:
        try:
            await work
        except StoreError as error:
            get_logger().warning(failed, reason=str(error))

    async def _flush_always(self) -> None:
        rounds = 0
        while True:
            await asyncio.sleep(_FLUSH)
            rounds += 1
            await self._attempt(self.installations.flush(), "states were not stored")
            await self._attempt(self.audit.flush(), "calls of tools were not stored yet")
            if rounds % _FLUSH_USES_EVERY == 0:
                await self._attempt(self.tokens.flush(), "times of use were not stored")
            if rounds % _EXPIRE_EVERY == 0:
                await self._attempt(self.flows.expire(), "expired authorizations were not removed")

    def _changed_here(self, changes: Sequence[Change]) -> None:
        self.installs.changed(changes, elsewhere=False)
        self.tokens.changed(changes)
        self.tools.changed(changes)

    def _changed_elsewhere(self, changes: Sequence[Change] | None) -> None:
        self.installs.changed(changes, elsewhere=True)
        self.tokens.changed(changes)
        self.tools.changed(changes)
