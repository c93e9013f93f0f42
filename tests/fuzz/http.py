"""Requests that two readers might take for different ones, sent to a real host on raw sockets.

``read`` says what a strict reader finds in some bytes. The host may refuse more than that, but never understand
something else: no answer to a request that is not there, and none by another org's worker.
"""

import json
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from tests.conftest import HostProcess
from tests.hosting import PLUGIN, PREAMBLE

__all__ = ["MIRROR", "Asked", "Client", "fuzz", "make", "read"]

MIRROR: Final = (
    PREAMBLE
    + """
import hashlib

def told(req):
    return {"org": req.ctx.org.id, "method": req.method, "digest": hashlib.sha256(req.body).hexdigest(),
            "name": req.params["name"]}

for method in ("GET", "POST", "PUT", "DELETE"):
    @route(method, "/mirror/{name}")
    async def mirror(req):
        return told(req)

@route("POST", "/pieces/{name}")
async def pieces(req):
    yield json.dumps(told(req))
"""
    + PLUGIN
)
"""Source of a plugin that says what it was asked."""

_LIMIT: Final = 20.0
_REQUEST: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])")
_FIELD: Final = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*((?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)[ \t]*"
)
_PATH: Final = re.compile(r"/plugins/p/([A-Za-z0-9][A-Za-z0-9_.-]*)/(?:mirror|pieces)/([^/?]+)(?:\?.*)?")


class Asked(NamedTuple):
    """A request as a strict reader finds it. ``last``: what follows it is not read."""

    method: str
    target: str
    body: bytes
    last: bool


def read(data: bytes) -> tuple[list[Asked], str]:
    """The requests in ``data``, up to where it is ``bad``, ``more`` would have to come, or all is read (``""``)."""
    found: list[Asked] = []
    while data.lstrip(b"\r\n"):
        head = re.search(rb"\r?\n\r?\n", data)
        if head is None:
            return found, "more"
        lines = re.split(r"\r?\n", data[: head.start()].decode("latin-1").lstrip("\r\n"))
        rest = data[head.end() :]
        line = _REQUEST.fullmatch(lines[0].rstrip("\r"))  # as Tornado reads it
        fields = [_FIELD.fullmatch(line) for line in lines[1:]]
        if line is None or not all(fields):
            return found, "bad"
        headers: dict[str, list[str]] = {}
        for field in fields:
            assert field
            headers.setdefault(field[1].lower(), []).append(field[2])
        body = _body(headers, rest)
        if isinstance(body, str):
            return found, body
        content, data = body
        connection = ",".join(headers.get("connection", [])).lower().replace(" ", "")
        last = "close" in connection or (line[3] == "0" and "keep-alive" not in connection)
        found.append(Asked(line[1], line[2], content, last))
        if last:
            return found, ""
    return found, ""


def _body(headers: dict[str, list[str]], rest: bytes) -> tuple[bytes, bytes] | str:
    lengths, codings = headers.get("content-length", []), headers.get("transfer-encoding", [])
    if codings:
        return "bad" if lengths or [coding.lower() for coding in codings] != ["chunked"] else _chunks(rest)
    values = {value.strip() for value in ",".join(lengths).split(",")} if lengths else {"0"}
    [length, *others] = values
    if others or not re.fullmatch(r"[0-9]{1,18}", length):
        return "bad"
    size = int(length)
    return (rest[:size], rest[size:]) if len(rest) >= size else "more"


def _chunks(data: bytes) -> tuple[bytes, bytes] | str:
    body = b""
    while True:
        line, end, data = data.partition(b"\r\n")
        if not re.fullmatch(rb"[0-9a-fA-F]{1,62}", line):
            return "bad" if end or not re.fullmatch(rb"[0-9a-fA-F]{0,62}\r?", line) else "more"
        if not end:
            return "more"
        size = int(line, 16)
        if len(data) < size + 2:
            return "bad" if len(data) > size and data[size : size + 1] != b"\r" else "more"
        if data[size : size + 2] != b"\r\n":
            return "bad"
        body, data = body + data[:size], data[size + 2 :]
        if size == 0:
            return body, data


