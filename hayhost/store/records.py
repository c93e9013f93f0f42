"""What the store holds, as it is handed out. Secrets never show in a ``repr``."""

import datetime as dt
import re
from typing import Any, Final, Generic, TypeVar

import msgspec

from hayhost.errors import NotAllowedError
from hayhost.installs import Auth, AuthValidity, Installation
from hayhost.names import ORG_ID, PLUGIN_NAME

__all__ = [
    "AuditEntry",
    "Flow",
    "Installed",
    "Org",
    "Page",
    "Token",
    "check_name",
    "check_org",
    "check_plugin",
    "clean",
    "now",
]

T = TypeVar("T")

_UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MAX_NAME: Final = 200


class Org(msgspec.Struct, frozen=True):
    """An organisation."""

    id: str
    name: str
    created: dt.datetime


class Installed(msgspec.Struct, frozen=True):
    """One plugin of one org, as the store has it.

    From a list, ``config`` lacks the fields that ``sealed`` names, and ``auth`` is ``None``: nothing is decrypted.
    ``auth_error`` says why an OAuth2 token could not be refreshed; empty if there is no such trouble.
    """

    plugin: str
    org_id: str
    org_name: str
    enabled: bool
    config: dict[str, Any]
    sealed: tuple[str, ...]
    auth_method: str | None
    auth: Auth | None
    auth_validity: AuthValidity
    auth_error: str
    state: str
    error: str
    revision: int
    created: dt.datetime
    updated: dt.datetime

    def installation(self) -> Installation:
        """What workers are started from."""
        return Installation(
            self.org_id,
            self.org_name,
            self.config,
            self.auth,
            self.enabled,
            self.auth_error,
            auth_validity=self.auth_validity,
            revision=self.revision,
        )

    def __repr__(self) -> str:
        return f"Installed({self.plugin!r}, {self.org_id!r}, enabled={self.enabled}, revision={self.revision})"


class Token(msgspec.Struct, frozen=True):
    """A bearer token without its secret. ``org_id`` is the org it is good for; ``None``: an admin's, good for all."""

    id: str
    name: str
    org_id: str | None
    created: dt.datetime
    last_used: dt.datetime | None = None
    expires: dt.datetime | None = None
    revoked: dt.datetime | None = None

    def is_good(self, at: dt.datetime) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or at < self.expires)


class AuditEntry(msgspec.Struct, frozen=True):
    """Who did what to what, and how it ended."""

    id: int
    at: dt.datetime
    actor: str
    action: str
    org_id: str | None
    plugin: str | None
    outcome: str
    details: dict[str, Any]


class Flow(msgspec.Struct, frozen=True):
    """An OAuth2 authorization that was begun."""

    org_id: str
    plugin: str
    method_id: str
    verifier: str

    def __repr__(self) -> str:
        return f"Flow({self.org_id!r}, {self.plugin!r}, {self.method_id!r})"


class Page(msgspec.Struct, Generic[T], frozen=True):
    """Some items of a list. ``next`` is what to pass as ``after`` for those that follow; ``None``: there are none."""

    items: list[T]
    next: str | None


def now() -> dt.datetime:
    """The time, in UTC."""
    return dt.datetime.now(dt.UTC)


def clean(text: str, limit: int) -> str:
    """``text`` fit for both databases: short, and without characters that they refuse."""
    return text[:limit].encode(errors="replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def check_org(org: str) -> str:
    """``org``. Raises ``NotAllowedError`` if it is not an org's id."""
    if not ORG_ID.fullmatch(org):
        raise NotAllowedError("not an org id: letters, digits and _ . - only, at most 128, the first a letter or digit")
    return org


def check_plugin(plugin: str) -> str:
    """``plugin``. Raises ``NotAllowedError`` if it is not a plugin's name."""
    if not PLUGIN_NAME.fullmatch(plugin):
        raise NotAllowedError("not a plugin's name: 1 to 64 lower-case letters, digits and -, not beginning with -")
    return plugin


def check_name(name: str) -> str:
    """``name``. Raises ``NotAllowedError`` if it is empty, long or not printable."""
    if not name.strip() or len(name) > _MAX_NAME or _UNPRINTABLE.search(name):
        raise NotAllowedError(f"not a name: 1 to {_MAX_NAME} characters, none of them a control character")
    return name
