"""Clients on raw sockets that send what is not HTTP, too much of it, or none at all."""

import contextlib
import functools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .bystanders import Bystanders, bystanders
from .conftest import LIMIT, HostProcess, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE, hosting

# Without namespaces, so that a plugin and the tests call a process by the same number.
ISOLATION = "confined"

MAX_BODY = 10 << 20

UPLOADS = """
@route("GET", "/pid")
async def pid(req):
    return {"pid": os.getpid(), "org": req.ctx.org.id}

@route("POST", "/size")
async def size(req):
    return {"size": len(req.body), "org": req.ctx.org.id}

@route("GET", "/item/{name}")
async def item(req):
    return {"name": req.params["name"], "org": req.ctx.org.id}

@route("GET", "/number/{number}")
async def number(req):
    await asyncio.sleep(0.02 if req.params["number"] == "0" else 0)
    return req.params["number"]

@route("GET", "/stream")
async def stream(req):
    for _ in range(3):
        yield b"piece "

@route("GET", "/large")
async def large(req):
    try:
        for _ in range(400):
            yield b"x" * 100_000
    finally:
        print("large is over")

@route("GET", "/wait")
async def wait(req):
    print("waiting")
    try:
        await asyncio.sleep(3600)
    finally:
        print("waited")

@route("GET", "/headers")
async def headers(req):
    return {"count": len(req.headers), "x": req.headers.get("x-many")}

@route("POST", "/spin")
async def spin(req):
    while True:
        pass
"""
SLOW = """
@define_hay_plugin
class Plugin:
    name = "slow"

    def on_initialize(self, ctx):
        ctx.register.route("POST", "/size", self.size)

    async def on_start(self, ctx):
        await asyncio.sleep(3600)

    async def size(self, req):
        return {"size": len(req.body)}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    folder = tmp_path_factory.mktemp("plugins")
    write_plugin(folder / "p", PREAMBLE + UPLOADS + PLUGIN)
    write_plugin(folder / "slow", PREAMBLE + SLOW)
    with hosting(folder, "--request-timeout", "1.5", "--max-requests", "8") as process:
        yield process
        assert "Uncaught" not in process.log
        assert "internal" not in process.log
        assert "Traceback" not in process.log


@pytest.fixture(scope="module")
def others(host: HostProcess) -> Iterator[Bystanders]:
    with bystanders(host, "/plugins/p/calm/pid", "/healthz") as some:
        yield some


@pytest.fixture(autouse=True)
def nobody_notices(others: Bystanders) -> Iterator[None]:
    before = len(others.troubles)
    yield
    others.round(1)
    assert others.troubles[before:] == []


class Raw(NamedTuple):
    """An answer as it stood on the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """A raw connection. It reads answers by their framing, and fails on what is none."""

    def __init__(self, host: HostProcess) -> None:
        self.sock = socket.create_connection(("127.0.0.1", host.port), timeout=30)
        self._buffer = b""

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def _more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            data = b""
        self._buffer += data
        return bool(data)

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            assert self._more(), "the connection ended within an answer"
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            assert self._more(), f"the connection ended within a line: {self._buffer[:200]!r}"
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def answer(self, method: str = "GET") -> Raw:
        """The next answer."""
        found = re.fullmatch(rb"HTTP/1\.1 (\d{3}) .+", line := self._line())
        assert found, line
        headers: dict[str, str] = {}
        while line := self._line():
            name, _, value = line.decode("latin-1").partition(": ")
            assert name.lower() not in headers
            headers[name.lower()] = value
        status = int(found[1])
        if status == 100:
            return Raw(status, headers, b"")
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            while size := int(self._line(), 16):
                body += self._take(size)
                assert self._line() == b""
            assert self._line() == b""
        elif "content-length" in headers and method != "HEAD":
            body = self._take(int(headers["content-length"]))
        elif status not in (204, 304) and method != "HEAD":
            body = self.rest()
        return Raw(status, headers, body)

    def rest(self) -> bytes:
        """Everything until the connection's end."""
        while self._more():
            pass
        rest, self._buffer = self._buffer, b""
        return rest


@pytest.fixture
def client(host: HostProcess) -> Iterator[Callable[[], Client]]:
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(Client(host))