# ---- what is sent


def make(chance: random.Random) -> bytes:
    """Some requests of one connection. The last one, if it is reached, ends it."""
    parts = [_one(chance) for _ in range(chance.choice([1, 1, 2, 3]))]
    return b"".join(parts) + b"GET /plugins/p/acme/mirror/last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


_TARGETS: Final = [
    "/plugins/p/acme/mirror/{}",
    "/plugins/p/acme/mirror/{}?x=/plugins/p/victim/mirror/1",
    "/plugins/p/acme/../victim/mirror/{}",
    "/plugins/p/acme/..%2fvictim%2fmirror/{}",
    "/plugins/p/acme%2f..%2fvictim/mirror/{}",
    "/plugins/p/acme/%2e%2e/victim/mirror/{}",
    "/plugins/p/acme/mirror/%2e%2e%2f%2e%2e%2fvictim%2fmirror%2f{}",
    "//plugins/p/victim/mirror/{}",
    "/plugins/p//victim/mirror/{}",
    "/plugins/p/acme\\..\\victim\\mirror\\{}",
    "/plugins/p/%76ictim/mirror/{}",
    "http://127.0.0.1/plugins/p/victim/mirror/{}",
    "http://victim/plugins/p/acme/mirror/{}",
    "/plugins/p/acme/mirror/{};/../../victim",
    "/plugins/p/acme/mirror/{}#/plugins/p/victim",
    "/plugins/p/vic\xadtim/mirror/{}",
    "/plugins/p/acme;victim/mirror/{}",
    "*",
    "victim:80",
    "/healthz",
    "/plugins/p/acme/health",
    "/plugins/p/acme/nowhere/{}",
    "/api/v1/orgs",
    "/plugins/p/\xc0\xaf/mirror/{}",
    "/plugins/p/acme/%c0%af../victim",
]
_LINES: Final = [
    "{method} {target} HTTP/1.1",
    "{method}  {target} HTTP/1.1",
    "{method}\t{target}\tHTTP/1.1",
    " {method} {target} HTTP/1.1",
    "{method} {target}",
    "{method} {target} HTTP/1.0",
    "{method} {target} HTTP/2.0",
    "{method} {target} HTTP/1.1 ",
    "{method} {target} http/1.1",
    "{method} {target} HTTP/1.10",
    "{method} {target} HTTP/1.1\r",
    "\r\n{method} {target} HTTP/1.1",
    "{method} {target} HTTP/1.1\x00",
    "{method}\x0b{target} HTTP/1.1",
]
_HEADERS: Final = [
    "X-Plain: y",
    "X-Plain: a\r\nX-Plain: b",
    "Connection: close",
    "Connection: keep-alive",
    "Connection: close, x",
    "Connection: content-length",
    "X: a\r\n folded",
    "X : y",
    "X\t: y",
    ": y",
    "no colon",
    "X: a\x00b",
    "X: a\x01",
    "X: a\rb",
    "X: \xff",
    "X\xff: y",
    "Host: y",
    "Expect: 100-continue",
    "Expect: y",
    "Content-Length: 0",
    "Content-Length: {size}",
    "Content-Length: {size}",
    "Content-Length: +{size}",
    "Content-Length: -1",
    "Content-Length: 0{size}",
    "Content-Length: {size}, {size}",
    "Content-Length: {size},0",
    "Content-Length: {size} ",
    "Content-Length : {size}",
    "Content-Length:\t{size}",
    "Content-Length: 0x1",
    "Content-Length: {size}\r\nContent-Length: 0",
    "content-length: {size}",
    "Content_Length: {size}",
    "Content-Length: \xb2",
    "Content-Length: 9999999999999999999999",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: Chunked",
    "Transfer-Encoding:\tchunked",
    "Transfer-Encoding: chunked ",
    "Transfer-Encoding: chunked, chunked",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: identity",
    "Transfer-Encoding: \x0bchunked",
    "Transfer-Encoding : chunked",
    "Transfer-Encoding:\r\n chunked",
    "Transfer_Encoding: chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "Transfer-Encoding: xchunked",
    "TE: trailers",
    "Trailer: X",
    "Upgrade: h2c",
    "Upgrade: websocket",
    "X-Forwarded-Host: victim",
    "X-Original-URL: /plugins/p/victim/mirror/1",
    "X-HTTP-Method-Override: DELETE",
    "Authorization: Bearer hay_0123456789abcdef_x",
]
_SMUGGLED: Final = b"GET /plugins/p/victim/mirror/1 HTTP/1.1\r\nHost: x\r\n\r\n"


