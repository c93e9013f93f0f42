"""The CONNECT proxy of a worker's programs, by itself: what it answers to whom, and what it lets nobody do."""

import asyncio
import base64
import contextlib
import json
import os
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import programs
from sandbox.broker.dialler import DialError
from sandbox.broker.limits import TUNNELS_PER_ORG
from sandbox.broker.proxy import CONNECTIONS, Endpoint, Proxy
from sandbox.broker.splice import Patience
from sandbox.keeper import _give_pairs, tcp_pair

from .conftest import LIMIT, wait_until
from .networking import Bench, answer, bench, dial

SECRET = "s3cret"
AUTH = b"Proxy-Authorization: Basic " + base64.b64encode(b"worker:" + SECRET.encode()) + b"\r\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("proxy")) as made:
        made.network.names.set("private.test", "10.1.2.3")
        made.network.names.set("metadata.test", "169.254.169.254")
        made.network.names.set("mapped.test", "::ffff:127.0.0.2")
        yield made


def keeper(listener: socket.socket) -> socket.socket:
    """The broker's socket to somebody who is to it as the keeper of a worker's namespaces."""
    end, its = socket.socketpair()
    with listener:
        socket.send_fds(its, [b"\0"], [listener.fileno()])

    def keep() -> None:
        poll = select.poll()
        poll.register(its, select.POLLIN)
        with its:
            while poll.poll() and _give_pairs(its):
                pass

    threading.Thread(target=keep).start()
    return end


class Worker:
    """A worker of the broker's, with a proxy for its programs on loopback."""

    def __init__(self, made: Bench, rules: bool | list[str], org: str, plugin: str = "p") -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listed = rules if isinstance(rules, bool) else [made.fill(rule) for rule in rules]
        proxy = keeper(listener).detach(), SECRET
        made.call(lambda: made.egress.attach(ours.detach(), plugin, org, listed, proxy=proxy))
        theirs.settimeout(LIMIT)
        theirs.recv(1, socket.MSG_PEEK)
        self.sock = theirs

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), LIMIT)
        sock.settimeout(LIMIT)
        return sock

    def say(self, data: bytes) -> tuple[int, bytes]:
        """The status and the whole answer to ``data``, after which the proxy has closed."""
        with self.connect() as sock:
            sock.sendall(data)
            whole = read(sock)
        return status(whole), whole

    def tunnel(self, host: str, port: int) -> socket.socket:
        sock = self.connect()
        sock.sendall(request(host, port))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            more = sock.recv(1)
            assert more, head
            head += more
        assert status(head) == 200, head
        return sock


def request(host: str, port: int | str, auth: bytes = AUTH) -> bytes:
    return f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n".encode("latin-1") + auth + b"\r\n"


def read(sock: socket.socket) -> bytes:
    whole = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 16):
            whole += data
    return whole


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer.split(None, 2)[1])


@contextlib.contextmanager
def working(made: Bench, rules: bool | list[str], org: str = "acme") -> Iterator[Worker]:
    worker = Worker(made, rules, org)
    with worker.sock:
        yield worker


@pytest.fixture
def worker(made: Bench) -> Iterator[Worker]:
    with working(made, ["api.test:{port}", "*.wild.test:{plain}"]) as worker:
        yield worker


@pytest.fixture
def free(made: Bench) -> Iterator[Worker]:
    with working(made, True) as worker:
        yield worker


# ---- what is let through