def get(path: str, *headers: str, version: str = "HTTP/1.1", method: str = "GET") -> bytes:
    lines = [f"{method} {path} {version}", "Host: 127.0.0.1", *headers]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n"


def post(path: str, *headers: str, body: bytes = b"") -> bytes:
    length = [] if any(h.lower().startswith(("content-length", "transfer")) for h in headers) else [len(body)]
    return get(path, *(f"Content-Length: {n}" for n in length), *headers, method="POST") + body


SIZE = "/plugins/p/acme/size"
PID = "/plugins/p/acme/pid"
CHUNKED = "Transfer-Encoding: chunked"


# ---- what is no request


@pytest.mark.parametrize(
    "line",
    [
        b"GET",
        b"GET /healthz",
        b"GET /healthz HTTP/2.0",
        b"GET /healthz HTTP/0.9",
        b"GET /healthz HTTP/1.1 x",
        b"GET  /healthz HTTP/1.1",
        b"GET /heal thz HTTP/1.1",
        b"GET\t/healthz\tHTTP/1.1",
        b" GET /healthz HTTP/1.1",
        b"G\x00T /healthz HTTP/1.1",
        b"GET /healthz\x00 HTTP/1.1",
        b"GET /\x01 HTTP/1.1",
        b"GET /\x7f HTTP/1.1",
        b"G(T) /healthz HTTP/1.1",
        b"GET /healthz HTTP/1.1\rX",
        b"GET /healthz http/1.1",
        b"\xff\xfe\xfd",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
        b"PRI * HTTP/2.0",
    ],
)
def test_what_is_no_request_line_is_400_and_the_end(client: Callable[[], Client], line: bytes) -> None:
    one = client()
    one.send(line + b"\r\nHost: x\r\n\r\n")
    answer = one.answer()
    assert (answer.status, list(answer.json()), answer.headers["connection"]) == (400, ["error"], "close")
    assert one.rest() == b""


@pytest.mark.parametrize(
    "header",
    [
        b"no colon",
        b": no name",
        b"na me: x",
        b"name : x",
        b"na\x00me: x",
        b"name: a\x00b",
        b"name: a\x01b",
        b"name: a\rb",
        b"name: a\r\n folded",
        b" folded: at once",
        b"na(me: x",
        b"Content-Length: -1",
        b"Content-Length: +1",
        b"Content-Length: 0x10",
        b"Content-Length: 1.0",
        b"Content-Length: ",
        b"Content-Length: \xb2",
        b"Content-Length: \xb2\xb3",
        b"Content-Length: 1 2",
        b"Content-Length: 1,2",
        b"Content-Length: 1\r\nContent-Length: 2",
        b"Content-Length: " + b"9" * 5000,
        b"Transfer-Encoding: gzip",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding: chunked, chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: \x0bchunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Content-Length: 0\r\nTransfer-Encoding: chunked",
        b"Content-Length: 5\r\nTransfer-Encoding: identity",
    ],
)
@pytest.mark.parametrize("path", [SIZE, "/nowhere", "/healthz"])
def test_what_is_no_header_or_no_length_is_400_and_the_end(
    client: Callable[[], Client], path: str, header: bytes
) -> None:
    one = client()
    one.send(b"POST " + path.encode() + b" HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n")
    one.send(b"5\r\nhello\r\n0\r\n\r\n")
    answer = one.answer()
    assert (answer.status, list(answer.json()), answer.headers["connection"]) == (400, ["error"], "close")
    assert one.rest() == b""  # nothing that follows is taken for a request, and nothing else is answered


@pytest.mark.parametrize(
    "header", [b"Content-Length: 1,2", b"Content-Length: \xb2", b"Transfer-Encoding: chunked\r\nContent-Length: 5"]
)
def test_an_unclear_length_is_told_as_json(client: Callable[[], Client], header: bytes) -> None:
    one = client()
    one.send(b"POST " + SIZE.encode() + b" HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n")
    answer = one.answer()
    assert (answer.status, list(answer.json())) == (400, ["error"])
    assert answer.headers["connection"] == "close"


def test_equal_lengths_are_one(client: Callable[[], Client]) -> None:
    one = client()
    one.send(post(SIZE, "Content-Length: 5", "Content-Length: 5", body=b"hello"))
    assert one.answer().json()["size"] == 5


