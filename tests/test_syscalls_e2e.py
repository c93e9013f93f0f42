"""System calls of the front that fail, each in turn: "the n-th call of X from now fails with E", until none is left.

The short version tries the first few calls of each while an org's worker starts and answers. The long one goes on
until a run meets no failure any more: ``HAYHOST_TEST_CALLS=100 pytest tests/test_syscalls_e2e.py``.
"""

import errno
import functools
import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import LIMIT, HostProcess, routes, wait_until, write_plugin

SOURCE = Path(__file__).with_name("failing.c")
CALLS = int(os.environ.get("HAYHOST_TEST_CALLS", "2"))

FUNCTIONS = {
    "socketpair": (1, errno.EMFILE),
    "pipe2": (2, errno.EMFILE),
    "sendmsg": (3, errno.EPIPE),
    "sendmsg-full": (3, errno.EAGAIN),
    "send": (4, errno.EPIPE),
    "send-full": (4, errno.EAGAIN),
    "recv": (5, errno.ECONNRESET),
    "recv-none": (5, errno.EAGAIN),
    "recvmsg": (6, errno.ECONNRESET),
    "accept": (7, errno.EMFILE),
    "epoll_ctl": (8, errno.ENOMEM),
    "mmap": (9, errno.ENOMEM),
    "open": (10, errno.EMFILE),
    "mkdir": (11, errno.ENOSPC),
    "write": (12, errno.ENOSPC),
}

# Calls that a worker's start, or an answer, can do without.
NOT_ALWAYS = ("recvmsg", "mmap", "open", "mkdir")

_ORDER = struct.Struct("4i")


class Failing:
    """What the host's calls are told to do."""

    def __init__(self, file: Path) -> None:
        file.write_bytes(bytes(_ORDER.size))
        self.file = file
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), _ORDER.size)

    def order(self, which: int, call: int, error: int) -> None:
        """Let the call number ``call`` of function ``which``, from now on, fail."""
        self._map[:] = _ORDER.pack(which, call, error, 0)

    def end(self) -> int:
        """Let none fail any more; how many have."""
        hits: int = _ORDER.unpack(self._map[:])[3]
        self._map[:] = bytes(_ORDER.size)
        return hits


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HostProcess, Failing]]:
    """A host whose calls can be made to fail."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler here to make calls fail with")
    folder = tmp_path_factory.mktemp("syscalls")
    library = folder / "failing.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, SOURCE, "-ldl"], check=True, timeout=LIMIT
    )
    write_plugin(folder / "plugins" / "p", routes("", hello="async def: return 'hello'"))
    failing = Failing(folder / "order")
    env = {"LD_PRELOAD": str(library), "HAYHOST_TEST_FAILING": str(failing.file)}
    arguments = ["serve", str(folder / "plugins"), "--mode", "test", "--port", "0", "--log-format", "json"]
    host = HostProcess([*arguments, "--no-reload", "--spares", "0", "--hook-timeout", "5"], env)
    try:
        yield host.wait_ready(), failing
    finally:
        host.kill()


def is_served(host: HostProcess, org: str) -> bool:
    try:
        return host.get(f"/plugins/p/{org}/hello").status == 200
    except (OSError, ValueError):
        return False


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_call_that_fails_is_an_answer_and_the_next_request_is_served(
    running: tuple[HostProcess, Failing], function: str
) -> None:
    host, failing = running
    which, error = FUNCTIONS[function]
    for call in range(1, CALLS + 1):
        org = f"{function}-{call}"
        failing.order(which, call, error)
        try:
            status = host.get(f"/plugins/p/{org}/hello", timeout=LIMIT).status
        except ConnectionError:
            status = 0  # what failed was the client's own connection
        except OSError as problem:
            raise AssertionError(f"no answer when call {call} of {function} failed: {problem}") from None
        finally:
            hits = failing.end()
        assert status in (0, 200, 500, 502, 503), (function, call)
        assert host.process.poll() is None, host.log[-2000:]
        wait_until(functools.partial(is_served, host, org), f"{org} is served again")
        assert hits or call > 1 or function in NOT_ALWAYS, f"{function} is not called any more: the test tests nothing"
        if not hits:
            break
