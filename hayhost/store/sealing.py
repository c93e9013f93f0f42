"""How rows hold secrets: sensitive config fields one by one, credentials as a whole, all of a row with the same key."""

from collections.abc import Collection, Mapping
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from hayhost.errors import NotAllowedError, SecretKeyError
from hayhost.installs import Auth

from .database import Transaction
from .keys import Keyring, Place
from .schema import keys

__all__ = ["open_auth", "open_config", "open_verifier", "seal_auth", "seal_config", "seal_verifier", "use_key"]

MAX_CONFIG: Final = 4 << 20


async def use_key(transaction: Transaction, keyring: Keyring) -> None:
    """Make sure that the key that seals is not retired before the transaction ends. Raises ``SecretKeyError``."""
    query = sa.select(keys.c.id).where(keys.c.id == keyring.primary).with_for_update(read=True)
    if (await transaction.execute(query)).first() is None:
        raise SecretKeyError(f"the key {keyring.primary} was retired by a rotation; start this host with the new keys")


def _encode(value: Any) -> bytes:
    try:
        encoded = msgspec.json.encode(value)
        if msgspec.json.decode(encoded) != value:  # such as NaN, a date, or a number of more than 64 bits
            raise ValueError
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise NotAllowedError("config and credentials can be JSON values only") from None
    if len(encoded) > MAX_CONFIG:
        raise NotAllowedError(f"config and credentials may have {MAX_CONFIG} bytes at most")
    return encoded


def seal_config(
    keyring: Keyring, org: str, plugin: str, config: Mapping[str, Any], sensitive: Collection[str]
) -> tuple[str, str]:
    """The columns ``config`` and ``sealed``. Raises ``NotAllowedError`` if it is not JSON, or too large."""
    plain = {field: value for field, value in config.items() if field not in sensitive}
    sealed = {
        field: keyring.seal(_encode(value), Place("config", org, plugin, field))
        for field, value in config.items()
        if field in sensitive
    }
    return _encode(plain).decode(), _encode(sealed).decode()


def open_config(keyring: Keyring, org: str, plugin: str, config: str, sealed: str) -> tuple[dict[str, Any], list[str]]:
    """The whole config, and which of its fields are sensitive. Raises ``SecretKeyError``."""
    fields: dict[str, str] = msgspec.json.decode(sealed, type=dict[str, str])
    whole: dict[str, Any] = msgspec.json.decode(config, type=dict[str, Any])
    for field, value in fields.items():
        whole[field] = msgspec.json.decode(keyring.open(value, Place("config", org, plugin, field)))
    return whole, list(fields)


def seal_auth(keyring: Keyring, org: str, plugin: str, auth: Auth) -> str:
    """The column ``credentials``. Raises ``NotAllowedError`` if it is not JSON, or too large."""
    return keyring.seal(_encode([auth.method_id, auth.credentials]), Place("auth", org, plugin, "credentials"))


def open_auth(keyring: Keyring, org: str, plugin: str, credentials: str | None) -> Auth | None:
    """The method and credentials. Raises ``SecretKeyError``."""
    if credentials is None:
        return None
    plain = keyring.open(credentials, Place("auth", org, plugin, "credentials"))
    return Auth(*msgspec.json.decode(plain, type=tuple[str, dict[str, Any]]))


def seal_verifier(keyring: Keyring, org: str, plugin: str, state_hash: str, verifier: str) -> str:
    """The column ``verifier`` of a flow."""
    return keyring.seal(verifier.encode(), Place("oauth", org, plugin, state_hash))


def open_verifier(keyring: Keyring, org: str, plugin: str, state_hash: str, sealed: str) -> str:
    """A flow's PKCE verifier. Raises ``SecretKeyError``."""
    return keyring.open(sealed, Place("oauth", org, plugin, state_hash)).decode()