@pytest.mark.parametrize("hosts", [b"", b"Host: x\r\nHost: x\r\n", b"Host: x\r\nhost: y\r\n"])
def test_a_request_has_one_host(client: Callable[[], Client], hosts: bytes) -> None:
    one = client()
    one.send(b"GET /healthz HTTP/1.1\r\n" + hosts + b"\r\n")
    answer = one.answer()
    assert (answer.status, list(answer.json())) == (400, ["error"])


def test_http_1_0_needs_no_host(client: Callable[[], Client]) -> None:
    other = client()
    other.send(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert other.answer().status == 200


@pytest.mark.parametrize(
    "chunks",
    [
        b"x\r\nhello\r\n0\r\n\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"+5\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b" 5\r\nhello\r\n0\r\n\r\n",
        b"5 \r\nhello\r\n0\r\n\r\n",
        b"5\nhello\n0\n\n",
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"5\r\nhell\r\n0\r\n\r\n",
        b"\r\nhello\r\n0\r\n\r\n",
        b"5" * 100 + b"\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\n0\r\nX",
    ],
)
def test_a_bad_chunk_ends_the_connection_and_reaches_no_handler(client: Callable[[], Client], chunks: bytes) -> None:
    one = client()
    one.send(post(SIZE, CHUNKED, body=chunks))
    one.sock.shutdown(socket.SHUT_WR)
    rest = one.rest()
    assert rest.startswith(b"HTTP/1.1 400 ") or not rest
    assert rest.count(b"HTTP/1.1") <= 1
    assert b"size" not in rest


@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), ("/plugins/p/acme/nowhere", 404), (PID, 405)])
def test_a_bad_chunk_after_the_answer_is_no_second_answer(client: Callable[[], Client], path: str, status: int) -> None:
    one = client()
    one.send(post(path, CHUNKED, body=b"5\r\nhello\r\n"))
    assert one.answer().status == status
    one.send(b"nonsense\r\n" + get("/healthz"))
    assert one.rest() == b""


@pytest.mark.parametrize("header", ["close, TE", "TE, close", "te,Close"])
def test_a_connection_that_is_to_close_among_other_things_is_closed(client: Callable[[], Client], header: str) -> None:
    one = client()
    one.send(get(PID, f"Connection: {header}") + get("/healthz"))
    answer = one.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert one.rest() == b""


@pytest.mark.parametrize("size", [100_000, 1_000_000])
def test_a_bad_chunk_in_a_long_upload_frees_the_worker(host: HostProcess, size: int) -> None:
    for _ in range(20):  # more than the worker may have at once
        with Client(host) as one:
            one.send(post("/plugins/p/chunks/size", CHUNKED, body=b"%x\r\n%s\r\nnonsense\r\n" % (size, b"x" * size)))
            assert one.answer().status == 400
            assert one.rest() == b""
    assert host.post("/plugins/p/chunks/size", b"x").json()["size"] == 1


def test_huge_headers_end_the_connection(client: Callable[[], Client]) -> None:
    one = client()
    with contextlib.suppress(ConnectionError):
        one.send(get(PID, f"X-Huge: {'x' * 100_000}"))
    assert b" 200 " not in one.rest()


def test_headers_without_an_end_end_the_connection(client: Callable[[], Client]) -> None:
    one = client()
    with contextlib.suppress(ConnectionError):
        one.send(b"GET / HTTP/1.1\r\n")
        for _ in range(100_000):
            one.send(b"X: y\r\n" * 10)
    assert b" 200 " not in one.rest()


def test_many_headers_are_read(client: Callable[[], Client]) -> None:
    one = client()
    one.send(get("/plugins/p/acme/headers", *["X-Many: v"] * 4000, *[f"X-{n}: v" for n in range(1000)]))
    answer = one.answer()
    assert answer.status == 200
    assert answer.json()["count"] > 1000
    assert answer.json()["x"] == ", ".join(["v"] * 4000)


# ---- methods and targets


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "FOO", "get", "PROPFIND", "M" * 1000])
@pytest.mark.parametrize(("path", "status"), [("/healthz", 405), (PID, 405), ("/nowhere", 404)])
def test_an_unknown_method_is_refused(client: Callable[[], Client], method: str, path: str, status: int) -> None:
    one = client()
    one.send(get(path, method=method))
    answer = one.answer()
    assert (answer.status, list(answer.json())) == (status, ["error"])
    if status == 405:
        assert "GET" in answer.headers["allow"]
    one.send(get("/healthz"))  # the connection is as good as before
    assert one.answer().status == 200


