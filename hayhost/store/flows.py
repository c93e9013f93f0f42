"""OAuth2 authorizations under way: each is for one browser, for a short time, and used once."""

import datetime as dt
import hashlib
import hmac
import secrets
from typing import Final

import sqlalchemy as sa

from hayhost.errors import NotAllowedError, NotFoundError

from . import sealing
from .database import Database, whole
from .keys import Keyring
from .records import Flow, check_org, check_plugin, clean, now
from .schema import flows, orgs

__all__ = ["Flows"]

_LIFETIME: Final = dt.timedelta(minutes=10)
_MAX_OPEN: Final = 1_000
_T = flows.c


class Flows:
    """The OAuth2 flows of a store. All methods raise ``StoreUnavailableError`` if the database cannot be used."""

    def __init__(self, database: Database, keyring: Keyring) -> None:
        self._database = database
        self._keyring = keyring

    @whole
    async def begin(
        self,
        plugin: str,
        org: str,
        method_id: str,
        *,
        verifier: str,
        browser: str,
        actor: str,
        lifetime: dt.timedelta = _LIFETIME,
    ) -> str:
        """Begin a flow; its ``state``. ``browser`` is a secret that only the browser has, which comes back with it.

        Raises ``NotFoundError`` if there is no such org, and ``NotAllowedError`` if it has too many flows under way.
        """
        check_org(org), check_plugin(plugin)
        state = secrets.token_urlsafe(32)
        hashed = _hash(state).hex()
        async with self._database.write() as transaction:
            await sealing.use_key(transaction, self._keyring)
            query = sa.select(orgs.c.id).where(orgs.c.id == org).with_for_update(key_share=True)
            if (await transaction.execute(query)).first() is None:
                raise NotFoundError(f"there is no org {org}")
            await transaction.execute(sa.delete(flows).where(_T.org == org, _T.expires <= now()))
            count = await transaction.execute(sa.select(sa.func.count()).select_from(flows).where(_T.org == org))
            if count.scalar_one() >= _MAX_OPEN:
                raise NotAllowedError(f"{org} has {_MAX_OPEN} OAuth2 flows under way")
            values = {
                "state_hash": hashed,
                "org": org,
                "plugin": plugin,
                "method": clean(method_id, 200),
                "browser_hash": _hash(browser),
                "verifier": sealing.seal_verifier(self._keyring, org, plugin, hashed, verifier),
                "key_id": self._keyring.primary,
                "expires": now() + lifetime,
            }
            await transaction.execute(sa.insert(flows), values)
            await transaction.record(actor, "oauth.begin", org, plugin, details={"method": values["method"]})
            transaction.changes.clear()
        return state

    @whole
    async def take(self, state: str, *, browser: str, actor: str) -> Flow:
        """The flow with this ``state``, which is used up by it, whatever comes of it.

        Raises ``NotFoundError`` if there is none, it has expired, was used before or is another browser's.
        """
        hashed = _hash(state).hex()
        async with self._database.write() as transaction:
            row = (await transaction.execute(sa.delete(flows).where(_T.state_hash == hashed).returning(flows))).first()
            if row is None:
                raise NotFoundError("this authorization was not begun here, or was used already")
            refused = ""
            if row.expires <= now():
                refused = "this authorization has expired"
            elif not hmac.compare_digest(row.browser_hash, _hash(browser)):
                refused = "this authorization was begun in another browser"
            await transaction.record(actor, "oauth.take", row.org, row.plugin, refused or "ok")
            transaction.changes.clear()
        if refused:
            raise NotFoundError(refused)
        verifier = sealing.open_verifier(self._keyring, row.org, row.plugin, hashed, row.verifier)
        return Flow(row.org, row.plugin, row.method, verifier)

    @whole
    async def expire(self) -> int:
        """Remove flows whose time is over; how many."""
        async with self._database.write(quiet=True) as transaction:
            return (await transaction.execute(sa.delete(flows).where(_T.expires <= now()))).rowcount


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="replace")).digest()
