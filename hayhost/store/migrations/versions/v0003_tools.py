"""Which tools orgs' MCP clients may use, and the part of the audit log that has their calls."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"

_ID = sa.Text().with_variant(postgresql.TEXT(collation="C"), "postgresql")
_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

_APPEND_ONLY = {
    "sqlite": [
        "CREATE TRIGGER audit_calls_no_update BEFORE UPDATE ON audit_calls "
        "BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END",
        "CREATE TRIGGER audit_calls_no_delete BEFORE DELETE ON audit_calls "
        "BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END",
        # INSERT OR REPLACE fires no delete trigger.
        "CREATE TRIGGER audit_calls_no_replace BEFORE INSERT ON audit_calls "
        "WHEN NEW.id IN (SELECT id FROM audit_calls) BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END",
    ],
    "postgresql": [
        "CREATE TRIGGER audit_calls_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_calls "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()",
    ],
}


def upgrade() -> None:
    op.add_column("orgs", sa.Column("tools", sa.Text, nullable=False, server_default='{"allow":[],"deny":[]}'))
    op.create_table(
        "audit_calls",
        sa.Column("id", _SERIAL, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("org", _ID, nullable=False),
        sa.Column("plugin", _ID),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("audit_calls_by_org", "audit_calls", ["org", "id"])
    op.create_index("audit_calls_by_plugin", "audit_calls", ["plugin", "id"])
    for statement in _APPEND_ONLY[op.get_bind().dialect.name]:
        op.execute(statement)