def get(sock: socket.socket) -> bytes:
    sock.sendall(b"GET /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    return read(sock)


def test_a_listed_name_is_reached_with_tls_and_its_bytes_are_counted(made: Bench, worker: Worker) -> None:
    context = ssl.create_default_context(cafile=str(made.network.ca))
    tunnel = worker.tunnel("API.test.", made.network.port)
    with context.wrap_socket(tunnel, server_hostname="api.test") as wrapped:
        assert b'"path": "/x"' in get(wrapped)
    record = made.wait_for("connected", host="api.test", org="acme", port=made.network.port)
    assert record["address"] == "127.0.0.1"
    closed = made.wait_for("connection closed", host="api.test", org="acme", source="broker")
    assert closed["received"] > 1000
    assert closed["sent"] > 200


def test_each_direction_ends_by_itself_and_is_counted_to_the_byte(made: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, working(made, True, "halves") as worker:
        made.network.names.set("halves.test", "127.0.0.1")
        with worker.tunnel("halves.test", server.getsockname()[1]) as client:
            peer, _ = server.accept()
            with peer:
                peer.settimeout(LIMIT)
                client.sendall(b"question")
                client.shutdown(socket.SHUT_WR)
                assert read(peer) == b"question"
                big = bytes(range(256)) * 20_000

                def write() -> None:
                    peer.sendall(big)
                    peer.shutdown(socket.SHUT_WR)

                writer = threading.Thread(target=write)
                writer.start()
                assert read(client) == big
                writer.join()
        made.wait_for("connection closed", org="halves", sent=8, received=len(big), source="broker")
        made.wait_for("connection closed", org="halves")
        counters = made.egress.counters["p", "halves"]
        assert (counters.connected, counters.closed, counters.sent, counters.received) == (1, 1, 8, len(big))


def test_what_comes_with_the_head_is_passed_on(made: Bench, free: Worker) -> None:
    with free.connect() as sock:
        sock.sendall(request("api.test", made.network.plain) + b"GET /early HTTP/1.0\r\n\r\n")
        whole = read(sock)
    assert status(whole) == 200
    assert b'"path": "/early"' in whole


def test_who_does_not_read_holds_up_the_other_side_and_no_memory(made: Bench, free: Worker) -> None:
    made.network.names.set("flood.test", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server, free.tunnel("flood.test", server.getsockname()[1]):
        peer, _ = server.accept()
        with peer:
            peer.setblocking(False)
            before = memory(made)

            def full() -> bool:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(64):
                        peer.send(bytes(1 << 20))
                    return False
                return True

            wait_until(full, "nothing more is taken")
            assert memory(made) - before < 8 << 20


def memory(made: Bench) -> int:
    return int(Path(f"/proc/{made.egress.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- what is refused


@pytest.mark.parametrize(
    "auth",
    [
        b"",
        b"Proxy-Authorization: Basic\r\n",
        b"Proxy-Authorization: Basic " + base64.b64encode(b"worker:wrong") + b"\r\n",
        b"Proxy-Authorization: Basic " + base64.b64encode(b"other:" + SECRET.encode()) + b"\r\n",
        b"Proxy-Authorization: Bearer " + base64.b64encode(b"worker:" + SECRET.encode()) + b"\r\n",
        b"Proxy-Authorization: Basic worker:" + SECRET.encode() + b"\r\n",
        AUTH.replace(b"Proxy-A", b"A"),
        AUTH + AUTH,
    ],
)
def test_nobody_without_the_credentials_is_served(made: Bench, worker: Worker, auth: bytes) -> None:
    asked = len(made.network.names.asked)
    said, whole = worker.say(request("api.test", made.network.port, auth))
    assert said == 407
    assert b'Proxy-Authenticate: Basic realm="hayhost"' in whole
    assert len(made.network.names.asked) == asked
    assert SECRET.encode() not in whole
    assert SECRET not in made.log.getvalue()


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("other.test", "{port}"),
        ("api.test", "{plain}"),
        ("api.test", 443),
        ("a.b.wild.test", "{plain}"),
        ("wild.test", "{plain}"),
        ("127.0.0.1", "{port}"),
        ("[::1]", "{port}"),
        ("169.254.169.254", 80),
        ("0x7f000001", "{port}"),
        ("2130706433", "{port}"),
        ("user@api.test", "{port}"),
        ("api.test#", "{port}"),
        ("api.test:{port}@other.test", "{port}"),
        ("xn--.\xe9.test", "{port}"),
        ("", "{port}"),
    ],
)
def test_what_is_not_listed_is_refused(made: Bench, worker: Worker, host: str, port: str | int) -> None:
    said, _ = worker.say(request(made.fill(host), made.fill(str(port))))
    assert said in (400, 403)


def test_the_refusal_says_what_is_missing_where_programs_show_it(made: Bench, worker: Worker) -> None:
    _, whole = worker.say(request("other.test", made.network.port))
    assert whole.startswith(f"HTTP/1.1 403 other.test:{made.network.port} is not in permissions.network".encode())
    made.wait_for("connection refused", org="acme", host="other.test")


@pytest.mark.parametrize("host", ["private.test", "metadata.test", "mapped.test", "127.0.0.2", "10.1.2.3", "[::1]"])
def test_no_special_address_is_reached_whatever_leads_there(made: Bench, free: Worker, host: str) -> None:
    said, whole = free.say(request(host, made.network.plain))
    assert said == 403
    assert b"which no plugin may connect to" in whole


def test_a_name_is_dialled_where_it_was_judged(made: Bench, free: Worker) -> None:
    made.network.names.set("turns.test", "127.0.0.1", "127.0.0.2")
    with free.tunnel("turns.test", made.network.plain) as tunnel:
        assert b"200 OK" in get(tunnel)
    assert free.say(request("turns.test", made.network.plain))[0] == 403


def test_what_fails_is_told_apart_from_what_is_refused(made: Bench, free: Worker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    assert free.say(request("api.test", closed))[0] == 502
    assert free.say(request("nowhere.test", 443))[0] == 502
    made.network.names.silent.add("silent.test")
    assert free.say(request("silent.test", 443))[0] == 504


@pytest.mark.parametrize("method", [b"GET", b"POST", b"OPTIONS", b"connect"])
def test_it_speaks_connect_only(made: Bench, free: Worker, method: bytes) -> None:
    head = method + b" http://api.test/ HTTP/1.1\r\nHost: api.test\r\n" + AUTH + b"\r\n"
    said, whole = free.say(head)
    assert said == 405
    assert b"speaks CONNECT only" in whole


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\r\n\r\n\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"CONNECT\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/9.99\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\n" + AUTH + b"\r\n", 400),  # no Host
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nHost: b\r\n" + AUTH + b"\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n" + AUTH + b"\r\nhello", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" + AUTH + b"\r\n1\r\nx\r\n0\r\n\r\n", 400),
        (b"CONNECT a HTTP/1.1\r\nHost: a\r\n" + AUTH + b"\r\n", 400),
        (b"CONNECT a:0 HTTP/1.1\r\nHost: a\r\n" + AUTH + b"\r\n", 400),
        (b"CONNECT a:65536 HTTP/1.1\r\nHost: a\r\n" + AUTH + b"\r\n", 400),
        (b"CONNECT a:-1 HTTP/1.1\r\nHost: a\r\n" + AUTH + b"\r\n", 400),
        (b"CONNECT a:1e1 HTTP/1.1\r\nHost: a\r\n" + AUTH + b"\r\n", 400),
        (b"CONNECT a:" + b"9" * 5000 + b" HTTP/1.1\r\nHost: a\r\n" + AUTH + b"\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\0b\r\n" + AUTH + b"\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000, 431),
        (b"A" * 20_000, 431),
    ],
)
def test_a_malformed_or_giant_head_is_an_error_and_nothing_else(
    made: Bench, free: Worker, head: bytes, expected: int
) -> None:
    assert free.say(head)[0] == expected
    with free.tunnel("api.test", made.network.plain) as tunnel:
        assert b"200 OK" in get(tunnel)


def test_an_orgs_connections_are_limited_and_others_served(made: Bench) -> None:
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(working(made, True, "greedy")) for _ in range(TUNNELS_PER_ORG // CONNECTIONS)]
        for worker in workers:
            for _ in range(CONNECTIONS):
                stack.enter_context(worker.tunnel("api.test", made.network.plain))
        another = stack.enter_context(working(made, True, "greedy"))
        said, whole = another.say(request("api.test", made.network.plain))
        assert said == 503
        assert b"too many connections" in whole
        modest = stack.enter_context(working(made, True, "modest"))
        with modest.tunnel("api.test", made.network.plain) as tunnel:
            assert b"200 OK" in get(tunnel)


# ---- lives


def test_the_connections_end_with_the_worker_and_its_port(made: Bench) -> None:
    before = descriptors(made)
    with working(made, True, "leaves") as worker:
        tunnel = worker.tunnel("api.test", made.network.plain)
        idle = worker.connect()
    with tunnel, idle:
        assert read(tunnel) == b""
        assert read(idle) == b""
        wait_until(lambda: refuses(worker), "nobody listens any more")
    wait_until(lambda: descriptors(made) <= before, "the broker has let go of all")


def refuses(worker: Worker) -> bool:
    try:
        worker.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def descriptors(made: Bench) -> int:
    return len(os.listdir(f"/proc/{made.egress.pid}/fd"))


def test_a_program_that_dies_leaves_nothing(made: Bench, free: Worker) -> None:
    before = descriptors(made)
    for _ in range(20):
        with free.tunnel("api.test", made.network.plain) as tunnel:
            tunnel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with free.connect() as sock:
            sock.sendall(request("api.test", made.network.plain))
    wait_until(lambda: descriptors(made) <= before, "the broker has let go of all")


def test_a_worker_whose_keeper_is_gone_is_connected_to_nothing(made: Bench) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end, gone = socket.socketpair()
    gone.close()
    made.call(lambda: made.egress.attach(ours.detach(), "p", "alone", True, proxy=(end.detach(), SECRET)))
    theirs.settimeout(LIMIT)
    with theirs:
        assert theirs.recv(1) == b""
    made.wait_for("the worker is cut off from the network", org="alone")


def test_a_killed_broker_takes_the_connections_and_the_next_one_serves(tmp_path: Path) -> None:
    with bench(tmp_path) as own:
        with working(own, True) as worker:
            tunnel = worker.tunnel("api.test", own.network.plain)
            os.kill(own.egress.pid, signal.SIGKILL)
            with tunnel:
                assert read(tunnel) == b""
            wait_until(lambda: own.lost, "its workers are to be replaced")
        assert own.lost == [{("p", "acme")}]
        with working(own, True) as worker, worker.tunnel("api.test", own.network.plain) as tunnel:
            assert b"200 OK" in get(tunnel)


# ---- time limits, with short ones


class _Owner:
    """Connects to one end of a pair."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []
        self.counts: list[tuple[int, int]] = []

    async def connect(self, host: str, port: int) -> tuple[socket.socket, Endpoint]:
        ours, theirs = tcp_pair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.ends.append(theirs)
        return ours, (host, port)

    def refused(self, host: str, port: int, error: DialError) -> None:
        raise AssertionError(error)

    def closed(self, end: Endpoint, sent: int, received: int) -> None:
        self.counts.append((sent, received))


def patient(patience: Patience, play: Callable[[_Owner, socket.socket], Any]) -> _Owner:
    """Run ``play(owner, client)``, with a client that has connected to a proxy of such patience."""
    owner = _Owner()

    async def run() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        proxy = Proxy(keeper(listener), SECRET, owner, patience)
        with socket.socket() as client:
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, address)
            async with asyncio.timeout(LIMIT):
                await play(owner, client)
        ended = asyncio.Event()
        proxy.close(ended.set)
        await ended.wait()
        for end in owner.ends:
            end.close()

    asyncio.run(run())
    return owner


async def until_closed(client: socket.socket) -> bytes:
    whole = b""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(client, 1 << 16):
        whole += data
    return whole


def test_a_head_that_drips_in_is_given_up() -> None:
    async def play(_: _Owner, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        dripping = loop.create_task(until_closed(client))
        while not dripping.done():
            with contextlib.suppress(OSError):
                await loop.sock_sendall(client, b"C")
            await asyncio.wait({dripping}, timeout=0.02)
        assert status(dripping.result()) in (408, 400)

    patient(Patience(head=0.2), play)


def test_a_connection_without_a_byte_ends_and_one_with_some_does_not() -> None:
    async def play(owner: _Owner, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, request("h", 1))
        assert status(await loop.sock_recv(client, 1000)) == 200
        for _ in range(10):  # longer than the limit in all
            await loop.sock_sendall(owner.ends[0], b"x")
            assert await loop.sock_recv(client, 1000) == b"x"
            await asyncio.sleep(0.1)
        assert await until_closed(client) == b""

    assert patient(Patience(idle=0.6), play).counts == [(0, 10)]


def test_no_connection_lasts_for_ever() -> None:
    async def play(owner: _Owner, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, request("h", 1))
        assert status(await loop.sock_recv(client, 1000)) == 200
        with contextlib.suppress(ConnectionError):
            while True:
                await loop.sock_sendall(client, b"x")
                await asyncio.sleep(0.01)

    [(sent, _)] = patient(Patience(total=0.3), play).counts
    assert sent


# ---- connections that are passed on


def test_what_a_worker_with_programs_is_passed_is_of_its_own_network(made: Bench) -> None:
    with working(made, True, "passed") as worker:
        said, connection = answer(dial(worker.sock, "api.test", made.network.plain))
        assert connection is not None, said
        with connection:
            connection.settimeout(LIMIT)
            mine, its = connection.getsockname(), connection.getpeername()
            assert its[1] not in (made.network.plain, worker.port)
            assert b"200 OK" in get(connection)
        closed = made.wait_for("connection closed", org="passed", source="broker", port=made.network.plain)
        assert closed["received"] > closed["sent"] > 0
        assert mine[1] != made.network.plain


def test_a_connection_of_its_own_network_ends_with_the_worker(made: Bench) -> None:
    before = descriptors(made)
    with working(made, True, "ends") as worker:
        passed = [answer(dial(worker.sock, "api.test", made.network.plain))[1] for _ in range(5)]
    for connection in passed:
        assert connection is not None
        with connection:
            connection.settimeout(LIMIT)
            assert read(connection) == b""
    wait_until(lambda: descriptors(made) <= before, "the broker has let go of all")
    wait_until(lambda: len(made.records("connection closed", org="ends")) == 5, "all are counted")


def test_a_worker_without_programs_is_passed_the_connection_itself(made: Bench) -> None:
    with made.worker(True) as end:
        said, connection = answer(dial(end, "api.test", made.network.plain))
        assert connection is not None, said
        with connection:
            assert connection.getpeername() == ("127.0.0.1", made.network.plain)


# ---- the environment of programs


def test_programs_get_the_proxy_however_they_are_started_and_python_itself_does_not() -> None:
    code = """
import asyncio, json, os, subprocess, sys, urllib.request
from sandbox.programs import use_proxy
before = dict(os.environ)
use_proxy("http://worker:x@127.0.0.1:10000")
show = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
async def later():
    process = await asyncio.create_subprocess_exec(*show, stdout=subprocess.PIPE, env={"A": "1"})
    return (await process.communicate())[0]
found = [
    subprocess.check_output(show), subprocess.check_output(show, env={"A": "1"}), asyncio.run(later()),
    os.popen(f"{show[0]} -c '{show[2]}'").read(), subprocess.check_output(show, env={"HTTPS_PROXY": "http://own"}),
]
assert dict(os.environ) == before and not urllib.request.getproxies()
print(json.dumps([json.loads(text) for text in found]))
"""
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env=environment, cwd=Path(__file__).parent.parent
    )
    *all_of_them, own = json.loads(done.stdout)
    expected = programs.proxy_variables("http://worker:x@127.0.0.1:10000")
    assert expected["NODE_USE_ENV_PROXY"] == "1"
    assert expected["NO_PROXY"] == expected["no_proxy"] == ""
    for found in all_of_them:
        assert expected.items() <= found.items()
    assert own["HTTPS_PROXY"] == "http://own"
