"""Which org has which plugin, with which config and credentials, and which of their tools its MCP clients may use."""

import functools
import re
from collections.abc import Callable, Mapping
from fnmatch import translate
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType

from .errors import ConflictError, NotFoundError

__all__ = [
    "Auth",
    "AuthValidity",
    "Change",
    "EveryOrg",
    "Installation",
    "Installs",
    "NotLoadedError",
    "SingleInstall",
    "TestInstalls",
    "ToolLists",
    "conflict",
    "not_installed",
]

AuthValidity = Literal["unknown", "valid", "invalid"]

_PRINTABLE: Final = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]*"
# What has neither would match no tool of any plugin: who denies that believes to have denied something.
_ToolPattern = Annotated[str, Meta(max_length=200, pattern=rf"^{_PRINTABLE}(__|[*?]){_PRINTABLE}(?!\n)$")]
_ToolPatterns = Annotated[tuple[_ToolPattern, ...], Meta(max_length=500)]


class Auth(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """An org's credentials for one auth method; never shown in a ``repr``."""

    method_id: Annotated[str, Meta(min_length=1, max_length=200)]
    credentials: dict[str, Any]

    def __repr__(self) -> str:
        return f"Auth(method_id={self.method_id!r})"


class Installation(msgspec.Struct, frozen=True):
    """One plugin of one org. ``problem`` says what is wrong with it, for workers to be degraded by.

    ``revision`` grows with every change; 0: nobody has kept it yet.
    """

    org_id: str
    org_name: str
    config: dict[str, Any] = {}
    auth: Auth | None = None
    enabled: bool = True
    problem: str = ""
    auth_validity: AuthValidity = "unknown"
    revision: int = 0

    def __repr__(self) -> str:
        return f"Installation(org_id={self.org_id!r}, enabled={self.enabled})"


class Change(msgspec.Struct, frozen=True):
    """What is to be different about an installation; what is unset stays.

    ``sensitive`` names fields of ``config``. With ``new_org`` the org is made if there is none.
    """

    config: Mapping[str, Any] | UnsetType = UNSET
    sensitive: frozenset[str] = frozenset()
    auth: Auth | UnsetType | None = UNSET
    auth_validity: AuthValidity | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    new_org: bool = False

    def __repr__(self) -> str:
        return f"Change(enabled={self.enabled!r})"

    def apply(self, before: Installation) -> Installation:
        """``before`` with the change made to it."""
        auth = before.auth if self.auth is UNSET else self.auth
        validity = self.auth_validity
        if validity is UNSET:
            validity = before.auth_validity if auth == before.auth else "unknown"
        return Installation(
            before.org_id,
            before.org_name,
            before.config if self.config is UNSET else dict(self.config),
            auth,
            before.enabled if self.enabled is UNSET else self.enabled,
            before.problem if self.config is UNSET else "",
            validity,
            before.revision + 1,
        )


class ToolLists(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which tools an org's MCP clients may use: those that `allow` names (all, if it names none), without those that
    `deny` names.

    Entries are `plugin__tool` in full, with `*` and `?` for what may be anything.
    """

    allow: _ToolPatterns = ()
    deny: _ToolPatterns = ()

    def allows(self, plugin: str, tool: str) -> bool:
        """Whether ``tool``, by its server's name for it, may be used."""
        name = f"{plugin}__{tool}"
        allow, deny = self.expressions
        return re.match(allow, name) is not None and re.match(deny, name) is None

    @property
    def expressions(self) -> tuple[str, str]:
        """What an allowed name matches, and what a denied one does, as regular expressions."""
        return _any_of(self.allow or ("*",)), _any_of(self.deny)


@functools.lru_cache(1_000)
def _any_of(patterns: tuple[str, ...]) -> str:
    """What matches any of ``patterns``; without one, it matches nothing."""
    return "|".join(translate(pattern.replace("[", "[[]")) for pattern in patterns) or r"(?!)"


class NotLoadedError(Exception):
    """It is not known yet whether the installation exists: ``await load(plugin, org)`` and look again."""

    def __init__(self, plugin: str, org: str) -> None:
        super().__init__(f"{plugin} of {org} is not loaded yet")
        self.plugin = plugin
        self.org = org


def not_installed(plugin: str, org: str) -> NotFoundError:
    """What is raised where there is no such installation."""
    return NotFoundError(f"{plugin} is not installed for {org}")


def conflict(plugin: str, org: str, current: int) -> ConflictError:
    """What is raised where an installation is not of the revision that a change was made from."""
    return ConflictError(f"{plugin} of {org} was changed by somebody else meanwhile", current)


class Installs(Protocol):
    """Where installations are looked up, and changes to them kept."""

    def find(self, plugin: str, org: str) -> Installation | None:
        """The installation of ``plugin`` for ``org``; ``None`` if there is none. Raises ``NotLoadedError``."""
        ...

    async def load(self, plugin: str, org: str) -> Installation | None:
        """As ``find``, but it waits until it is known. Raises ``StoreError`` if that cannot be."""
        ...

    async def put(
        self, plugin: str, org: str, change: Change, *, actor: str, if_revision: int | None = None
    ) -> Installation:
        """Make ``change``, and keep it for good; the installation as it is then.

        Raises ``ConflictError`` unless the installation is of ``if_revision`` (0: not there), if that is given, and
        other ``StoreError`` if it cannot be kept.
        """
        ...

    async def remove(self, plugin: str, org: str, *, actor: str, if_revision: int | None = None) -> None:
        """Uninstall. Raises as ``put``, and ``NotFoundError``."""
        ...

    def note(self, plugin: str, org: str, state: str, error: str) -> None:
        """Note what the org's worker does, and its last error; it may get lost."""
        ...


class _InMemory:
    """Installations that nobody keeps beyond the life of the process."""

    def __init__(self, known: Callable[[str], Installation | None]) -> None:
        self._known = known
        self._changed: dict[tuple[str, str], Installation] = {}

    def find(self, plugin: str, org: str) -> Installation | None:
        return self._changed.get((plugin, org)) or self._known(org)

    async def load(self, plugin: str, org: str) -> Installation | None:
        return self.find(plugin, org)

    async def put(
        self, plugin: str, org: str, change: Change, *, actor: str, if_revision: int | None = None
    ) -> Installation:
        before = self.find(plugin, org)
        if before is None:
            raise not_installed(plugin, org)
        if if_revision is not None and before.revision != if_revision:
            raise conflict(plugin, org, before.revision)
        after = self._changed[plugin, org] = change.apply(before)
        return after

    async def remove(self, plugin: str, org: str, *, actor: str, if_revision: int | None = None) -> None:
        await self.put(plugin, org, Change(enabled=False), actor=actor, if_revision=if_revision)

    def note(self, plugin: str, org: str, state: str, error: str) -> None:
        pass


def _test_org(org: str) -> Installation:
    return Installation(org, f"Test Org {org}")


class TestInstalls(_InMemory):
    """Test mode: every org is known and has every plugin. Changes are kept in memory."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    def __init__(self) -> None:
        super().__init__(_test_org)

    async def put(
        self, plugin: str, org: str, change: Change, *, actor: str, if_revision: int | None = None
    ) -> Installation:
        after = await super().put(plugin, org, change, actor=actor, if_revision=if_revision)
        if not after.enabled:  # there is no way to enable it again here but to use it
            del self._changed[plugin, org]
        return after


class SingleInstall(_InMemory):
    """``hayhost run``: one org, and nothing else."""

    def __init__(self, installation: Installation) -> None:
        super().__init__(lambda org: installation if org == installation.org_id else None)


class EveryOrg:
    """Test mode with a store: what that does not have is there all the same, with an empty config."""

    def __init__(self, kept: Installs) -> None:
        self._kept = kept
        self.put, self.remove, self.note = kept.put, kept.remove, kept.note

    def find(self, plugin: str, org: str) -> Installation | None:
        return self._kept.find(plugin, org) or _test_org(org)

    async def load(self, plugin: str, org: str) -> Installation | None:
        return await self._kept.load(plugin, org) or _test_org(org)