@pytest.mark.parametrize(
    "target",
    [
        "http://x/healthz",
        "http://127.0.0.1/plugins/p/acme/pid",
        "x:443",
        "*",
        "healthz",
        "//healthz",
        "\\healthz",
        "?x",
    ],
)
@pytest.mark.parametrize("method", ["GET", "CONNECT", "OPTIONS"])
def test_a_target_that_is_no_path_of_ours_is_refused(client: Callable[[], Client], method: str, target: str) -> None:
    one = client()
    one.send(get(target, method=method))
    answer = one.answer()
    assert (answer.status, list(answer.json())) == (404 if target == "//healthz" else 400, ["error"])


@pytest.mark.parametrize(
    "path",
    [
        "/plugins/p/acme/../beta/pid",
        "/plugins/p/acme/%2e%2e/beta/pid",
        "/plugins/p/acme/..%2fbeta%2fpid",
        "/plugins/p/acme%2f..%2fbeta/pid",
        "/plugins/p/%61cme/pid",
        "/plugins/p/acme%00/pid",
        "/plugins/p/acme%20/pid",
        "/plugins/p/ac%C3%A9me/pid",
        "/plugins/p/acme;a/pid",
        "/plugins/p/acme,beta/pid",
        "/plugins/p/acme@beta/pid",
        "/plugins/p/acme:1/pid",
        "/plugins/p/acme\\..\\beta\\pid",
        "/plugins\\p\\acme\\pid",
        "/plugins/p/../p/acme/pid",
        "/plugins/./p/acme/pid",
        "/plugins//p/acme/pid",
        "//plugins/p/acme/pid",
        "/plugins/p//acme/pid",
        "/plugins/p/acme//pid",
        "/plugins/p/acme/./pid",
        "/plugins/p/acme/pid/",
        "/plugins/p/acme/pid;x",
        "/plugins/p/acme/pid%3fx",
        "/plugins/p/acme/p%69d",
        "/plugins/p/acme/%2fpid",
        "/plugins/p/.acme/pid",
        "/plugins/p/../pid",
        "/plugins/p/-/pid",
        f"/plugins/p/{'a' * 129}/pid",
        "/plugins/P/acme/pid",
        "/PLUGINS/p/acme/pid",
        "/plugins/%70/acme/pid",
        "/plugins/p/acme/../../../healthz",
        "/plugins/p/acme/%2e%2e/%2e%2e/%2e%2e/healthz",
        "/healthz/",
        "/healthz/x",
        "/%68ealthz",
        "/healthz%00",
        "/./healthz",
        "/x/../healthz",
        "/healthz;x",
        "/healthz#x",
        "/plugins/p/acme/pid#x",
        "/plugins/p/\xe4cme/pid",
        "/plugins",
        "/plugins/",
        "/plugins/p",
        "/plugins/p/",
    ],
)
def test_no_spelling_of_a_path_leads_anywhere_else(client: Callable[[], Client], path: str) -> None:
    one = client()
    one.send(get(path))
    answer = one.answer()
    assert (answer.status, list(answer.json())) == (404, ["error"])


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        ("..%2f..%2fbeta%2fpid", "../../beta/pid"),
        ("%2e%2e", ".."),
        ("..", ".."),
        ("%00", "\0"),
        ("%252e", "%2e"),
        ("a\\..\\b", "a\\..\\b"),
        ("%", "%"),
        ("%ff", "\ufffd"),
    ],
)
def test_a_parameter_is_only_a_parameter(client: Callable[[], Client], sent: str, name: str) -> None:
    one = client()
    one.send(get(f"/plugins/p/acme/item/{sent}"))
    assert one.answer().json() == {"name": name, "org": "acme"}


@pytest.mark.parametrize("path", [f"/plugins/p/{'a' * 128}/pid", "/plugins/p/acme./pid", "/plugins/p/A.c-m_e/pid"])
def test_an_odd_id_is_an_org_of_its_own(client: Callable[[], Client], path: str) -> None:
    one = client()
    one.send(get(path))
    assert one.answer().json()["org"] == path.split("/")[3]


# ---- connections