def _one(chance: random.Random) -> bytes:
    number = chance.getrandbits(40)
    target = _TARGETS[0] if chance.random() < 0.6 else chance.choice(_TARGETS)
    if chance.random() < 0.15:
        target = "/plugins/p/acme/pieces/{}"
    line = _LINES[0] if chance.random() < 0.85 else chance.choice(_LINES)
    method = chance.choice(
        ["GET", "POST", "POST", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "X", "get"]
    )
    content = chance.choice(
        [
            b"",
            b"x",
            b"hello",
            _SMUGGLED,
            b"0\r\n\r\n" + _SMUGGLED,
            chance.randbytes(chance.randrange(300)),
            b"y" * 70_000,
        ]
    )
    form = chance.random()
    headers = ["Host: x"] if chance.random() < 0.97 else []
    body = content
    if form < 0.35:
        headers.append(f"Content-Length: {len(content)}")
    elif form < 0.7:
        headers.append("Transfer-Encoding: chunked")
        body = _chunked(content, chance)
    for _ in range(chance.choice([0, 0, 1, 1, 2])):
        headers.insert(chance.randrange(len(headers) + 1), chance.choice(_HEADERS).replace("{size}", str(len(content))))
    end = "\r\n" if chance.random() < 0.95 else "\n"
    head = end.join([line.format(method=method, target=target.format(number)), *headers, "", ""])
    if form >= 0.7 and not any(header.lower().startswith(("content-l", "transfer-e")) for header in headers):
        body = b""  # else it would be requests of its own, by right
    data = head.encode("latin-1") + body
    if chance.random() < 0.08:
        at = chance.randrange(len(data))
        data = (
            data[:at]
            + chance.choice([b"", b"\r", b"\n", b"\x00", b" ", b"\r\n", chance.randbytes(1)])
            + data[at + chance.randrange(2) :]
        )
    return data


def _chunked(content: bytes, chance: random.Random) -> bytes:
    pieces = []
    while content:
        size = chance.randrange(1, len(content) + 1)
        pieces.append(b"%x\r\n%s\r\n" % (size, content[:size]))
        content = content[size:]
    pieces.append(b"0\r\n\r\n")
    if chance.random() < 0.25:
        at = chance.randrange(len(pieces))
        given, _, rest = pieces[at].partition(b"\r\n")
        given = chance.choice(
            [
                given + b";x",
                given + b" ",
                b" " + given,
                b"+" + given,
                b"0x" + given,
                b"-" + given,
                b"0" * 50 + given,
                b"f" * 17,
                b"\xb2",
                b"",
                given + b"\n",
                b"0",
                given + b';x="\r\n"',
            ]
        )
        end = b"\r\n" if chance.random() < 0.8 else chance.choice([b"\n", b"\r", b"", b"\r\r\n"])
        pieces[at] = (
            given
            + end
            + (rest if chance.random() < 0.8 else chance.choice([b"\r\n", b"X: y\r\n\r\n", rest[:-2], rest + b"x"]))
        )
    return b"".join(pieces)


# ---- what is answered


