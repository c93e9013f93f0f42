"""Which OAuth2 tokens are to be refreshed next, and who does it: each is claimed by one host at a time."""

import datetime as dt
from collections.abc import Collection

import sqlalchemy as sa

from hayhost.errors import SecretKeyError
from hayhost.logs import get_logger

from .database import Database, whole
from .installations import QUERY, Installations
from .records import Installed, check_org, check_plugin, clean, now
from .refreshing import retry
from .schema import installations

__all__ = ["Refreshes"]

_MAX_REASON = 1_000
_T = installations.c


class Refreshes:
    """The refreshes of a store. All methods raise ``StoreUnavailableError`` if the database cannot be used."""

    def __init__(self, database: Database, installations: Installations) -> None:
        self._database = database
        self._installations = installations

    @whole
    async def next(self, plugins: Collection[str]) -> dict[str, dt.datetime]:
        """When the next token of each plugin is due; plugins that have none are left out."""
        if not plugins:
            return {}
        queries = [
            sa.select(sa.literal(check_plugin(plugin)).label("plugin"), sa.func.min(_T.refresh_at).label("at")).where(
                _T.plugin == plugin, _T.enabled.is_(True), _T.refresh_at.is_not(None)
            )
            for plugin in plugins
        ]
        async with self._database.read() as connection:
            rows = (await connection.execute(sa.union_all(*queries))).all()
        return {row.plugin: row.at for row in rows if row.at is not None}

    @whole
    async def claim(self, plugin: str, limit: int, org: str | None = None) -> list[Installed]:
        """Installations whose tokens are due, those that are so for the longest first; only that of ``org`` if given.

        Whoever gets one may refresh it, for ``refreshing.CLAIM``; nobody gets it until then. After that it is due
        again, later with each time, unless new credentials were put. What does not decrypt is logged and left out.
        """
        at = now()
        due = [_T.plugin == check_plugin(plugin), _T.enabled.is_(True), _T.refresh_at <= at]
        if org is not None:
            due.append(_T.org == check_org(org))
        query = (
            QUERY.where(*due).order_by(_T.refresh_at).limit(limit).with_for_update(of=installations, skip_locked=True)
        )
        claimed = []
        async with self._database.write() as transaction:
            for row in (await transaction.execute(query)).all():
                change = sa.update(installations).where(_T.org == row.org, _T.plugin == row.plugin)
                values = {
                    "refresh_at": at + retry(row.refresh_failures),
                    "refresh_failures": row.refresh_failures + 1,
                }
                await transaction.execute(change.values(**values))
                try:
                    claimed.append(self._installations.record(row))
                except SecretKeyError as error:
                    get_logger().error("a token is not refreshed", plugin=plugin, org=row.org, reason=str(error))
        return claimed

    @whole
    async def failed(self, installed: Installed, reason: str, *, revoked: bool = False) -> bool:
        """Keep why the tokens of ``installed`` were not refreshed; whether that is news.

        If they are ``revoked``, their validity is ``invalid`` from now on, and they are not due any more. Nothing is
        changed if the installation has been changed since.
        """
        reason = clean(reason, _MAX_REASON)
        if reason == installed.auth_error and not revoked:
            return False
        here = [_T.org == installed.org_id, _T.plugin == installed.plugin, _T.revision == installed.revision]
        change = sa.update(installations).where(*here).values(auth_error=reason)
        if revoked:
            change = change.values(
                auth_validity="invalid", refresh_at=None, revision=installed.revision + 1, updated=now()
            )
        async with self._database.write() as transaction:
            if not (await transaction.execute(change)).rowcount:
                return False
            outcome = "revoked" if revoked else "failed"
            await transaction.record("host", "install.refresh", installed.org_id, installed.plugin, outcome)
        return True
