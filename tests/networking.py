"""A network of its own for tests, all of it real and on loopback: names, servers with TLS, the broker, and workers."""

import asyncio
import contextlib
import io
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import structlog
import trustme

from hayhost import logs
from hayhost.egress import Egress
from sandbox import wire
from sandbox.broker import messages

from .conftest import LIMIT, wait_until

ROOT = Path(__file__).parent.parent

PRELUDE = """
import json, os, sys
from sandbox import network
from tests.forbidding import SUPPORTED, forbid_sockets
if SUPPORTED:
    forbid_sockets()
network.install()
network.use(int(sys.argv[1]) if sys.argv[1] else None)
PORT, PLAIN, CA = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def attempt(call, *arguments, **options):
    try:
        return call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


class Names:
    """A DNS server. ``zone`` has the answers of a name, one list per query in turn, the last for good."""

    def __init__(self) -> None:
        self.zone: dict[str, list[list[str]]] = {}
        self.silent: set[str] = set()
        self.asked: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def set(self, name: str, *answers: list[str] | str) -> None:
        self.zone[name] = [[answer] if isinstance(answer, str) else answer for answer in answers]

    def _serve(self) -> None:
        while True:
            data, peer = self._socket.recvfrom(4096)
            if data == b"stop":
                return
            query = dns.message.from_wire(data)
            [question] = query.question
            name = question.name.to_text().rstrip(".").lower()
            kind = question.rdtype.name
            if kind == "A":
                self.asked.append(name)
            if name in self.silent:
                continue
            answer = dns.message.make_response(query)
            if name not in self.zone:
                answer.set_rcode(dns.rcode.NXDOMAIN)
            else:
                answers = self.zone[name]
                chosen = answers.pop(0) if kind == "A" and len(answers) > 1 else answers[0]
                right = [text for text in chosen if (":" in text) == (kind == "AAAA")]
                if right:
                    answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", kind, *right))
            self._socket.sendto(answer.to_wire(), peer)

    def close(self) -> None:
        self._socket.sendto(b"stop", self._socket.getsockname())
        self._thread.join()
        self._socket.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps({"host": self.headers["Host"], "path": self.path, "peer": self.client_address[0]}).encode()
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
        else:
            self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, context: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.context = context
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.context is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(LIMIT)
        with self.context.wrap_socket(request, server_side=True) as wrapped:  # on the request's own thread
            super().finish_request(wrapped, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that goes away is part of a test

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


class Network:
    """The names, a server with TLS on ``port`` and one without on ``plain``, and the certificate of their CA."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca = folder / "ca.pem"
        authority.cert_pem.write_to_path(self.ca)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.sni: list[str | None] = []
        context.sni_callback = lambda _socket, name, _context: self.sni.append(name)
        authority.issue_cert("api.test", "*.wild.test").configure_cert(context)
        self._servers = [_Server(context), _Server(None)]
        self.port, self.plain = (server.server_address[1] for server in self._servers)
        self.names = Names()
        for name in ("api.test", "a.wild.test", "other.test"):
            self.names.set(name, "127.0.0.1")

    def close(self) -> None:
        for server in self._servers:
            server.close()
        self.names.close()


class Bench:
    """The broker behind the front's handle, on a loop of its own, and workers of it."""

    def __init__(
        self, network: Network, *, allow: tuple[str, ...] = ("127.0.0.1/32",), nameserver: bool = True
    ) -> None:
        self.network = network
        self.log = io.StringIO()
        self.lost: list[set[tuple[str, str]]] = []
        self._handlers = logging.getLogger().handlers[:]
        self._logging = structlog.get_config()
        logs.configure("json", "info", self.log)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        server = f"127.0.0.1:{network.names.port}" if nameserver else ""
        self.egress: Egress = self.call(lambda: Egress(allow=allow, nameserver=server))
        self.egress.lost = self.lost.append
        self.wait(self.egress.start())

    def call(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` on the handle's loop."""
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return done.result(LIMIT)

    def wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(LIMIT)

    def worker(self, rules: bool | list[str], org: str = "acme", plugin: str = "p") -> socket.socket:
        """The end of a worker that may connect to ``rules``; ``{port}`` and ``{plain}`` in them are the servers'."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listed = rules if isinstance(rules, bool) else [self.fill(rule) for rule in rules]
        self.call(lambda: self.egress.attach(ours.detach(), plugin, org, listed))
        theirs.settimeout(LIMIT)
        theirs.recv(1, socket.MSG_PEEK)  # greeted: the broker has it
        return theirs

    def fill(self, text: str) -> str:
        return text.replace("{port}", str(self.network.port)).replace("{plain}", str(self.network.plain))

    def run(self, code: str, rules: bool | list[str] | None, org: str = "acme", plugin: str = "p") -> Any:
        """Run ``code`` in a worker-like process that can make no socket: what it prints last, as JSON."""
        with contextlib.ExitStack() as stack:
            end = None if rules is None else stack.enter_context(self.worker(rules, org, plugin))
            return run_code(self.network, code, end)

    def records(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The log's records of ``event`` with these ``fields``."""
        records = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [record for record in records if record["event"] == event and fields.items() <= record.items()]

    def wait_for(self, event: str, **fields: Any) -> dict[str, Any]:
        """Wait for such a record; the last one."""
        found: list[dict[str, Any]] = wait_until(lambda: self.records(event, **fields), f"{event} {fields} in the log")
        return found[-1]

    def close(self) -> None:
        self.wait(self.egress.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        structlog.configure(**self._logging)
        logging.getLogger().handlers[:] = self._handlers


def start_code(network: Network, code: str, end: socket.socket | None) -> "subprocess.Popen[bytes]":
    """Start ``code`` in a worker-like process."""
    descriptor = "" if end is None else str(end.fileno())
    arguments = [descriptor, str(network.port), str(network.plain), str(network.ca)]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PRELUDE + code, *arguments],
        cwd=ROOT,
        pass_fds=[] if end is None else [end.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def run_code(network: Network, code: str, end: socket.socket | None) -> Any:
    """Run ``code`` in a worker-like process; what it prints last, as JSON."""
    process = start_code(network, code, end)
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, f"it exited with {process.returncode}"
    return json.loads(output.splitlines()[-1])


@contextlib.contextmanager
def bench(folder: Path, **options: Any) -> Iterator[Bench]:
    """A network and a broker for it."""
    network = Network(folder)
    try:
        made = Bench(network, **options)
        try:
            yield made
        finally:
            made.close()
    finally:
        network.close()


def dial(end: socket.socket, host: str, port: int) -> socket.socket:
    """Ask the broker as a worker does; the socket that the answer comes on."""
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(end, [wire.encode(messages.Dial(host, port))[4:]], [theirs.fileno()])
    ours.settimeout(LIMIT)
    return ours


def answer(reply: socket.socket) -> tuple[messages.Answer, socket.socket | None]:
    """The broker's answer, and the connection."""
    import msgspec

    with reply:
        data, descriptors, _, _ = socket.recv_fds(reply, 4096, 4)
    if not data:
        raise EOFError
    decoded = msgspec.msgpack.decode(data, type=messages.Answer)
    return decoded, socket.socket(fileno=descriptors[0]) if descriptors else None
