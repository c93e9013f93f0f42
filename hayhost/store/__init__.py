"""The store: orgs, installations, tokens, the audit log and OAuth2 flows, in SQLite or PostgreSQL."""

from hayhost.errors import (
    ConflictError,
    ExistsError,
    NotAllowedError,
    NotFoundError,
    SecretKeyError,
    StoreError,
    StoreUnavailableError,
    StoreVersionError,
)

from .installs import StoreInstalls
from .keys import Keyring
from .records import AuditEntry, Flow, Installed, Org, Page, Token
from .rotation import KeyUse
from .store import Store, open_store

__all__ = [
    "AuditEntry",
    "ConflictError",
    "ExistsError",
    "Flow",
    "Installed",
    "KeyUse",
    "Keyring",
    "NotAllowedError",
    "NotFoundError",
    "Org",
    "Page",
    "SecretKeyError",
    "Store",
    "StoreError",
    "StoreInstalls",
    "StoreUnavailableError",
    "StoreVersionError",
    "Token",
    "open_store",
]
