"""Databases for tests of the store, a real PostgreSQL server among them, and processes that write to them."""

import asyncio
import atexit
import functools
import os
import pwd
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest

from hayhost.store import Keyring, Store

from .conftest import LIMIT, wait_until

__all__ = ["BACKENDS", "KEYS", "PASSWORD", "Server", "child", "make_url", "opened", "run", "server", "settle", "sql"]

BACKENDS: Final = ("sqlite", "postgresql")
KEYS: Final = Keyring([b"k" * 32])
PASSWORD: Final = "pg-5ecret/@:%"
ROOT: Final = Path(__file__).parent.parent


def _binaries() -> Path | None:
    found = shutil.which("postgres")
    candidates = [Path(found).resolve().parent] if found else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next(
        (folder for folder in candidates if (folder / "initdb").exists() and (folder / "postgres").exists()), None
    )


class Server:
    """A PostgreSQL server of its own, in a temporary folder; as root it is run as somebody else."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._folder = Path(tempfile.mkdtemp(prefix="hayhost-pg-"))
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            users = {user.pw_name: user for user in pwd.getpwall()}
            user = users.get("postgres") or users["nobody"]
            self._user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self._folder, user.pw_uid, user.pw_gid)
        password = self._folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._run("initdb", "--no-sync", "-D", "data", "-U", "hay", "-A", "scram-sha-256", "--pwfile", "password")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), *arguments]
        subprocess.run(command, cwd=self._folder, check=True, capture_output=True, timeout=LIMIT, **self._user)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = (
            "fsync=off",
            "listen_addresses=127.0.0.1",
            f"port={self.port}",
            f"unix_socket_directories={self._folder}",
        )
        command = [
            str(self._binaries / "postgres"),
            "-D",
            "data",
            *(part for option in options for part in ("-c", option)),
        ]
        log = (self._folder / "log").open("ab")
        self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log, **self._user)
        log.close()
        wait_until(lambda: self._answers(), f"PostgreSQL:\n{(self._folder / 'log').read_text()}")

    def _answers(self) -> bool:
        command = [str(self._binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, timeout=LIMIT).returncode == 0

    def stop(self) -> None:
        """Stop it, without waiting for clients."""
        if self._process is not None:
            self._process.terminate() if self._process.poll() else self._process.send_signal(2)
            self._process.wait(LIMIT)
            self._process = None

    def remove(self) -> None:
        """Stop it for good."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def url(self, database: str = "postgres", password: str = PASSWORD) -> str:
        """The URL of one of its databases."""
        return f"postgresql://hay:{quote(password, safe='')}@127.0.0.1:{self.port}/{database}"

    def new(self) -> str:
        """The URL of a new database."""
        name = f"t{uuid.uuid4().hex}"
        asyncio.run(sql(self.url(), f"CREATE DATABASE {name}"))
        return self.url(name)


def new_server() -> Server:
    """A server for a test that stops it. Skips the test if PostgreSQL is not installed."""
    if (binaries := _binaries()) is None:
        pytest.skip("POSTGRESQL IS NOT INSTALLED: the store is tested with SQLite only (apt-get install postgresql)")
    return Server(binaries)


@functools.cache
def server() -> Server:
    """The server that all tests share, each with a database of its own."""
    made = new_server()
    atexit.register(made.remove)
    return made


def make_url(backend: str, folder: Path) -> str:
    """The URL of a new, empty database."""
    return server().new() if backend == "postgresql" else f"sqlite:///{folder / 'store.db'}"


def opened(url: str, keys: Keyring = KEYS, **options: Any) -> Store:
    """A store that is quick to see what others change."""
    return Store(url, keys, **{"poll": 0.01, **options})


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a test that is a coroutine."""
    return asyncio.run(asyncio.wait_for(main, LIMIT))


async def settle(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Wait until ``condition()`` while the loop goes on."""
    await asyncio.to_thread(wait_until, condition, what)


async def sql(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Run SQL behind the store's back."""
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=10)
        try:
            with connection:
                return connection.execute(statement).fetchall()
        finally:
            connection.close()
    import asyncpg

    client = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await client.fetch(statement)]
    finally:
        await client.close()


def child(source: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that runs Python source, which has the arguments in ``sys.argv``."""
    return subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
