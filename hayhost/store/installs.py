"""Installations on the way of a request: looked up without waiting, once they were loaded."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from hayhost.errors import ConflictError
from hayhost.installs import Change, Installation, NotLoadedError
from hayhost.names import ORG_ID, PLUGIN_NAME

from . import database
from .installations import Installations

__all__ = ["StoreInstalls"]

_MOST: Final = 10_000
_MOST_BYTES: Final = 64 << 20
_ATTEMPTS: Final = 3

_Key = tuple[str, str]


class StoreInstalls:
    """``hayhost.installs.Installs`` on a store.

    It remembers the installations that were asked for last, decrypted, and which there are not; both are bounded. It
    forgets what is changed, here at once and elsewhere as soon as word of it comes.
    """

    def __init__(self, installations: Installations, most: int = _MOST, most_bytes: int = _MOST_BYTES) -> None:
        self._installations = installations
        self._most = most
        self._most_bytes = most_bytes
        self._found: OrderedDict[_Key, tuple[Installation, int]] = OrderedDict()
        self._absent: OrderedDict[_Key, None] = OrderedDict()
        self._loading: dict[_Key, asyncio.Task[Installation | None]] = {}
        self._bytes = 0
        self.changed_elsewhere: Callable[[str | None, str | None], None] | None = None
        """Called with the plugin and org that another process changed; ``None`` stands for all."""

    def find(self, plugin: str, org: str) -> Installation | None:
        """The installation, ``None`` if there is none. Raises ``NotLoadedError`` if the database has to be asked."""
        key = plugin, org
        if (entry := self._found.get(key)) is not None:
            self._found.move_to_end(key)
            return entry[0]
        if key in self._absent or not ORG_ID.fullmatch(org) or not PLUGIN_NAME.fullmatch(plugin):
            return None
        raise NotLoadedError(plugin, org)

    async def load(self, plugin: str, org: str) -> Installation | None:
        """As ``find``, but it waits for the database; many at once look there only once.

        Raises ``StoreUnavailableError``, or ``SecretKeyError`` if it does not decrypt.
        """
        key = plugin, org
        for _ in range(_ATTEMPTS):
            try:
                return self.find(plugin, org)
            except NotLoadedError:
                pass
            task = self._loading.get(key)
            if task is None:
                task = self._loading[key] = asyncio.create_task(self._load(key))
                task.add_done_callback(self._loaded)
            found = await asyncio.shield(task)
            if key in self._found or key in self._absent:
                return found
        return found  # it is changed all the time, or too large to be kept

    async def _load(self, key: _Key) -> Installation | None:
        task = asyncio.current_task()
        try:
            record = await self._installations.find(*key)
            found = None if record is None else record.installation()
            if self._loading.get(key) is task:  # else it was changed after it was read
                self._keep(key, found)
            return found
        finally:
            if self._loading.get(key) is task:
                del self._loading[key]

    def _loaded(self, task: asyncio.Task[Installation | None]) -> None:
        if not task.cancelled():
            task.exception()  # those who wait raise it, if there are any left

    def _keep(self, key: _Key, found: Installation | None) -> None:
        if found is None:
            self._absent[key] = None
            if len(self._absent) > self._most:
                self._absent.popitem(last=False)
            return
        size = len(msgspec.json.encode([found.config, found.auth and found.auth.credentials]))
        if size > self._most_bytes:
            return
        self._found[key] = found, size
        self._bytes += size
        while len(self._found) > self._most or self._bytes > self._most_bytes:
            _, (_, freed) = self._found.popitem(last=False)
            self._bytes -= freed

    def forget(self, plugin: str | None = None, org: str | None = None) -> None:
        """Look at the database again for this one, for those of an org, or for all."""
        if plugin is not None and org is not None:
            keys = {(plugin, org)}
        else:
            known = (*self._found, *self._absent, *self._loading)
            keys = {key for key in known if org is None or key[1] == org}
        for key in keys:
            self._absent.pop(key, None)
            self._loading.pop(key, None)
            if (entry := self._found.pop(key, None)) is not None:
                self._bytes -= entry[1]

    def changed(self, changes: Sequence[database.Change] | None, *, elsewhere: bool) -> None:
        """Forget what may not be so any more."""
        for change in (database.Change("", None, None),) if changes is None else changes:
            if changes is not None and not change.action.startswith(("install.", "org.")):
                continue
            self.forget(change.plugin, change.org)
            if elsewhere and self.changed_elsewhere is not None:
                self.changed_elsewhere(change.plugin, change.org)

    async def put(
        self, plugin: str, org: str, change: Change, *, actor: str, if_revision: int | None = None
    ) -> Installation:
        """See ``Installations.put``."""
        try:
            kept = await self._installations.put(
                plugin,
                org,
                if_revision=if_revision,
                actor=actor,
                config=change.config,
                sensitive=change.sensitive,
                auth=change.auth,
                auth_validity=change.auth_validity,
                enabled=change.enabled,
                new_org=change.new_org,
            )
        except ConflictError:
            self.forget(plugin, org)  # word of it has not come yet
            raise
        return kept.installation()

    async def remove(self, plugin: str, org: str, *, actor: str, if_revision: int | None = None) -> None:
        """See ``Installations.delete``."""
        try:
            await self._installations.delete(plugin, org, actor=actor, if_revision=if_revision)
        except ConflictError:
            self.forget(plugin, org)
            raise

    def note(self, plugin: str, org: str, state: str, error: str) -> None:
        """See ``Installations.set_state``."""
        self._installations.set_state(plugin, org, state, error)
