"""What is wrong with a host now: each thing with why, since when, and what to do about it."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from sandbox.confinement import Level

from .answers import Principal
from .catalog import Plugin, PluginState
from .doctor import REMEDIES
from .errors import StoreError
from .pool import Pool
from .slot import Slot
from .states import WorkerState

if TYPE_CHECKING:
    from .store import Installed, Store

__all__ = ["Problem", "Problems", "Severity"]

Severity = Literal["error", "warning", "notice"]

_ORDER: Final = ("error", "warning", "notice")
# The same thing may be wrong with thousands of orgs: it is one problem, with so many of them as examples.
_EXAMPLES: Final = 10
_MOST: Final = 200
# The database is asked this often, in seconds, however many look.
_FRESH: Final = 1.0


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong. ``since`` is in seconds since the epoch, if that is known.

    It concerns ``count`` of a plugin's orgs, some of which are ``orgs``; a plugin or the whole host, if that is 0.
    """

    kind: str
    severity: Severity
    title: str
    why: str
    remedy: str
    since: float | None = None
    plugin: str | None = None
    orgs: tuple[str, ...] = ()
    count: int = 0


class Problems:
    """Looks for what is wrong, in what the host knows and in its store."""

    def __init__(
        self,
        pool: Pool,
        plugins: Mapping[str, Plugin],
        unserved: Mapping[Path, list[str]],
        store: "Store | None" = None,
    ) -> None:
        self._pool = pool
        self._plugins = plugins
        self._unserved = unserved
        self._store = store
        self._asked: dict[str | None, tuple[float, list[Problem]]] = {}

    async def find(self, principal: Principal) -> list[Problem]:
        """What is wrong as far as it concerns ``principal``, the worst first and at most ``_MOST``."""
        found = [*self._of_slots(principal), *self._of_plugins(principal), *await self._of_store(principal)]
        if principal.org_id is None:
            found += [*self._of_folders(), *self._of_host()]
        return sorted(_together(found), key=lambda one: (_ORDER.index(one.severity), -(one.since or 0)))[:_MOST]

    def _of_host(self) -> Iterator[Problem]:
        isolation = self._pool.isolation
        if missing := isolation.missing:
            why = "\n".join(f"{layer}: {problem}" for layer, problem in missing.items())
            remedies = [REMEDIES[layer] for layer in missing if layer in REMEDIES]
            yield Problem(
                "isolation",
                "notice" if isolation.level >= Level.CONFINED else "error",
                f"Plugins are isolated at the level {isolation.level.label}, below what was asked for",
                why,
                "; or ".join(dict.fromkeys(remedies)) or "run `hayhost doctor`",
            )
        if waiting := self._pool.waiting_for_room:
            yield Problem(
                "room",
                "error",
                f"No worker can be started: all {self._pool.settings.max_workers} are in use",
                f"{waiting} starts wait until a worker is idle",
                "Raise max_workers if the machine has memory for it, or spread the orgs over more hosts",
            )

    def _of_folders(self) -> Iterator[Problem]:
        for folder, reasons in self._unserved.items():
            if not any(plugin.manifest.folder == folder.resolve() for plugin in self._plugins.values()):
                title = f"The plugin in {folder.name} is not served"
                yield Problem("manifest", "error", title, "\n".join(reasons), "Correct its manifest, and save it")

    def _of_plugins(self, principal: Principal) -> Iterator[Problem]:
        for plugin in self._plugins.values():
            if not plugin.error:
                continue
            since = next((record.at for record in reversed(plugin.history) if record.error), None)
            why = plugin.error if principal.org_id is None else plugin.error.partition("\n")[0]
            if plugin.state is PluginState.ERROR:
                title, remedy = "The plugin does not load", "Correct it, and save it: it is loaded again at once"
                yield Problem("plugin", "error", title, why, remedy, since, plugin.name)
            elif principal.org_id is None:
                title = "What is on the disk does not load; the version before it serves on"
                remedy = "Correct the plugin, and save it: it is loaded again at once"
                yield Problem("reload", "warning", title, why, remedy, since, plugin.name)

    def _of_slots(self, principal: Principal) -> Iterator[Problem]:
        now = self._pool.loop.time()
        for slot in self._pool.slots.values():
            if principal.may(slot.org_id) and (found := _of_slot(slot, now)) is not None:
                yield found

    async def _of_store(self, principal: Principal) -> list[Problem]:
        if self._store is None:
            return []
        now, org = self._pool.loop.time(), principal.org_id
        asked, known = self._asked.get(org, (0.0, []))
        if now - asked < _FRESH and asked:
            return known
        self._asked = {key: one for key, one in self._asked.items() if now - one[0] < _FRESH}
        try:
            found = [_of_installation(one) for one in await self._store.installations.troubled(org)]
        except StoreError as error:
            why = str(error) if org is None else "The database cannot be reached"
            remedy = "See that the database runs and can be reached; what is cached is served on meanwhile"
            found = [Problem("store", "error", "The store cannot be used", why, remedy)]
        self._asked[org] = (now, found)
        return found


