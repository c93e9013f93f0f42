"""What changes an org's plugin on purpose: installed, settings changed, credentials checked, disabled, uninstalled."""

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from .catalog import Plugin
from .configs import MAX_CONFIG, check_auth, check_config, sensitive_fields
from .errors import ConflictError, InvalidError, NotFoundError, RequestError, StoreError
from .installs import Auth, Change, Installation, Installs, conflict, not_installed
from .logs import get_logger
from .pool import Pool
from .slot import Slot
from .worker import Worker

if TYPE_CHECKING:
    from .store import Store

__all__ = ["Management", "Outcome", "remove_org"]

# Somebody else, on another host, may change the same installation at the same time, so often.
_ATTEMPTS: Final = 5
# Seconds after which a store that could not be read is asked again what others have changed.
_AGAIN: Final = 0.5


class Outcome(msgspec.Struct, frozen=True):
    """An installation after a change. ``hooks`` says why a lifecycle hook failed, by its name."""

    installation: Installation
    created: bool
    hooks: dict[str, str]


class Management:
    """Makes changes to installations: each is checked, kept, told to the plugin, and served from then on.

    What goes wrong after a change is kept is logged and in the outcome; the change stands.
    """

    def __init__(self, pool: Pool, *, trusting: bool = False) -> None:
        """With ``trusting`` settings are not compared with the plugin's schema: whoever keeps them has done so."""
        self.pool: Final = pool
        self._trusting = trusting
        self.changed: Callable[[str, str], None] = lambda plugin, org: None
        """Called with the plugin and org whenever one was changed."""

    @property
    def installs(self) -> Installs:
        """Where installations are kept."""
        return self.pool.installs

    async def put(
        self,
        plugin: Plugin,
        org: str,
        change: Change,
        *,
        actor: str,
        if_revision: int | None = None,
        patch: bool = False,
        installed: bool = False,
    ) -> Outcome:
        """Install, or change. With ``patch`` the fields of its config are merged into the stored ones, null removes.
        With ``installed`` it must be there, and enabled, or ``NotFoundError`` is raised.

        Raises ``InvalidError`` naming every wrong field, ``ConflictError`` if the installation is not of
        ``if_revision`` (0: not there), ``UnavailableError`` if the plugin is not loaded, ``RequestError`` with
        status 413 if no worker could be given the settings, ``StoreError`` if nothing can be kept. Nothing is
        changed then.
        """
        before = await self._before(plugin, org, if_revision, installed)
        wanted = await self._checked(plugin, change, before, patch)
        asked, valid = wanted.auth, False
        if isinstance(asked, Auth):
            config = wanted.config if wanted.config is not UNSET else before.config if before else {}
            valid = await self._ask(plugin, before or Installation(org, org), asked, config)
        attempts = _ATTEMPTS
        async with self._slot(plugin, org) as slot:
            while True:
                attempts -= 1
                before = await self._before(plugin, org, if_revision, installed)
                # What is to stay as it is may have been changed while the plugin was asked.
                wanted = await self._checked(plugin, change, before, patch)
                if isinstance(asked, Auth) and wanted.auth == asked:
                    wanted = msgspec.structs.replace(wanted, auth_validity="valid" if valid else "invalid")
                try:
                    after = await self.installs.put(
                        plugin.name, org, wanted, actor=actor, if_revision=before.revision if before else 0
                    )
                    break
                except ConflictError:
                    if if_revision is not None or not attempts:
                        raise
            return await self._follow(slot, change, before, after)

    async def _before(self, plugin: Plugin, org: str, if_revision: int | None, installed: bool) -> Installation | None:
        before = await self.installs.load(plugin.name, org)
        if installed and (before is None or not before.enabled):
            raise not_installed(plugin.name, org)
        current = before.revision if before is not None else 0
        if if_revision is not None and if_revision != current:
            raise conflict(plugin.name, org, current)
        return before

    async def _follow(self, slot: Slot, change: Change, before: Installation | None, after: Installation) -> Outcome:
        """Do what follows from a change that is kept; the slot's lock is held."""
        hooks: dict[str, str] = {}
        created = before is None or before.revision == 0
        if not after.enabled:
            if before is not None and before.enabled:
                hooks = await self._end(slot, before)
        else:
            if before is None or not before.enabled or (created and not self._trusting):
                hooks |= await self._tell(slot, "on_enable", after)
            if change.config is not UNSET:
                hooks |= await self._tell(slot, "on_config_update", after)
            slot.forgive()
            if not await slot.replace_locked("new settings"):
                hooks["on_start"] = slot.last_error
        self.changed(slot.plugin.name, slot.org_id)
        return Outcome(after, created, hooks)

    async def remove(self, plugin: Plugin, org: str, *, actor: str, if_revision: int | None = None) -> dict[str, str]:
        """Uninstall; which hooks failed. Raises as ``put``, and ``NotFoundError``."""
        async with self._slot(plugin, org) as slot:
            before = await self.installs.load(plugin.name, org)
            if before is None:
                raise not_installed(plugin.name, org)
            await self.installs.remove(plugin.name, org, actor=actor, if_revision=if_revision)
            hooks = await self._end(slot, before) if before.enabled else {}
            self.changed(plugin.name, org)
            return hooks

    async def validate(self, plugin: Plugin, org: str, config: Mapping[str, Any] | None, auth: Auth | None) -> bool:
        """Whether the plugin would accept ``auth`` (or else what is stored) with ``config``; nothing is kept.

        Raises ``InvalidError`` naming every wrong field, and ``NotFoundError`` if the plugin is not installed.
        """
        before = await self.installs.load(plugin.name, org)
        if before is None:
            raise not_installed(plugin.name, org)
        given = Change(UNSET if config is None else config, auth=auth or UNSET)
        wanted = await self._checked(plugin, given, before, False)
        candidate = wanted.auth if isinstance(wanted.auth, Auth) else before.auth
        if candidate is None:
            return True
        return await self._ask(plugin, before, candidate, wanted.config if wanted.config is not UNSET else {})

    async def validate_auth(self, plugin: Plugin, org: str, auth: Auth, config: Mapping[str, Any] | None) -> bool:
        """Whether the plugin accepts ``auth``, whatever its schema says. Raises ``NotFoundError``."""
        await plugin.ready_version()
        before = await self.installs.load(plugin.name, org)
        if before is None:
            raise not_installed(plugin.name, org)
        return await self._ask(plugin, before, auth, config or {})

    async def restart(self, plugin: Plugin, org: str) -> bool:
        """Swap in a new worker, if there is one; whether it started."""
        async with self._slot(plugin, org) as slot:
            slot.forgive()
            self.pool.told(slot)
            return await slot.replace_locked("a restart was asked for")

    def changed_elsewhere(self, plugin: str | None, org: str | None) -> None:
        """Another process changed this installation, those of an org, or anything: have workers follow."""
        for slot in list(self.pool.slots.values()):
            if slot.worker is not None and org in (None, slot.org_id) and plugin in (None, slot.plugin.name):
                self.pool.spawn(self._follow_elsewhere(slot))

    async def _follow_elsewhere(self, slot: Slot) -> None:
        async with self._slot(slot.plugin, slot.org_id) as slot:
            try:
                installation = await self.installs.load(slot.plugin.name, slot.org_id)
            except StoreError:  # its settings are looked at when they can be
                self.pool.loop.call_later(_AGAIN, self.changed_elsewhere, slot.plugin.name, slot.org_id)
                return
            if installation is None or not installation.enabled:
                # Whoever disabled it ran `on_disable`.
                if (worker := slot.release()) is not None:
                    await self.pool.retire(worker)
            elif slot.worker is not None and _differs(slot.worker.installation, installation):
                await slot.replace_locked("its settings were changed elsewhere")
        self.changed(slot.plugin.name, slot.org_id)

    @contextlib.asynccontextmanager
    async def _slot(self, plugin: Plugin, org: str) -> AsyncIterator[Slot]:
        slot = self.pool.slot(plugin, org)
        slot.users += 1
        try:
            async with slot.lock:
                yield slot
        finally:
            slot.users -= 1
            if slot.queue:
                slot.ensure_starting()  # which tells those who wait if there is nothing to wait for
            self.pool.forget(slot)

    async def check(self, plugin: Plugin, org: str, change: Change) -> None:
        """Raises ``InvalidError`` and the like if ``put`` would refuse ``change``; it asks no hook."""
        await self._checked(plugin, change, await self.installs.load(plugin.name, org), False)

    async def _checked(self, plugin: Plugin, change: Change, before: Installation | None, patch: bool) -> Change:
        """``change`` as it is to be kept. Raises ``InvalidError`` naming every wrong field."""
        config, auth = change.config, change.auth
        if before is not None and config is UNSET and not isinstance(auth, Auth):
            return change  # for which the plugin need not even load
        _check_size(config, auth)
        if self._trusting:
            return change
        version = await plugin.ready_version()
        problems: dict[str, str] = {}
        if config is UNSET and before is None:
            config = {}
        if config is not UNSET:
            if patch and before is not None:
                config = {**before.config, **config}
            try:
                config = check_config(version, config, before)
            except InvalidError as error:
                problems |= error.fields
        if isinstance(auth, Auth):
            try:
                auth = check_auth(version, auth, before)
            except InvalidError as error:
                problems |= error.fields
        if problems:
            raise InvalidError(problems)
        _check_size(config, auth)  # with what was stored, it may be more than was given
        sensitive = sensitive_fields(version.metadata)
        return msgspec.structs.replace(change, config=config, sensitive=sensitive, auth=auth)

    async def _ask(self, plugin: Plugin, installation: Installation, auth: Auth, config: Mapping[str, Any]) -> bool:
        """Ask ``on_validate_auth`` in a throwaway worker: a hang or crash there touches nothing else.

        The hook sees the stored config, overlaid with ``config``, overlaid with the credentials. Without the hook every
        credential is valid; a hook that raises, hangs or dies says no.
        """
        if "on_validate_auth" not in (await plugin.ready_version()).hooks:
            return True
        merged = {**installation.config, **config, **auth.credentials}
        candidate = msgspec.structs.replace(installation, config=merged, auth=auth)
        slot = Slot(self.pool, plugin, installation.org_id)
        try:
            async with _throwaway(slot, candidate) as worker:
                done = await worker.hook("on_validate_auth", merged, auth, self.pool.settings.hook_timeout)
        except RequestError as error:
            get_logger().error(
                "credentials could not be checked",
                plugin=plugin.name,
                org=installation.org_id,
                reason=error.message,
            )
            return False
        return done.value and not done.error

    async def _tell(self, slot: Slot, hook: str, installation: Installation) -> dict[str, str]:
        """Run a hook, in the serving worker if there is one; why it failed."""
        try:
            if hook not in (await slot.plugin.ready_version()).hooks:
                return {}
            async with contextlib.AsyncExitStack() as stack:
                worker = slot.worker
                if worker is None:
                    worker = await stack.enter_async_context(_throwaway(slot, installation))
                done = await worker.hook(hook, installation.config, installation.auth, self.pool.settings.hook_timeout)
            return {hook: done.error} if done.error else {}
        except RequestError as error:
            get_logger().error(f"{hook} failed", plugin=slot.plugin.name, org=slot.org_id, reason=error.message)
            return {hook: error.message}

    async def _end(self, slot: Slot, installation: Installation) -> dict[str, str]:
        """Run ``on_disable`` once, and stop the worker; why the hook did not run."""
        problem: dict[str, str] = {}
        worker = slot.release()
        if worker is None:
            try:
                if "on_disable" in (await slot.plugin.ready_version()).hooks:
                    worker = await slot.launch(installation)
            except RequestError as error:
                problem = {"on_disable": error.message}
                get_logger().error(
                    "on_disable could not run", plugin=slot.plugin.name, org=slot.org_id, reason=error.message
                )
        if worker is not None:
            await self.pool.retire(worker, "on_disable")
        slot.last_error = ""
        return problem


