"""The tables as queries see them. Migrations make them; a test compares the two."""

import datetime as dt
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

__all__ = [
    "HEAD",
    "VERSION_TABLE",
    "Moment",
    "audit",
    "calls",
    "flows",
    "installations",
    "keys",
    "metadata",
    "orgs",
    "tokens",
]

HEAD: Final = "0003"
"""The migration that these tables are the result of."""

VERSION_TABLE: Final = "hayhost_version"

_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND: Final = dt.timedelta(microseconds=1)


class Moment(sa.types.TypeDecorator[dt.datetime]):
    """A time in UTC, as microseconds since 1970 in both databases."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Any) -> int | None:
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: Any) -> dt.datetime | None:
        return None if value is None else _EPOCH + value * _MICROSECOND


# Ids are sorted by their bytes in both databases, whatever the language of the server.
_Id = sa.Text().with_variant(postgresql.TEXT(collation="C"), "postgresql")
_Serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

metadata = sa.MetaData()

orgs = sa.Table(
    "orgs",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("created", Moment, nullable=False),
    sa.Column("tools", sa.Text, nullable=False, server_default='{"allow":[],"deny":[]}'),
)

installations = sa.Table(
    "installations",
    metadata,
    sa.Column("org", _Id, sa.ForeignKey("orgs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("plugin", _Id, primary_key=True),
    sa.Column("enabled", sa.Boolean, nullable=False),
    sa.Column("config", sa.Text, nullable=False),
    sa.Column("sealed", sa.Text, nullable=False),
    sa.Column("auth_method", sa.Text),
    sa.Column("credentials", sa.Text),
    sa.Column("auth_validity", sa.Text, nullable=False),
    sa.Column("key_id", _Id),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("created", Moment, nullable=False),
    sa.Column("updated", Moment, nullable=False),
    sa.Column("auth_error", sa.Text, nullable=False, server_default=""),
    sa.Column("refresh_at", Moment),
    sa.Column("refresh_failures", sa.Integer, nullable=False, server_default="0"),
    sa.Index("installations_by_plugin", "plugin", "org", unique=True),
    sa.Index("installations_by_refresh", "plugin", "enabled", "refresh_at"),
    sa.Index("installations_by_key", "key_id"),
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sa.Column("org", _Id, sa.ForeignKey("orgs.id", ondelete="CASCADE")),
    sa.Column("created", Moment, nullable=False),
    sa.Column("last_used", Moment),
    sa.Column("expires", Moment),
    sa.Column("revoked", Moment),
    sa.Index("tokens_by_org", "org", "id"),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", _Serial, primary_key=True),
    sa.Column("at", Moment, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("org", _Id),
    sa.Column("plugin", _Id),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("details", sa.Text, nullable=False),
    sa.Index("audit_by_org", "org", "id"),
    sa.Index("audit_by_plugin", "plugin", "id"),
    sqlite_autoincrement=True,
)

# The part of the audit log that has calls of tools. They are many: among changes they would hide these, and hosts that
# follow changes would have to read them.
calls = sa.Table(
    "audit_calls",
    metadata,
    sa.Column("id", _Serial, primary_key=True),
    sa.Column("at", Moment, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("org", _Id, nullable=False),
    sa.Column("plugin", _Id),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("details", sa.Text, nullable=False),
    sa.Index("audit_calls_by_org", "org", "id"),
    sa.Index("audit_calls_by_plugin", "plugin", "id"),
    sqlite_autoincrement=True,
)

flows = sa.Table(
    "oauth_flows",
    metadata,
    sa.Column("state_hash", _Id, primary_key=True),
    sa.Column("org", _Id, sa.ForeignKey("orgs.id", ondelete="CASCADE"), nullable=False),
    sa.Column("plugin", _Id, nullable=False),
    sa.Column("method", sa.Text, nullable=False),
    sa.Column("browser_hash", sa.LargeBinary, nullable=False),
    sa.Column("verifier", sa.Text, nullable=False),
    sa.Column("key_id", _Id, nullable=False),
    sa.Column("expires", Moment, nullable=False),
    sa.Index("oauth_flows_by_org", "org"),
    sa.Index("oauth_flows_by_key", "key_id"),
    sa.Index("oauth_flows_by_expiry", "expires"),
)

keys = sa.Table(
    "secret_keys",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("proof", sa.Text, nullable=False),
    sa.Column("created", Moment, nullable=False),
)
