"""Which keys are in use, and how everything comes to be encrypted with the first one."""

import datetime as dt
from collections.abc import Callable
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from hayhost.errors import SecretKeyError

from . import sealing
from .database import Database, Transaction
from .keys import Keyring, Place
from .records import now
from .schema import flows, installations, keys

__all__ = ["KeyUse", "prove", "rotate", "uses"]

_BATCH: Final = 100
_I, _F = installations.c, flows.c


class KeyUse(msgspec.Struct, frozen=True):
    """A key, by its id. ``since`` is when it came into use, ``None`` if it is not; ``rows`` are encrypted with it."""

    id: str
    encrypts: bool
    since: dt.datetime | None
    rows: int


def _place(identifier: str) -> Place:
    return Place("proof", field=identifier)


async def prove(database: Database, keyring: Keyring) -> None:
    """Make sure that every key in use is among the given ones, and make the first one known as being in use.

    Raises ``SecretKeyError`` if not: then nothing is to be served, as it could not be decrypted.
    """
    if keyring.primary in await _check(database, keyring):
        return
    async with database.write() as transaction:
        if database.is_postgresql:  # two hosts that start at once, with different keys: the second one sees the first's
            await transaction.execute(sa.text("LOCK TABLE secret_keys IN SHARE ROW EXCLUSIVE MODE"))
        if keyring.primary not in _open(keyring, (await transaction.execute(sa.select(keys))).all()):
            proof = keyring.seal(b"hayhost", _place(keyring.primary))
            await transaction.execute(sa.insert(keys), {"id": keyring.primary, "proof": proof, "created": now()})
            await transaction.record("host", "keys.use", details={"key": keyring.primary})


async def _check(database: Database, keyring: Keyring) -> set[str]:
    async with database.read() as connection:
        return _open(keyring, (await connection.execute(sa.select(keys))).all())


def _open(keyring: Keyring, rows: Any) -> set[str]:
    for row in rows:
        if row.id not in keyring.ids:
            raise SecretKeyError(
                f"the store has secrets encrypted with the key {row.id}, which is not among the given keys "
                f"({', '.join(keyring.ids)}); give it too, after the first one"
            )
        keyring.open(row.proof, _place(row.id))
    return {row.id for row in rows}


async def uses(database: Database, keyring: Keyring) -> list[KeyUse]:
    """What the keys of ``keyring`` are used for."""
    rows: dict[str, int] = dict.fromkeys(keyring.ids, 0)
    async with database.read() as connection:
        since = {row.id: row.created for row in await connection.execute(sa.select(keys))}
        for column in (_I.key_id, _F.key_id):
            query = sa.select(column, sa.func.count()).where(column.in_(keyring.ids)).group_by(column)
            for identifier, count in await connection.execute(query):
                rows[identifier] += count
    return [KeyUse(key, key == keyring.primary, since.get(key), rows[key]) for key in keyring.ids]


async def rotate(database: Database, keyring: Keyring, *, actor: str, progress: Callable[[int], None]) -> int:
    """Encrypt everything with the first key and retire the others; how many rows were rewritten.

    Hosts may run meanwhile. If it is broken off, it goes on from there the next time. Raises ``SecretKeyError`` if
    something does not decrypt; no key is retired then.
    """
    rewritten, last = 0, ("", "")
    while batch := await database.finish(_batch(database, keyring, last)):
        rewritten, last = rewritten + len(batch), batch[-1]
        progress(len(batch))
    return await database.finish(_retire(database, keyring, actor, rewritten))


async def _retire(database: Database, keyring: Keyring, actor: str, rewritten: int) -> int:
    async with database.write() as transaction:
        # Nobody seals from here on: what was written with old keys meanwhile is the last of it.
        if database.is_postgresql:
            await transaction.execute(sa.text("LOCK TABLE secret_keys IN EXCLUSIVE MODE"))
        while rows := await _rewrite(transaction, keyring, ("", "")):
            rewritten += len(rows)
        rewritten += await _rewrite_flows(transaction, keyring)
        others = sa.delete(keys).where(keys.c.id != keyring.primary).returning(keys.c.id)
        retired = list((await transaction.execute(others)).scalars())
        if rewritten or retired:
            details = {"key": keyring.primary, "retired": retired, "rewritten": rewritten}
            await transaction.record(actor, "keys.rotate", details=details)
            transaction.changes.clear()
    return rewritten


async def _batch(database: Database, keyring: Keyring, last: tuple[str, str]) -> list[tuple[str, str]]:
    async with database.write() as transaction:
        await sealing.use_key(transaction, keyring)
        return await _rewrite(transaction, keyring, last)


async def _rewrite(transaction: Transaction, keyring: Keyring, last: tuple[str, str]) -> list[tuple[str, str]]:
    """Rewrite the next installations that follow ``last``, in the order in which all who lock several take them."""
    query = (
        sa.select(installations)
        .where(_I.key_id != keyring.primary, sa.tuple_(_I.org, _I.plugin) > sa.tuple_(*last))
        .order_by(_I.org, _I.plugin)
        .limit(_BATCH)
        .with_for_update()
    )
    rows = (await transaction.execute(query)).all()
    for row in rows:
        change = sa.update(installations).where(_I.org == row.org, _I.plugin == row.plugin)
        await transaction.execute(change.values(**_resealed(keyring, row)))
    return [(row.org, row.plugin) for row in rows]


async def _rewrite_flows(transaction: Transaction, keyring: Keyring) -> int:
    query = sa.select(flows).where(_F.key_id != keyring.primary).order_by(_F.state_hash).with_for_update()
    rows = (await transaction.execute(query)).all()
    for row in rows:
        verifier = sealing.open_verifier(keyring, row.org, row.plugin, row.state_hash, row.verifier)
        sealed = sealing.seal_verifier(keyring, row.org, row.plugin, row.state_hash, verifier)
        change = sa.update(flows).where(_F.state_hash == row.state_hash)
        await transaction.execute(change.values(verifier=sealed, key_id=keyring.primary))
    return len(rows)


def _resealed(keyring: Keyring, row: Any) -> dict[str, Any]:
    config, fields = sealing.open_config(keyring, row.org, row.plugin, row.config, row.sealed)
    auth = sealing.open_auth(keyring, row.org, row.plugin, row.credentials)
    return {
        "sealed": sealing.seal_config(keyring, row.org, row.plugin, config, fields)[1],
        "credentials": None if auth is None else sealing.seal_auth(keyring, row.org, row.plugin, auth),
        "key_id": keyring.primary,
    }
