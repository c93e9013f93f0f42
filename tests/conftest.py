"""Fixtures: plugins made from source text, and the real ``hayhost`` in front of them."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

LIMIT = 60.0
"""Seconds after which a condition that is waited for counts as never met. Only failing tests take this long."""


def wait_until(condition: Callable[[], Any], what: str = "the condition", limit: float = LIMIT) -> Any:
    """Poll until ``condition()`` is truthy, and return that."""
    deadline = time.monotonic() + limit
    pause = threading.Event()
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} was not met within {limit:g} s")
        pause.wait(0.01)
    return value


class Answer(NamedTuple):
    """An HTTP answer, read to its end."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def write_plugin(
    folder: Path,
    source: str = "",
    *,
    name: str | None = None,
    capabilities: tuple[str, ...] = ("routes", "config", "auth", "mcp", "ui"),
    env: tuple[str, ...] = (),
    extra: str = "",
    files: dict[str, str] | None = None,
) -> Path:
    """Make a plugin folder. ``source`` is ``plugin.py``, indented as it may be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "{name or folder.name}"\nversion = "1.2.3"\n\n[tool.hay-plugin]\nentry = "./plugin.py"\n'
        f'displayName = "{folder.name}"\ncategory = "tool"\ncapabilities = {json.dumps(list(capabilities))}\n'
        f"env = {json.dumps(list(env))}\n{extra}"
    )
    (folder / "plugin.py").write_text(textwrap.dedent(source))
    for path, text in (files or {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(textwrap.dedent(text))
    return folder


def routes(body: str, **handlers: str) -> str:
    """Source of a plugin whose routes are ``NAME="source of an expression or statements with req"``; see tests."""
    lines = ["from hayhost.sdk import *", "import asyncio, os, sys, time, signal, threading", textwrap.dedent(body)]
    lines += ["@define_hay_plugin", "class Plugin:", "    name = 'test'", "    def on_initialize(self, ctx):"]
    lines += [f"        ctx.register.route('GET', '/{name}', self.{name})" for name in handlers] or ["        pass"]
    lines += [f"        ctx.register.route('POST', '/{name}', self.{name})" for name in handlers]
    for name, source in handlers.items():
        kind, _, text = source.partition(":")
        lines += [f"    {kind} {name}(self, req):", textwrap.indent(textwrap.dedent(text).strip("\n"), " " * 8)]
    return "\n".join(lines)


class HostProcess:
    """A running ``hayhost serve|dev|run``."""

    isolation = "auto"
    """The level at which hosts are started that do not say. A test module chooses with its ``ISOLATION``."""

    def __init__(
        self,
        arguments: list[str],
        env: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        writable: Path | None = None,
    ) -> None:
        self.log_file = tempfile.NamedTemporaryFile("r+", suffix=".log")  # noqa: SIM115  # closed in stop()
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HAYHOST_", "HAY_"))}
        environment["HAYHOST_ISOLATION"] = self.isolation
        if writable is not None:  # where plugins leave word of what they did, whichever user they are
            writable.chmod(0o777)
            environment["HAYHOST_WRITABLE"] = str(writable)
        self.folder = tempfile.TemporaryDirectory()
        """Where it runs, and keeps its store unless it is told otherwise."""
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-P", "-m", "hayhost", *arguments],
            cwd=self.folder.name,
            env={**environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=self.log_file,
            stderr=subprocess.STDOUT,
        )
        self.port = 0

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """Everything logged so far."""
        return Path(self.log_file.name).read_text()

    def records(self) -> list[dict[str, Any]]:
        """The log as records; for ``--log-format json``."""
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{") and line.endswith("}")]

    def wait_for_log(self, text: str, count: int = 1) -> str:
        """Wait until the log contains ``text`` (``count`` times)."""
        wait_until(lambda: self.log.count(text) >= count or self._check(), f"{text!r} in the log:\n{self.log}")
        return self.log

    def _check(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"hayhost exited with {self.process.returncode}:\n{self.log}")
        return False

    def wait_ready(self) -> "HostProcess":
        """Wait until it listens, and in ``serve`` until all plugins are loaded."""
        self.wait_for_log('"event":"listening"')
        found = re.search(r'"url":"http://[^"]*:(\d+)"', self.log)
        assert found
        self.port = int(found[1])
        if '"plugin"' not in self.log.split('"event":"listening"')[1].splitlines()[0]:
            self.wait_for_log('"event":"ready"')
        return self

    def connect(self, timeout: float = LIMIT) -> http.client.HTTPConnection:
        """A new connection to it."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | str | None = None,
        headers: dict[str, str] | None = None,
        *,
        json_body: Any = None,
        timeout: float = LIMIT,
    ) -> Answer:
        """One request on a connection of its own."""
        if json_body is not None:
            body, headers = json.dumps(json_body), {"Content-Type": "application/json", **(headers or {})}
        connection = self.connect(timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str, **options: Any) -> Answer:
        return self.request("GET", path, **options)

    def post(self, path: str, body: bytes | str | None = None, **options: Any) -> Answer:
        return self.request("POST", path, body, **options)

    def health(self, plugin: str, org: str) -> dict[str, Any]:
        """The parsed ``/health`` of an org's plugin in ``serve``."""
        answer: dict[str, Any] = self.get(f"/plugins/{plugin}/{org}/health").json()
        return answer

    def pids(self) -> list[int]:
        """All processes below the host."""
        return [pid for pid in _tree(self.pid) if _alive(pid)]

    def stop(self) -> int:
        """SIGTERM it and wait; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(LIMIT)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            self.log_file.close()
        self.folder.cleanup()


def seen_of(pid: int, name: str) -> bytes:
    """What /proc says of a process; nothing of the front's memory, unless we are root: nobody else may look there."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except PermissionError:
        return b""


def descriptors_of(pid: int) -> int:
    """How many descriptors a process has open; 0 of the front, unless we are root: nobody else may count them."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except PermissionError:
        return 0


def _stat(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return []


def _alive(pid: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[0] not in (b"Z", b"X")


def _tree(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, front = [], [root]
    while front:
        below = children.get(front.pop(), [])
        found += below
        front += below
    return found


def all_gone(pids: list[int]) -> bool:
    """Whether none of the processes lives any more."""
    return not any(_alive(pid) for pid in pids)


Serve = Callable[..., HostProcess]


@pytest.fixture(scope="module", autouse=True)
def isolation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hosts of a module that sets ``ISOLATION`` run at that level."""
    HostProcess.isolation = getattr(request.module, "ISOLATION", "auto")
    yield
    HostProcess.isolation = "auto"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., HostProcess]]:
    """``start("serve", folder, "--mode", "test", env={...})``: a real hayhost, killed after the test.

    Plugins may write to the test's ``tmp_path``.
    """
    started: list[HostProcess] = []

    def begin(*arguments: object, env: dict[str, str] | None = None) -> HostProcess:
        host = HostProcess([str(argument) for argument in arguments], env, writable=tmp_path)
        started.append(host)
        return host

    yield begin
    for host in started:
        host.kill()


@pytest.fixture
def serve(start: Callable[..., HostProcess], tmp_path: Path) -> Serve:
    """``serve(folder, "--option", ...)``: a host in test mode on a free port, ready."""

    def begin(folder: Path | None = None, *options: object, env: dict[str, str] | None = None) -> HostProcess:
        arguments = ["serve", folder or tmp_path, "--mode", "test", "--port", "0", "--log-format", "json", *options]
        return start(*arguments, env=env).wait_ready()

    return begin
