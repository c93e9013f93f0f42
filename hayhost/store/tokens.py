"""Bearer tokens: shown once, kept as hashes."""

import base64
import datetime as dt
import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa

from hayhost.errors import NotAllowedError, NotFoundError

from .database import Change, Database, whole
from .orgs import MAX_PAGE, page_of
from .records import Page, Token, check_name, check_org, clean, now
from .schema import orgs, tokens

__all__ = ["Tokens"]

_FORM: Final = re.compile(r"hay_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_CACHED: Final = 4_096
_FRESH: Final = 5.0  # seconds: the longest that a revocation may go unnoticed, should the news of it get lost
_MOST_USES: Final = 10_000
_T = tokens.c


class Tokens:
    """The tokens of a store. All methods raise ``StoreUnavailableError`` if the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: OrderedDict[bytes, tuple[Token, float]] = OrderedDict()
        self._generation = 0
        self._uses: dict[str, dt.datetime] = {}
        self._any = False

    @whole
    async def create(
        self, name: str, *, actor: str, org: str | None = None, expires: dt.datetime | None = None
    ) -> tuple[Token, str]:
        """A new token, of an admin or for one org, and its secret, which cannot be had again.

        Raises ``NotFoundError`` if there is no such org, and ``NotAllowedError`` for a malformed name or time.
        """
        check_name(name)
        if expires is not None:
            if expires.tzinfo is None:
                raise NotAllowedError("a token expires at a time with a time zone")
            try:
                expires = expires.astimezone(dt.UTC)
            except OverflowError:
                raise NotAllowedError("a token expires in the years 1 to 9999") from None
        token = Token(secrets.token_hex(8), name, None if org is None else check_org(org), now(), None, expires, None)
        secret = f"hay_{token.id}_{base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip('=')}"
        async with self._database.write() as transaction:
            if org is not None:
                query = sa.select(orgs.c.id).where(orgs.c.id == org).with_for_update(read=True, key_share=True)
                if (await transaction.execute(query)).first() is None:
                    raise NotFoundError(f"there is no org {org}")
            values = {"id": token.id, "name": name, "hash": _hash(secret), "org": org, "created": token.created}
            await transaction.execute(sa.insert(tokens), {**values, "expires": expires})
            await transaction.record(actor, "token.create", org, details={"token": token.id, "name": name})
        return token, secret

    async def verify(self, secret: str) -> Token | None:
        """The token with this secret; ``None`` if there is none, or none that is good any more."""
        if not (form := _FORM.fullmatch(secret)):
            return None
        digest, at = _hash(secret), now()
        token, fresh_until = self._known.get(digest, (None, 0.0))
        if token is None or time.monotonic() >= fresh_until:
            token = await self._look_up(form[1], digest)
        if token is None or not token.is_good(at):
            return None
        if len(self._uses) < _MOST_USES:
            self._uses[token.id] = at
        return token

    @whole
    async def _look_up(self, identifier: str, digest: bytes) -> Token | None:
        generation = self._generation
        async with self._database.read() as connection:
            row = (await connection.execute(sa.select(tokens).where(_T.id == identifier))).first()
        if row is None or not hmac.compare_digest(row.hash, digest):
            self._known.pop(digest, None)
            return None
        token = _record(row)
        if generation == self._generation:  # else it may have been revoked since it was read
            self._known[digest] = token, time.monotonic() + _FRESH
            self._known.move_to_end(digest)
            if len(self._known) > _CACHED:
                self._known.popitem(last=False)
        return token

    @whole
    async def exist(self) -> bool:
        """Whether there is any token: requests need one then. One that was revoked counts: its end opens no doors."""
        if not self._any:
            generation = self._generation
            async with self._database.read() as connection:
                found = (await connection.execute(sa.select(_T.id).limit(1))).first() is not None
            if generation != self._generation:
                return found
            self._any = found
        return self._any

    @whole
    async def list(self, after: str = "", limit: int = 100, *, org: str | None = None) -> Page[Token]:
        """All tokens, or those of one org, by id, from the one that follows ``after``; revoked ones too."""
        limit = max(1, min(limit, MAX_PAGE))
        query = sa.select(tokens).where(_T.id > clean(after, 200)).order_by(_T.id).limit(limit + 1)
        if org is not None:
            query = query.where(_T.org == check_org(org))
        async with self._database.read() as connection:
            rows, following = page_of(list((await connection.execute(query)).all()), limit, "id")
        return Page([_record(row) for row in rows], following)

    @whole
    async def revoke(self, identifier: str, *, actor: str) -> None:
        """Have a token good for nothing, from now on for good. Raises ``NotFoundError``."""
        here = _T.id == clean(identifier, 200)
        async with self._database.write() as transaction:
            revoked = sa.func.coalesce(_T.revoked, sa.literal(now(), _T.revoked.type))
            change = sa.update(tokens).where(here).values(revoked=revoked).returning(_T.org)
            row = (await transaction.execute(change)).first()
            if row is None:
                raise NotFoundError("there is no such token")
            await transaction.record(actor, "token.revoke", row.org, details={"token": identifier})

    @whole
    async def flush(self) -> None:
        """Write when tokens were last used."""
        uses, self._uses = self._uses, {}
        if not uses:
            return
        change = sa.update(tokens).where(_T.id == sa.bindparam("of")).values(last_used=sa.bindparam("used"))
        try:
            async with self._database.write(quiet=True) as transaction:
                await transaction.execute(change, [{"of": token, "used": at} for token, at in sorted(uses.items())])
        except BaseException:
            self._uses = {**uses, **self._uses}
            raise

    def changed(self, changes: Sequence[Change] | None) -> None:
        """Forget what may not be so any more."""
        if changes is None or any(change.action.startswith(("token.", "org.delete")) for change in changes):
            self._generation += 1
            self._known.clear()
            self._any = False


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _record(row: Any) -> Token:
    return Token(row.id, row.name, row.org, row.created, row.last_used, row.expires, row.revoked)