async def remove_org(
    store: "Store", management: Management, plugins: Mapping[str, Plugin], org: str, *, actor: str
) -> dict[str, dict[str, str]]:
    """Uninstall what an org has, and remove it; which hooks failed, by plugin.

    What is not among ``plugins`` is removed without being told. Raises ``NotFoundError``.
    """
    await store.orgs.get(org)
    failed: dict[str, dict[str, str]] = {}
    after: str | None = ""
    while after is not None:
        page = await store.installations.of_org(org, after)
        for installed in page.items:
            if (plugin := plugins.get(installed.plugin)) is not None:
                with contextlib.suppress(NotFoundError):
                    if hooks := await management.remove(plugin, org, actor=actor):
                        failed[plugin.name] = hooks
        after = page.next
    await store.orgs.delete(org, actor=actor)
    return failed


def _differs(old: Installation | None, new: Installation) -> bool:
    """Whether a worker would notice."""
    if old is None:
        return True
    return (old.org_name, old.config, old.auth, old.problem) != (new.org_name, new.config, new.auth, new.problem)


def _check_size(config: Mapping[str, Any] | UnsetType, auth: Auth | UnsetType | None) -> None:
    parts = (config, auth.credentials if isinstance(auth, Auth) else UNSET)
    if any(part is not UNSET and len(msgspec.json.encode(part)) > MAX_CONFIG for part in parts):
        raise RequestError(f"Config and credentials may have {MAX_CONFIG} bytes at most, each", status=413)


@contextlib.asynccontextmanager
async def _throwaway(slot: Slot, installation: Installation) -> AsyncIterator[Worker]:
    worker = await slot.launch(installation, serve=False)
    try:
        yield worker
    finally:
        worker.kill()
