"""When OAuth2 tokens are to be refreshed, and why they could not be."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("installations", sa.Column("auth_error", sa.Text, nullable=False, server_default=""))
    op.add_column("installations", sa.Column("refresh_at", sa.BigInteger))
    op.add_column("installations", sa.Column("refresh_failures", sa.Integer, nullable=False, server_default="0"))
    op.create_index("installations_by_refresh", "installations", ["plugin", "enabled", "refresh_at"])