def test_pipelined_requests_are_answered_in_order(client: Callable[[], Client]) -> None:
    one = client()
    numbers = [str(number) for number in range(50)]
    one.send(b"".join(get(f"/plugins/p/acme/number/{number}") for number in numbers))
    assert [one.answer().body.decode() for _ in numbers] == numbers


def test_pipelined_requests_of_every_kind_are_answered_in_order(client: Callable[[], Client]) -> None:
    one = client()
    one.send(
        get(PID)
        + get("/nowhere")
        + post(SIZE, body=b"x" * 300_000)
        + get("/healthz", method="HEAD")
        + post(SIZE, CHUNKED, body=b"5\r\nhello\r\n0\r\n\r\n")
        + get("/plugins/p/acme/stream")
        + post("/healthz", body=b"x" * 1000)
        + get("/healthz", "Connection: close")
        + get("/nowhere")
    )
    answers = [one.answer() for _ in range(3)]
    assert one.answer("HEAD").status == 200
    answers += [one.answer() for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 404, 200, 200, 200, 405, 200]
    assert answers[2].json()["size"] == 300_000
    assert answers[4].body == b"piece " * 3
    assert answers[-1].headers["connection"] == "close"
    assert one.rest() == b""  # what comes after "close" is not answered


def test_http_1_0_is_answered_and_closed(client: Callable[[], Client]) -> None:
    for path, body in (("/healthz", b'{"status":"ok"}'), ("/plugins/p/acme/stream", b"piece " * 3)):
        one = client()
        one.send(get(path, version="HTTP/1.0"))
        answer = one.answer()
        assert (answer.status, answer.body) == (200, body)
        assert "transfer-encoding" not in answer.headers
        assert one.rest() == b""


def test_http_1_0_that_is_kept_alive_knows_where_an_answer_ends(client: Callable[[], Client]) -> None:
    one = client()
    for _ in range(2):
        one.send(get("/healthz", "Connection: keep-alive", version="HTTP/1.0"))
        answer = one.answer()
        assert (answer.headers["connection"].lower(), answer.body) == ("keep-alive", b'{"status":"ok"}')
    one.send(get("/plugins/p/acme/stream", "Connection: keep-alive", version="HTTP/1.0"))
    answer = one.answer()  # which has no length: only the end of the connection ends it
    assert answer.body == b"piece " * 3
    assert "connection" not in answer.headers


def test_a_client_that_only_stops_sending_does_not_harm(host: HostProcess) -> None:
    pid = host.get("/plugins/p/half/pid").json()["pid"]
    for request in (get("/healthz"), get("/plugins/p/half/wait"), post("/plugins/p/half/size", "Content-Length: 9")):
        with Client(host) as one:
            one.send(request)
            one.sock.shutdown(socket.SHUT_WR)
            one.rest()
    wait_until(lambda: host.log.count("waited") >= host.log.count("waiting"), "the handler is cancelled")
    assert host.get("/plugins/p/half/pid").json()["pid"] == pid


def test_connections_that_say_nothing_cost_little(host: HostProcess) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(Client(host)) for _ in range(500)]
        for one in silent[:250]:
            one.send(b"GET /healthz HTTP/1.1\r\nHost:")
        assert host.get(PID).status == 200
        for one in silent[:250]:
            one.send(b" x\r\n\r\n")
        assert all(one.answer().status == 200 for one in silent[:250])


# ---- bodies


