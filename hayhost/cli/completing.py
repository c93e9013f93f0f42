"""What tab-completion offers. It changes nothing, waits for nobody, and loads as little as it can."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from hayhost.settings import Settings

from .plugins import plugins_folder

__all__ = ["plugins", "stored"]

_MOST: Final = 100
_PATIENCE: Final = 3.0


def stored(settings: Settings, table: Literal["orgs", "tokens"], incomplete: str) -> list[tuple[str, str]]:
    """Ids that begin with ``incomplete``, and their names. Raises whatever goes wrong."""
    url = "hayhost.db" if settings.store == "auto" else settings.store
    if "://" in url and not url.startswith("sqlite:///"):
        return asyncio.run(_asked(url, table, incomplete))
    file = Path(url.removeprefix("sqlite:///")).absolute()
    # Without SQLAlchemy, whose import takes longer than anybody likes to wait for a word.
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=0.2)) as connection:
        query = f"SELECT id, name FROM {table} WHERE id >= ? AND substr(id, 1, ?) = ? ORDER BY id LIMIT ?"
        return connection.execute(query, (incomplete, len(incomplete), incomplete, _MOST)).fetchall()


async def _asked(url: str, table: str, incomplete: str) -> list[tuple[str, str]]:
    import sqlalchemy as sa

    from hayhost.store import schema
    from hayhost.store.database import Database

    columns = schema.metadata.tables[table].c
    query = sa.select(columns.id, columns.name).where(columns.id.startswith(incomplete, autoescape=True))
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # drivers that are broken off complain
    database = Database(url, "completion")
    try:
        async with asyncio.timeout(_PATIENCE), database.read() as connection:
            return [(row.id, row.name) for row in await connection.execute(query.order_by(columns.id).limit(_MOST))]
    finally:
        await database.close()


def plugins(given: Path | None) -> Iterator[tuple[str, str]]:
    """Names and titles of the plugins in the folder. Raises whatever goes wrong."""
    from hayhost.errors import ManifestError
    from hayhost.manifest import is_plugin_folder, read_manifest

    for folder in sorted(plugins_folder(given).iterdir()):
        with contextlib.suppress(ManifestError):
            if is_plugin_folder(folder):
                manifest = read_manifest(folder)
                yield manifest.name, manifest.display_name
