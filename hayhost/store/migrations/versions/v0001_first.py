"""Orgs, installations, tokens, the audit log, OAuth2 flows and secret keys."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

_ID = sa.Text().with_variant(postgresql.TEXT(collation="C"), "postgresql")
_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

_APPEND_ONLY = {
    "sqlite": [
        "CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END",
        "CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END",
        # INSERT OR REPLACE fires no delete trigger.
        "CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit WHEN NEW.id IN (SELECT id FROM audit) "
        "BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END",
    ],
    "postgresql": [
        "CREATE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'audit is append-only'; END $$",
        "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()",
    ],
}


def upgrade() -> None:
    op.create_table(
        "orgs",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "installations",
        sa.Column("org", _ID, sa.ForeignKey("orgs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("plugin", _ID, primary_key=True),
        sa.Column("enabled", sa.Boolean, nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("sealed", sa.Text, nullable=False),
        sa.Column("auth_method", sa.Text),
        sa.Column("credentials", sa.Text),
        sa.Column("auth_validity", sa.Text, nullable=False),
        sa.Column("key_id", _ID),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("updated", sa.BigInteger, nullable=False),
        sa.CheckConstraint("auth_validity IN ('unknown', 'valid', 'invalid')", name="installations_validity"),
    )
    op.create_index("installations_by_plugin", "installations", ["plugin", "org"], unique=True)
    op.create_index("installations_by_key", "installations", ["key_id"])
    op.create_table(
        "tokens",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("org", _ID, sa.ForeignKey("orgs.id", ondelete="CASCADE")),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("last_used", sa.BigInteger),
        sa.Column("expires", sa.BigInteger),
        sa.Column("revoked", sa.BigInteger),
    )
    op.create_index("tokens_by_org", "tokens", ["org", "id"])
    op.create_table(
        "audit",
        sa.Column("id", _SERIAL, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("org", _ID),
        sa.Column("plugin", _ID),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("audit_by_org", "audit", ["org", "id"])
    op.create_index("audit_by_plugin", "audit", ["plugin", "id"])
    for statement in _APPEND_ONLY[op.get_bind().dialect.name]:
        op.execute(statement)
    op.create_table(
        "oauth_flows",
        sa.Column("state_hash", _ID, primary_key=True),
        sa.Column("org", _ID, sa.ForeignKey("orgs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("plugin", _ID, nullable=False),
        sa.Column("method", sa.Text, nullable=False),
        sa.Column("browser_hash", sa.LargeBinary, nullable=False),
        sa.Column("verifier", sa.Text, nullable=False),
        sa.Column("key_id", _ID, nullable=False),
        sa.Column("expires", sa.BigInteger, nullable=False),
    )
    op.create_index("oauth_flows_by_org", "oauth_flows", ["org"])
    op.create_index("oauth_flows_by_key", "oauth_flows", ["key_id"])
    op.create_index("oauth_flows_by_expiry", "oauth_flows", ["expires"])
    op.create_table(
        "secret_keys",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("proof", sa.Text, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
    )
