"""Refreshes tokens before they expire, each by one host at a time, whether their org's worker runs or not."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Final

from hayhost.installs import Auth
from hayhost.logs import get_logger
from hayhost.metadata import OAuth2
from hayhost.store import ConflictError, Installed, NotFoundError, Store, StoreError, StoreUnavailableError
from hayhost.store.records import now

from .authorization import Plugins
from .errors import OAuthError
from .provider import Provider, client_of, is_revoked, method_of

__all__ = ["Refresher"]

_AT_ONCE: Final = 64
_AT_ONCE_PER_PLUGIN: Final = 16  # so that a provider that hangs holds up no other
_POLL: Final = 5.0
_GRACE: Final = 10.0
_PAUSES: Final = (0.2, 1.0, 5.0)
_Key = tuple[str, str]


class Refresher:
    """A task that refreshes tokens when they are due; an async context manager.

    ``changed(plugin, org, reason)`` is called once new tokens are in the store, and when the store says something new
    about why there are none: workers that run should be replaced, as then they start with them, or are degraded by it.
    Leaving it waits a little for what is under way.
    """

    def __init__(
        self,
        store: Store,
        provider: Provider,
        plugins: Plugins,
        changed: Callable[[str, str, str], None],
        *,
        poll: float = _POLL,
    ) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """How many refreshes of which plugin ended how: ``ok``, ``failed`` or ``revoked``."""
        self._store = store
        self._provider = provider
        self._plugins = plugins
        self._changed = changed
        self._poll = poll
        self._running: dict[_Key, asyncio.Task[None]] = {}
        self._ended = asyncio.Event()
        self._stopping = False
        self._loop: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Refresher":
        self._loop = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait({self._loop})
        running = set(self._running.values())
        if running:
            late = (await asyncio.wait(running, timeout=_GRACE))[1]
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def refresh(self, plugin: str, org: str) -> None:
        """Refresh the token of an installation now if it is due, and wait for that; else do nothing.

        If another host is at it, that is not waited for. Raises ``StoreError``.
        """
        key = plugin, org
        task = self._running.get(key)
        if task is None and not self._stopping:
            task = self._start(key, self._claim(key))
        if task is not None:
            await asyncio.shield(task)

    async def _claim(self, key: _Key) -> None:
        for installed in await self._store.refreshes.claim(key[0], 1, key[1]):
            await self._attempt(installed)

    def _start(self, key: _Key, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._running[key] = asyncio.create_task(work)

        def ended(_: asyncio.Task[None]) -> None:
            if self._running.get(key) is task:
                del self._running[key]
            self._ended.set()
            if not task.cancelled() and (error := task.exception()) is not None:
                reason = str(error) if isinstance(error, StoreError) else type(error).__name__
                get_logger().error("a token was not refreshed", plugin=key[0], org=key[1], reason=reason)

        task.add_done_callback(ended)
        return task

    async def _run(self) -> None:
        failing = ""
        while not self._stopping:
            self._ended.clear()
            try:
                pause = await self._round()
                failing = ""
            except StoreError as error:
                if failing != (failing := str(error)):
                    get_logger().warning("tokens are not refreshed now", reason=failing)
                pause = self._poll
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):  # wait_for may swallow that it is cancelled
                    await self._ended.wait()

    async def _round(self) -> float:
        """Begin what is due, as far as there is room; in how many seconds to look again, unless something ends."""
        plugins = [
            name
            for name, described in self._plugins().items()
            if any(isinstance(method, OAuth2) for method in described.metadata.auth_methods)
        ]
        pause = self._poll
        due = await self._store.refreshes.next(plugins)
        busy = Counter(plugin for plugin, _ in self._running)
        for plugin in sorted(due, key=lambda name: busy[name]):
            wait = (due[plugin] - now()).total_seconds()
            room = min(_AT_ONCE_PER_PLUGIN - busy[plugin], _AT_ONCE - len(self._running))
            if wait > 0:
                pause = min(pause, wait)
            elif room > 0:
                before = set(self._running)
                for installed in await self._store.refreshes.claim(plugin, room):
                    key = plugin, installed.org_id
                    if key not in before and key not in self._running:  # else its claim ran out while it is under way
                        self._start(key, self._attempt(installed))
        return pause

    async def _attempt(self, installed: Installed) -> None:
        """Refresh what was claimed, and keep what came of it."""
        plugin, auth = installed.plugin, installed.auth
        assert auth is not None  # what has none is never due
        described = self._plugins().get(plugin)
        if described is None or any(
            method.id == auth.method_id and not isinstance(method, OAuth2) for method in described.metadata.auth_methods
        ):
            return  # the plugin is away, or these only look like tokens
        try:
            method = method_of(described, plugin, auth.method_id)
            credentials = await self._provider.refresh(
                method, client_of(installed, method, described), auth.credentials
            )
        except OAuthError as error:
            await self._failed(installed, error)
        else:
            await self._keep(installed, Auth(auth.method_id, credentials))

    async def _failed(self, installed: Installed, error: OAuthError) -> None:
        revoked = is_revoked(error)
        self.outcomes[installed.plugin, "revoked" if revoked else "failed"] += 1
        reason = f"the OAuth2 token could not be refreshed: {error.message}"
        if await self._store.refreshes.failed(installed, reason, revoked=revoked):
            get_logger().warning(
                "a token was not refreshed",
                plugin=installed.plugin,
                org=installed.org_id,
                reason=error.message,
                revoked=revoked,
            )
            self._changed(installed.plugin, installed.org_id, reason)

    async def _keep(self, installed: Installed, auth: Auth) -> None:
        """Put new tokens in the store; the old ones may be worth nothing any more, so this does not give up easily."""
        plugin, org, attempt = installed.plugin, installed.org_id, 0
        current, stale = installed, False
        while True:
            try:
                if stale:
                    current, stale = await self._store.installations.get(plugin, org), False
                    if current.auth == auth:
                        break
                    if current.auth != installed.auth:
                        return  # somebody gave others meanwhile
                await self._store.installations.put(
                    plugin,
                    org,
                    if_revision=current.revision,
                    actor="host",
                    auth=auth,
                    auth_validity="unknown" if current.auth_validity == "invalid" else current.auth_validity,
                )
                break
            except ConflictError:
                stale = True
            except NotFoundError:
                return
            except StoreUnavailableError as error:  # it may have been done all the same
                stale = True
                if attempt == 0:
                    get_logger().error("new tokens cannot be stored yet", plugin=plugin, org=org, reason=str(error))
                await asyncio.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
                attempt += 1
        self.outcomes[plugin, "ok"] += 1
        get_logger().debug("token refreshed", plugin=plugin, org=org)
        self._changed(plugin, org, "its OAuth2 token was refreshed")