def _of_slot(slot: Slot, now: float) -> Problem | None:
    def problem(kind: str, severity: Severity, title: str, why: str, remedy: str, since: float | None) -> Problem:
        return Problem(kind, severity, title, why, remedy, since, slot.plugin.name, (slot.org_id,), 1)

    worker = slot.worker
    restart = "Read its log; correct the plugin or the org's settings, which starts it anew, or restart it"
    if worker is None:
        if not slot.is_down:
            return None
        why = slot.last_error or slot.breaker.reason
        if slot.breaker.is_open:
            title = "The worker does not start: its requests are refused, but for a trial now and then"
            return problem("breaker", "error", title, why, restart, slot.down_since)
        return problem("worker", "error", "The worker is down", why, restart, slot.down_since)
    if slot.breaker.reason:
        title = "The worker was not replaced: what it serves is not as it was last set"
        return problem("replace", "warning", title, slot.breaker.reason, restart, slot.down_since)
    if worker.lifecycle.state is WorkerState.DEGRADED:
        title = "The worker serves, but degraded"
        return problem("degraded", "warning", title, worker.lifecycle.why, restart, worker.lifecycle.since)
    if crashes := slot.backoff.recent(now):
        title = "The worker died, and was started anew"
        why = slot.last_error if crashes == 1 else f"{crashes} times within a minute; the last time: {slot.last_error}"
        return problem("crash", "warning", title, why, "Read its log", slot.down_since)
    return None


def _of_installation(installed: "Installed") -> Problem:
    since, orgs = installed.updated.timestamp(), (installed.org_id,)
    if installed.auth_error and installed.auth_validity != "invalid":
        title, why = "The OAuth2 token cannot be refreshed", installed.auth_error
        remedy = "It is tried again by itself; see that the provider can be reached and the client's id and secret"
        return Problem("refresh", "warning", title, why, remedy, since, installed.plugin, orgs, 1)
    why = installed.auth_error or "The plugin did not accept them when they were last checked"
    remedy = "Connect the account again, or enter other credentials"
    return Problem("auth", "error", "The credentials are not accepted", why, remedy, since, installed.plugin, orgs, 1)


def _together(problems: Iterable[Problem]) -> Iterator[Problem]:
    """The same of several orgs as one, since the first of them."""
    groups: dict[tuple[str, str | None, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.kind, problem.plugin, problem.why), []).append(problem)
    for group in groups.values():
        if len(group) == 1:
            yield group[0]
            continue
        since = min((one.since for one in group if one.since), default=None)
        orgs = sorted(org for one in group for org in one.orgs)
        yield msgspec.structs.replace(group[0], since=since, orgs=tuple(orgs[:_EXAMPLES]), count=len(orgs))
