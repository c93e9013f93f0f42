"""Installations: which org has which plugin, with which config and credentials."""

import datetime as dt
from collections.abc import Collection, Mapping
from typing import Any, Final, get_args

import msgspec
import sqlalchemy as sa
from msgspec import UNSET, UnsetType

from hayhost.errors import NotAllowedError, NotFoundError
from hayhost.installs import Auth, AuthValidity, conflict, not_installed

from . import sealing
from .database import Database, Transaction, whole
from .keys import Keyring
from .orgs import MAX_PAGE, ensure_org, page_of
from .records import Installed, Page, check_org, check_plugin, clean, now
from .refreshing import schedule
from .schema import installations, orgs

__all__ = ["QUERY", "Installations"]

_MAX_ERROR: Final = 2_000
_MOST_STATES: Final = 10_000
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_T = installations.c


class Installations:
    """The installations of a store. All methods raise ``StoreUnavailableError`` if the database cannot be used."""

    def __init__(self, database: Database, keyring: Keyring) -> None:
        self._database = database
        self._keyring = keyring
        self._states: dict[tuple[str, str], tuple[str, str]] = {}

    async def get(self, plugin: str, org: str) -> Installed:
        """The installation, decrypted. Raises ``NotFoundError`` or ``SecretKeyError``."""
        if (found := await self.find(plugin, org)) is None:
            raise not_installed(plugin, org)
        return found

    @whole
    async def find(self, plugin: str, org: str) -> Installed | None:
        """As ``get``, but ``None`` if there is none."""
        query = QUERY.where(_T.org == check_org(org), _T.plugin == check_plugin(plugin))
        async with self._database.read() as connection:
            row = (await connection.execute(query)).first()
        return None if row is None else self.record(row)

    @whole
    async def put(
        self,
        plugin: str,
        org: str,
        *,
        if_revision: int | None,
        actor: str,
        config: Mapping[str, Any] | UnsetType = UNSET,
        sensitive: Collection[str] = (),
        auth: Auth | UnsetType | None = UNSET,
        auth_validity: AuthValidity | UnsetType = UNSET,
        enabled: bool | UnsetType = UNSET,
        new_org: bool = False,
    ) -> Installed:
        """Install or change a plugin of an org; what is not given stays as it is. With ``new_org`` the org is made if
        there is none.

        ``sensitive`` names the fields of ``config`` to encrypt. ``if_revision`` is the revision that the change was
        made from, 0 if there was no installation, ``None`` to change whatever is there. New credentials are of unknown
        validity unless ``auth_validity`` says more.

        Raises ``ConflictError``, and changes nothing, if the revision is another one; ``NotFoundError`` if there is no
        such org; ``NotAllowedError`` for a malformed value; ``SecretKeyError`` if what is kept does not decrypt.
        """
        check_org(org), check_plugin(plugin)
        _check_validity(auth_validity)
        async with self._database.write() as transaction:
            await sealing.use_key(transaction, self._keyring)
            if new_org:
                await ensure_org(transaction, org, actor)
            name = await _lock_org(transaction, org)
            row = (await transaction.execute(QUERY.where(_T.org == org, _T.plugin == plugin))).first()
            current = 0 if row is None else row.revision
            if if_revision is not None and if_revision != current:
                raise conflict(plugin, org, current)
            before = None if row is None else self.record(row)
            after = _merge(before, plugin, org, name, config, sensitive, auth, auth_validity, enabled)
            values = {**self._columns(after), **schedule(before, after)}
            if before is None:
                await transaction.execute(sa.insert(installations), {**values, "state": "", "error": ""})
            else:
                change = sa.update(installations).where(_T.org == org, _T.plugin == plugin, _T.revision == current)
                await transaction.execute(change.values(**values))
            await transaction.record(actor, "install.put", org, plugin, details=_difference(before, after))
        return after

    @whole
    async def set_auth_validity(
        self, plugin: str, org: str, validity: AuthValidity, *, actor: str, if_revision: int | None = None
    ) -> int:
        """Keep whether credentials were accepted; the new revision. Raises ``NotFoundError`` or ``ConflictError``."""
        _check_validity(validity)
        async with self._database.write() as transaction:
            await _lock_org(transaction, check_org(org))
            here = sa.and_(_T.org == org, _T.plugin == check_plugin(plugin))
            current = await _revision(transaction, plugin, org)
            if if_revision is not None and if_revision != current:
                raise conflict(plugin, org, current)
            if not current:
                raise not_installed(plugin, org)
            values = {"auth_validity": validity, "revision": current + 1, "updated": now()}
            await transaction.execute(sa.update(installations).where(here).values(**values))
            await transaction.record(actor, "install.auth_validity", org, plugin, details={"validity": validity})
        return current + 1

    @whole
    async def delete(self, plugin: str, org: str, *, actor: str, if_revision: int | None = None) -> None:
        """Uninstall. Raises ``NotFoundError``, or ``ConflictError`` if it has another revision."""
        async with self._database.write() as transaction:
            await _lock_org(transaction, check_org(org))
            current = await _revision(transaction, check_plugin(plugin), org)
            if not current:
                raise not_installed(plugin, org)
            if if_revision is not None and if_revision != current:
                raise conflict(plugin, org, current)
            await transaction.execute(sa.delete(installations).where(_T.org == org, _T.plugin == plugin))
            await transaction.record(actor, "install.delete", org, plugin)
        self._states.pop((org, plugin), None)

    async def of_org(self, org: str, after: str = "", limit: int = 100) -> Page[Installed]:
        """An org's installations by plugin, from the one that follows ``after``, without secrets."""
        return await self._list(_T.org == check_org(org), _T.plugin, after, limit, "plugin")

    async def of_plugin(self, plugin: str, after: str = "", limit: int = 100) -> Page[Installed]:
        """A plugin's installations by org, from the one that follows ``after``, without secrets."""
        return await self._list(_T.plugin == check_plugin(plugin), _T.org, after, limit, "org")

    @whole
    async def troubled(self, org: str | None = None, limit: int = 100) -> list[Installed]:
        """Enabled installations (of ``org``) whose credentials are invalid, or could not be refreshed, the latest
        first and without secrets."""
        query = QUERY.where(_T.enabled, sa.or_(_T.auth_validity == "invalid", _T.auth_error != ""))
        if org is not None:
            query = query.where(_T.org == check_org(org))
        async with self._database.read() as connection:
            rows = (await connection.execute(query.order_by(_T.updated.desc()).limit(limit))).all()
        return [self.record(row, opened=False) for row in rows]

    @whole
    async def _list(
        self, which: sa.ColumnElement[bool], key: sa.Column[Any], after: str, limit: int, name: str
    ) -> Page[Installed]:
        limit = max(1, min(limit, MAX_PAGE))
        query = QUERY.where(which, key > clean(after, 200)).order_by(key).limit(limit + 1)
        async with self._database.read() as connection:
            rows, following = page_of(list((await connection.execute(query)).all()), limit, name)
        return Page([self.record(row, opened=False) for row in rows], following)

    def set_state(self, plugin: str, org: str, state: str, error: str = "") -> None:
        """Note what a worker does; it is written soon, with others, and changes no revision. It may get lost."""
        if len(self._states) < _MOST_STATES or (org, plugin) in self._states:
            self._states[org, plugin] = clean(state, 40), clean(error, _MAX_ERROR)

    @whole
    async def flush(self) -> None:
        """Write the states noted so far."""
        states, self._states = self._states, {}
        if not states:
            return
        change = (
            sa.update(installations)
            .where(_T.org == sa.bindparam("of_org"), _T.plugin == sa.bindparam("of_plugin"))
            .values(state=sa.bindparam("new_state"), error=sa.bindparam("new_error"))
        )
        rows = [
            {"of_org": org, "of_plugin": plugin, "new_state": state, "new_error": error}
            for (org, plugin), (state, error) in sorted(
                states.items()
            )  # in one order, so that two hosts never deadlock
        ]
        try:
            async with self._database.write(quiet=True) as transaction:
                await transaction.execute(change, rows)
        except BaseException:
            self._states = {**states, **self._states}
            raise

    def _columns(self, record: Installed) -> dict[str, Any]:
        org, plugin = record.org_id, record.plugin
        config, sealed = sealing.seal_config(self._keyring, org, plugin, record.config, record.sealed)
        credentials = None if record.auth is None else sealing.seal_auth(self._keyring, org, plugin, record.auth)
        return {
            "org": org,
            "plugin": plugin,
            "enabled": record.enabled,
            "config": config,
            "sealed": sealed,
            "auth_method": record.auth_method,
            "credentials": credentials,
            "auth_validity": record.auth_validity,
            "auth_error": record.auth_error,
            "key_id": self._keyring.primary if credentials is not None or record.sealed else None,
            "revision": record.revision,
            "created": record.created,
            "updated": record.updated,
        }

    def record(self, row: Any, *, opened: bool = True) -> Installed:
        """What a row of ``QUERY`` says. Raises ``SecretKeyError`` if it does not decrypt."""
        auth: Auth | None = None
        if opened:
            config, fields = sealing.open_config(self._keyring, row.org, row.plugin, row.config, row.sealed)
            auth = sealing.open_auth(self._keyring, row.org, row.plugin, row.credentials)
        else:
            config, fields = msgspec.json.decode(row.config), list(msgspec.json.decode(row.sealed))
        return Installed(
            plugin=row.plugin,
            org_id=row.org,
            org_name=row.org_name,
            enabled=row.enabled,
            config=config,
            sealed=tuple(fields),
            auth_method=row.auth_method,
            auth=auth,
            auth_validity=row.auth_validity,
            auth_error=row.auth_error,
            state=row.state,
            error=row.error,
            revision=row.revision,
            created=row.created,
            updated=row.updated,
        )