class Client:
    """A raw connection that reads answers by their framing, and fails on what is none."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=_LIMIT)
        self._buffer = b""

    def _more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            data = b""
        self._buffer += data
        return bool(data)

    def _until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            if not self._more():
                raise EOFError(self._buffer)
        found, _, self._buffer = self._buffer.partition(end)
        return found

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            if not self._more():
                raise EOFError(self._buffer)
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    def answer(self, method: str | None) -> tuple[int, dict[str, str], bytes] | None:
        """The next final answer, to a request by ``method``; ``None`` if the connection ends instead.

        Without a method it is the last one, and may be without its body: it was HEAD, to whoever read it as one.
        """
        while True:
            if not self._buffer and not self._more():
                return None
            head = self._until(b"\r\n\r\n").decode("latin-1")
            line, *fields = head.split("\r\n")
            found = re.fullmatch(r"HTTP/1\.1 (\d{3}) .+", line)
            assert found, line
            headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
            if (status := int(found[1])) == 100:
                continue
            if method is None and not self._buffer and not self._more():
                return status, headers, b""
            if method == "HEAD" or status in (204, 304):
                return status, headers, b""
            if headers.get("transfer-encoding") == "chunked":
                body = b""
                while size := int(self._until(b"\r\n"), 16):
                    body += self._take(size)
                    assert self._take(2) == b"\r\n"
                assert self._take(2) == b"\r\n"
                return status, headers, body
            if "content-length" in headers:
                return status, headers, self._take(int(headers["content-length"]))
            return status, headers, self.rest()

    def rest(self) -> bytes:
        """Everything until the connection's end."""
        while self._more():
            pass
        rest, self._buffer = self._buffer, b""
        return rest


def _check(port: int, data: bytes) -> Iterator[str]:
    """Send ``data``, and compare the answers with what is asked for; yields what came of each request."""
    asked, end = read(data)
    client = Client(port)
    try:
        try:
            client.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused and cut off before its end
        for request in asked:
            answer = client.answer(request.method)
            if answer is None:
                yield "cut off"
                return
            status, headers, body = answer
            _compare(request, status, headers, body)
            yield str(status)
            if headers.get("connection") == "close" or request.last:
                assert client.rest() == b"", "something after the last answer"
                return
        if end == "bad":
            answer = client.answer(None)
            if answer is None:
                yield "cut off"
                return
            status, headers, body = answer
            assert status >= 400, (status, body)
            assert not body or isinstance(json.loads(body)["error"], str)
            assert client.rest() == b"", "something after what is no request"
            yield f"bad {status}"
        else:
            yield "more"
    finally:
        client.sock.close()


def _compare(request: Asked, status: int, headers: dict[str, str], body: bytes) -> None:
    what = (request, status, body[:300])
    assert status < 600, what
    if status >= 400:
        assert request.method == "HEAD" or isinstance(json.loads(body)["error"], str), what
        assert status < 500, what
        return
    if status != 200 or not headers["content-type"].startswith(("application/json", "text/plain")) or not body:
        return
    told: dict[str, Any] = json.loads(body)
    if "digest" not in told:
        return
    found = _PATH.fullmatch(request.target)
    assert found, what
    name = unquote(found[2].encode("latin-1").decode("latin-1"), errors="replace")
    wanted = (found[1], request.method, sha256(request.body).hexdigest())
    assert (told["org"], told["method"], told["digest"]) == wanted, what
    assert told["name"] == name or not request.target.isascii(), what


def fuzz(host: HostProcess, count: int, seed: int, *, threads: int = 4) -> Counter[str]:
    """Send connections until ``count`` requests were judged; how many of them came to what.

    Raises ``AssertionError`` with the bytes in a note if something was understood in another way.
    """
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()
    failed = threading.Event()

    def run(number: int) -> None:
        chance = random.Random(f"{seed}/{number}")
        while not failed.is_set():
            data = make(chance)
            try:
                found = list(_check(host.port, data))
            except Exception as error:
                failed.set()
                error.add_note(f"seed {seed}: {data!r}"[:3000])
                raise
            with lock:
                outcomes.update(found)
                if outcomes.total() >= count:
                    return

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(run, number) for number in range(threads)]:
            done.result()
    for word in ("Traceback", "Uncaught", "an internal error"):
        assert word not in host.log, f"{word} in the log"
    return outcomes
