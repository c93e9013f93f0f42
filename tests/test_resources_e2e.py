"""What there is too little of: descriptors, processes, disk, time, and clients that take all they can get."""

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import LIMIT, HostProcess, routes, seen_of, wait_until, write_plugin
from .hosting import logged

PLUGIN = routes("", hello="async def: return 'hello'")


def limited(tmp_path: Path, *limits: str, options: tuple[str, ...] = ()) -> HostProcess:
    """A ready host under ``prlimit`` with ``limits``."""
    if shutil.which("prlimit") is None:
        pytest.skip("there is no prlimit here to set limits with (util-linux)")
    arguments = ["serve", str(tmp_path), "--mode", "test", "--port", "0", "--log-format", "json", *options]
    host = HostProcess(arguments, prefix=["prlimit", *limits], writable=tmp_path)
    try:
        return host.wait_ready()
    except BaseException:
        host.kill()
        raise


@contextlib.contextmanager
def connections(host: HostProcess, count: int, send: bytes = b"") -> Iterator[list[socket.socket]]:
    """That many open connections on which ``send`` was sent."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", host.port), timeout=LIMIT))
            if send:
                with contextlib.suppress(OSError):
                    sock.sendall(send)
            opened.append(sock)
        yield opened


def processor_time(pid: int) -> float:
    """Seconds that a process has used."""
    fields = seen_of(pid, "stat").rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_closed(sock: socket.socket) -> bool:
    sock.setblocking(False)  # MSG_DONTWAIT is not heard of by a socket with a time limit
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        sock.settimeout(LIMIT)


@pytest.mark.parametrize(
    "send", [b"", b"GET /plugins/p/acme/hello HTTP/1.1\r\nHost: a\r\nX-Slow: "], ids=["idle", "slow"]
)
def test_more_connections_than_descriptors_make_room_for_who_asks(tmp_path: Path, send: bytes) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    host = limited(tmp_path, "--nofile=256:256", options=("--max-workers", "20"))
    try:
        with connections(host, 300, send) as opened:
            for org in ("a", "b", "c"):  # each needs a worker, which needs descriptors
                answer = host.get(f"/plugins/p/{org}/hello")
                assert (answer.status, answer.body) == (200, b"hello")
            wait_until(lambda: is_closed(opened[0]), "the one that was idle the longest is closed")
            assert not is_closed(opened[-1])
        assert host.get("/plugins/p/a/hello").status == 200
        assert "Traceback" not in host.log
        assert host.stop() == 0
    finally:
        host.kill()


def test_a_host_without_a_descriptor_left_does_not_spin_and_recovers(tmp_path: Path) -> None:
    """Connections with a request that goes on are closed for nobody."""
    source = routes("", wait="async def:\n while not os.path.exists('go'): await asyncio.sleep(0.05)\n return 'done'")
    folder = write_plugin(tmp_path / "p", source)
    host = limited(tmp_path, "--nofile=128:128", options=("--max-workers", "4", "--max-requests", "1000"))
    try:
        request = b"GET /plugins/p/acme/wait HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        with connections(host, 200, request) as opened:
            [warning] = logged(host, event="connections have to wait")
            before = processor_time(host.pid)
            began = time.monotonic()
            wait_until(lambda: time.monotonic() - began > 2)
            assert processor_time(host.pid) - before < 1.5
            assert host.log.count("connections have to wait") == 1, warning
            (folder / "go").touch()
            for sock in opened:
                assert sock.makefile("rb").read().endswith(b"done")
        assert host.get("/plugins/p/acme/wait").body == b"done"
        assert "Traceback" not in host.log
    finally:
        host.kill()