QUERY: Final = sa.select(installations, orgs.c.name.label("org_name")).join(orgs, orgs.c.id == _T.org)


def _check_validity(validity: AuthValidity | UnsetType) -> None:
    if validity is not UNSET and validity not in get_args(AuthValidity):
        raise NotAllowedError(f"not an auth validity; there are {', '.join(get_args(AuthValidity))}")


async def _lock_org(transaction: Transaction, org: str) -> str:
    """Have changes to one org's installations happen one after the other; the org's name."""
    query = sa.select(orgs.c.name).where(orgs.c.id == org).with_for_update(key_share=True)
    row = (await transaction.execute(query)).first()
    if row is None:
        raise NotFoundError(f"there is no org {org}")
    return str(row.name)


async def _revision(transaction: Transaction, plugin: str, org: str) -> int:
    query = sa.select(_T.revision).where(_T.org == org, _T.plugin == plugin)
    return (await transaction.execute(query)).scalar() or 0


def _merge(
    before: Installed | None,
    plugin: str,
    org: str,
    name: str,
    config: Mapping[str, Any] | UnsetType,
    sensitive: Collection[str],
    auth: Auth | UnsetType | None,
    validity: AuthValidity | UnsetType,
    enabled: bool | UnsetType,
) -> Installed:
    at = now()
    if before is None:
        # A revision is never used again, not even after an uninstall: who still has the old one meets a conflict.
        first = (at - _EPOCH) // dt.timedelta(microseconds=1)
        before = Installed(plugin, org, name, True, {}, (), None, None, "unknown", "", "", "", first - 1, at, at)
    new_config = before.config if config is UNSET else dict(config)
    sealed = before.sealed if config is UNSET else tuple(field for field in new_config if field in set(sensitive))
    new_auth = before.auth if auth is UNSET else auth
    if validity is UNSET:
        validity = before.auth_validity if new_auth == before.auth else "unknown"
    return msgspec.structs.replace(
        before,
        enabled=before.enabled if enabled is UNSET else enabled,
        config=new_config,
        sealed=sealed,
        auth=new_auth,
        auth_method=None if new_auth is None else clean(new_auth.method_id, 200),
        auth_validity=validity,
        auth_error=before.auth_error if new_auth == before.auth else "",
        revision=before.revision + 1,
        updated=at,
    )


def _difference(before: Installed | None, after: Installed) -> dict[str, Any]:
    """What was changed, by name only."""
    old = {} if before is None else before.config
    fields = [field for field in {**old, **after.config} if old.get(field, UNSET) != after.config.get(field, UNSET)]
    difference: dict[str, Any] = {"revision": after.revision, "enabled": after.enabled}
    if fields:
        difference["config"] = [clean(field, 100) for field in sorted(fields)][:20]
    if before is None or before.auth != after.auth:
        difference["auth"] = after.auth_method
    return difference