@pytest.mark.parametrize("path", [SIZE, "/plugins/p/acme/config-update", "/nowhere", "/plugins/p/acme/nowhere"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413_that_a_client_can_read(host: HostProcess, path: str, chunked: bool) -> None:
    size = 11 << 20
    with Client(host) as one:
        if chunked:
            piece = b"%x\r\n%s\r\n" % (1 << 16, b"x" * (1 << 16))
            one.send(post(path, CHUNKED))
            for _ in range(size >> 16):
                one.send(piece)  # and not looking meanwhile, as most clients do
            one.send(b"0\r\n\r\n")
        else:
            one.send(post(path, f"Content-Length: {size}"))
            one.send(b"x" * size)
        answer = one.answer()
        assert (answer.status, list(answer.json())) == (404 if "nowhere" in path and chunked else 413, ["error"])
        one.send(get("/healthz"))  # it was read to its end, and the connection goes on
        assert one.answer().status == 200


@pytest.mark.parametrize("path", [SIZE, "/plugins/p/acme/call"])
def test_a_body_that_is_announced_as_too_large_is_413_at_once(client: Callable[[], Client], path: str) -> None:
    for size in (MAX_BODY + 1, 10**17):
        one = client()
        one.send(post(path, f"Content-Length: {size}"))
        assert one.answer().status == 413


def test_a_body_at_the_limit_is_taken_and_one_byte_more_is_not(host: HostProcess) -> None:
    assert host.post(SIZE, b"x" * MAX_BODY).json()["size"] == MAX_BODY
    assert host.post(SIZE, b"x" * (MAX_BODY + 1)).status == 413
    pieces = (b"x" * (1 << 16) for _ in range(MAX_BODY >> 16))
    connection = host.connect()
    connection.request("POST", SIZE, pieces, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    assert json.loads(connection.getresponse().read())["size"] == MAX_BODY
    connection.close()


@pytest.mark.parametrize(("size", "status"), [(MAX_BODY + 1, 413), (5, 404)])
def test_who_waits_for_leave_to_send_is_refused_before_it_sends(
    client: Callable[[], Client], size: int, status: int
) -> None:
    one = client()
    one.send(post(SIZE if status == 413 else "/nowhere", f"Content-Length: {size}", "Expect: 100-continue"))
    answer = one.answer()
    assert (answer.status, list(answer.json())) == (status, ["error"])
    assert answer.headers["connection"] == "close"
    assert one.rest() == b""


def test_who_waits_for_leave_to_send_gets_it(client: Callable[[], Client]) -> None:
    one = client()
    one.send(post(SIZE, "Content-Length: 5", "Expect: 100-continue"))
    assert one.answer().status == 100
    one.send(b"hello")
    assert one.answer().json()["size"] == 5


def test_an_endless_body_is_not_read_for_ever(client: Callable[[], Client]) -> None:
    one, sent = client(), 0
    one.send(post(SIZE, CHUNKED))
    with contextlib.suppress(ConnectionError):
        while sent < 1 << 30:
            one.send(b"%x\r\n%s\r\n" % (1 << 20, b"x" * (1 << 20)))
            sent += 1 << 20
    assert sent < 128 << 20


def test_a_trickle_that_goes_on_is_waited_for(client: Callable[[], Client]) -> None:
    one = client()
    data = bytes(range(40))
    one.send(post(SIZE, f"Content-Length: {len(data)}"))
    began = time.monotonic()
    for number in range(len(data)):
        one.send(data[number : number + 1])
        wait_until(functools.partial(lambda when: time.monotonic() > when, began + number * 0.05))
    assert time.monotonic() - began > 1.5  # longer than the limit for one answer
    assert one.answer().json()["size"] == len(data)


def test_an_upload_that_stops_is_408(host: HostProcess) -> None:
    def stop_midway(path: str, sent: int) -> Raw:
        with Client(host) as one:
            one.send(post(f"/plugins/p/stops/{path}", "Content-Length: 200000", body=b"x" * sent))
            answer = one.answer()
            assert one.rest() == b""
            return answer

    # More than the worker may have at once, of those whose body has come so far that it has been told of them.
    uploads = [(path, sent) for path in ("size", "config-update") for sent in (0, 5, 100_000)] + [
        ("size", 100_000)
    ] * 20
    with ThreadPoolExecutor(len(uploads)) as pool:
        answers = list(pool.map(stop_midway, *zip(*uploads, strict=True)))
    assert [answer.status for answer in answers[:2]] == [408, 408]
    assert {answer.status for answer in answers} <= {408, 503}  # some waited for their turn
    for answer in answers[:2]:
        assert answer.headers["connection"] == "close"
        assert list(answer.json()) == ["error"]
    assert host.post("/plugins/p/stops/size", b"x").json()["size"] == 1


def test_an_upload_for_a_worker_that_does_not_come_up_is_503(host: HostProcess) -> None:
    answer = host.post("/plugins/slow/acme/size", b"x" * 1_000_000)
    assert (answer.status, list(answer.json())) == (503, ["error"])


def test_an_upload_for_a_worker_that_does_not_take_it_is_504(host: HostProcess) -> None:
    with ThreadPoolExecutor(1) as pool:
        spinning = pool.submit(host.post, "/plugins/p/spinning/spin", b"")
        wait_until(lambda: host.health("p", "spinning")["state"] == "ready")
        answer = host.post("/plugins/p/spinning/size", b"x" * 5_000_000)
        assert (answer.status, list(answer.json())) == (504, ["error"])
        assert spinning.result().status == 504


@pytest.mark.parametrize("sent", [10, 70_000, 1_000_000])
def test_a_client_that_leaves_in_its_upload_frees_the_worker(host: HostProcess, sent: int) -> None:
    for _ in range(20):
        with Client(host) as one:
            one.send(post("/plugins/p/leaves/size", "Content-Length: 5000000", body=b"x" * sent))
    assert host.post("/plugins/p/leaves/size", b"x").json()["size"] == 1


def test_a_client_that_leaves_in_its_download_ends_the_handler(host: HostProcess) -> None:
    before = host.log.count("large is over")
    for _ in range(5):
        with Client(host) as one:
            one.send(get("/plugins/p/leaves/large"))
            one.sock.recv(1000)
    host.wait_for_log("large is over", before + 5)
    assert host.get("/plugins/p/leaves/pid").status == 200


def test_a_client_that_does_not_read_holds_up_nobody(host: HostProcess) -> None:
    pid = host.get("/plugins/p/lazy/pid").json()["pid"]
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            one = stack.enter_context(Client(host))
            one.send(get("/plugins/p/lazy/large"))
            assert one.sock.recv(10)
        assert len(host.get("/plugins/p/lazy/large").body) == 40_000_000
        assert host.get("/plugins/p/lazy/pid").json()["pid"] == pid


def test_a_client_that_never_reads_its_answer_is_let_go(host: HostProcess) -> None:
    assert host.get("/plugins/p/let-go/pid").status == 200
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(8):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", host.port))
            sock.sendall(get("/plugins/p/let-go/large"))
            ports.append(sock.getsockname()[1])
        wait_until(lambda: not established(host.port) & set(ports), "they are gone")


def established(port: int) -> set[int]:
    """The clients' ports of the connections that the host has to its ``port``."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(to[-4:], 16) for _, at, to, state, *_ in lines if int(at[-4:], 16) == port and state == "01"}


def test_a_client_that_pipelines_and_never_reads_is_let_go(host: HostProcess) -> None:
    """Also one whose answers are complete and only lie in buffers."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", host.port))
        sock.settimeout(0.1)
        with contextlib.suppress(OSError):  # until it is stuck: answers that nobody takes end the reading of requests
            while True:
                sock.sendall(get("/plugins/p/acme/item/" + "x" * 10_000) * 10)
        port = sock.getsockname()[1]
        assert port in established(host.port)
        wait_until(lambda: port not in established(host.port), "it is gone")


def test_many_at_once_do_all_of_it(host: HostProcess) -> None:
    """All the rude things at the same time, while others are served: see ``nobody_notices``."""
    stop = threading.Event()

    def rude(data: bytes, read: bool) -> None:
        while not stop.is_set():
            with Client(host) as one, contextlib.suppress(OSError):
                one.send(data)
                if read:
                    one.sock.recv(100)

    things = [
        (b"\x00" * 100 + b"\r\n\r\n", True),
        (get("/plugins/p/rude/large"), True),
        (get("/plugins/p/rude/wait"), False),
        (post("/plugins/p/rude/size", "Content-Length: 9999999", body=b"x" * 200_000), False),
        (post("/plugins/p/rude/size", CHUNKED, body=b"fffff\r\nx"), False),
        (get(PID) * 100, True),
    ]
    with ThreadPoolExecutor(len(things)) as pool:
        running = [pool.submit(rude, *thing) for thing in things]
        for _ in range(30):
            assert host.get("/plugins/p/polite/pid").status == 200
        stop.set()
        for one in running:
            one.result(LIMIT)
    assert host.get("/plugins/p/rude/pid").status in (200, 503)
    wait_until(lambda: host.get("/plugins/p/rude/pid").status == 200, "its worker is free again")


def test_the_log_says_nothing_of_rude_clients(host: HostProcess) -> None:
    assert Path(host.log_file.name).stat().st_size < 1_000_000
    errors = [record for record in host.records() if record["level"] == "error" and record.get("plugin") != "slow"]
    assert [record for record in errors if record["org"] != "spinning"] == []
