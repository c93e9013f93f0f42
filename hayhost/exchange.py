"""One HTTP request on its way: from Tornado's connection to a worker's stream, and back."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from string import printable
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import quote

import msgspec
from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPHeaders, HTTPMessageDelegate, RequestStartLine, ResponseStartLine
from tornado.iostream import StreamClosedError

from sandbox import wire

from .answers import Answer, NotYetError, Principal
from .errors import NoWorkerError, RequestError, RequestTimeoutError, StoreError, UnavailableError, WorkerLostError
from .logs import get_logger
from .responses import (
    BadRequestError,
    BadResponseError,
    RequestHead,
    plugin_headers,
    read_head,
    start_line,
    whole_head,
)

if TYPE_CHECKING:
    from .front import Front
    from .slot import Slot
    from .tracing import Trace
    from .version import Version
    from .worker import Worker

__all__ = ["Exchange", "Source"]

# Bodies up to this size travel in one frame with their request; larger ones are streamed as they arrive.
_INLINE: Final = wire.CHUNK
# A refused upload is read and dropped up to this size, so that the client sees the answer; beyond it, it is cut off.
_DISCARD: Final = 64 << 20

# A request is routed this often while what it needs to know is fetched, and forgotten again.
_ROUTINGS: Final = 5

_BODILESS: Final = frozenset({204, 205, 304})


class Source(Protocol):
    """Where an answer comes from: a worker, or what stands in its place."""

    def send(self, message: wire.Body | wire.Window) -> None:
        """More of the request, or room for more of the answer."""

    def cancel(self, id: int) -> None:
        """Nobody waits for the answer any more."""

    def misbehaved(self, how: str) -> None:
        """The answer is not as answers must be."""


class Exchange(HTTPMessageDelegate):
    """Answers one request. Every path through it ends in exactly one answer, or in a closed connection.

    The front decides, from the head, what the request is: ``to_host`` for what the host answers itself, ``to_plugin``
    for a route, ``refuse`` for an error. Body and answer then flow without the front.
    """

    def __init__(self, front: "Front", connection: HTTP1Connection, server_conn: object) -> None:
        self.base = "/"
        self.id = ""
        self.method = ""
        self.version = ""
        self.path = ""
        self.query = ""
        self.status = 0
        self.deadline = 0.0
        self.started = 0.0
        self.slot: Slot | None = None
        self.trace: Trace | None = None
        self.counts = front.counts.other
        """Where it counts, once it is known where it goes."""
        self.principal: Principal | None = None
        """Whose request it is, once that was asked for."""
        self.when_closed: Callable[[], None] | None = None
        """Called when it is over, however it ended."""
        self._front = front
        self._connection = connection
        self._server_conn = server_conn
        self._headers = HTTPHeaders()
        self._head: RequestHead
        self._handler: Callable[[Exchange, bytes], None] | None = None
        self._route: tuple[int, list[str]] = (0, [])
        self._version: Version | None = None
        self._worker: Source | None = None
        self._stream = 0
        self._closed = False
        # the request's body
        self._buffer: list[bytes] = []
        self._received = 0
        self._request_ended = False
        self._window = wire.WINDOW
        self._room: asyncio.Future[None] | None = None
        # the answer's body
        self._headed = False
        self._until_close = False
        self._answer_ended = False
        self._remaining: int | None = None
        self._pending: list[bytes] = []
        self._writing = 0
        self._outstanding = 0
        self._streaming: asyncio.Task[None] | None = None

    @property
    def peer(self) -> str:
        """The address of whoever is at the other end of the connection."""
        return str(getattr(self._connection.context, "remote_ip", ""))

    @property
    def headers(self) -> HTTPHeaders:
        """The request's headers."""
        return self._headers

    # ---- the request, from Tornado

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> "Awaitable[None] | None":
        assert isinstance(start_line, RequestStartLine)
        self._headers = headers
        self.method, self.version = start_line.method, start_line.version
        target = start_line.path
        if not target.isascii():  # bytes that should have been percent-encoded, read as Latin-1
            target = quote(target, safe=printable, encoding="latin-1")
        self.path, _, self.query = target.partition("?")
        self._connection.set_close_callback(self.on_connection_close)
        self.started = self._front.loop.time()
        self._front.begun(self, self._server_conn)
        try:
            self._route_it()
        except NotYetError as error:
            return self._route_after(error)
        return None

    async def _route_after(self, missing: NotYetError) -> None:
        self._front.answering(self)  # it is not the client that is waited for
        for _ in range(_ROUTINGS):
            waiting = asyncio.ensure_future(missing.until())
            await asyncio.wait({waiting}, timeout=self._front.settings.request_timeout)
            if self._closed or not waiting.done():
                waiting.cancel()
                break
            try:
                waiting.result()
                self._route_it()
                if not self._headed:
                    self._front.wait_for(self)
                return
            except NotYetError as error:
                missing = error
            except RequestError as error:
                self.refuse(error)
                return
            except StoreError as error:
                self.refuse(UnavailableError(str(error)))
                return
        if not self._closed:
            self.refuse(UnavailableError(missing.otherwise))

    def _route_it(self) -> None:
        try:
            head = self._head = read_head(self._headers, forwarded=self._front.access.trusts(self.peer))
            self._until_close = head.closes  # Tornado knows the word only where it stands alone
        except BadRequestError as error:
            self.refuse(RequestError(str(error), status=400), last=True)
            return
        try:
            if head.length > self._front.settings.max_body:
                raise self._too_large()
            self._front.route(self, head, self._headers)
        except RequestError as error:
            # A client that waits for leave to send its body gets the answer instead of it.
            self.refuse(error, last=head.expects)

    def _too_large(self) -> RequestError:
        return RequestError(f"The body is larger than {self._front.settings.max_body} bytes", status=413)

    def data_received(self, chunk: bytes) -> "Awaitable[None] | None":
        self._received += len(chunk)
        if self._closed:
            return None
        if self._headed:  # answered already: the rest is read and dropped
            if self._received > _DISCARD and self._answer_ended:
                self._finish()
            return None
        if self._received > self._front.settings.max_body:
            self._cancel()
            self.refuse(self._too_large())
            return None
        self._front.wait_for(self)
        if self._worker is not None:
            self._send(chunk)
        else:
            self._buffer.append(chunk)
            if self.slot is None or self._received <= _INLINE:
                return None
            # A long body whose worker is not there yet: ask for the worker, and read no more until it is.
            self._window = 0
            self._submit()
        if self._window > 0 or self._headed:
            return None
        self._room = self._front.loop.create_future()
        return self._room

    def finish(self) -> None:
        self._request_ended = True
        if self._closed:
            return
        if self._answer_ended:
            self._finish()
        elif self._handler is not None:
            self._front.answering(self)
            self._handler(self, b"".join(self._buffer))
        elif self._worker is not None:
            self._front.wait_for(self)
            self._worker.send(wire.Body(self._stream, b"", True))
        elif self.slot is not None and not self._headed:
            self._front.wait_for(self)
            self._submit()

    def on_connection_close(self) -> None:
        if not self._closed:
            self._cancel()
            self._close()

    # ---- where it goes, from the front

    def to_host(self, handler: "Callable[[Exchange, bytes], None]") -> None:
        """Call ``handler(exchange, body)`` once the body is there."""
        self._handler = handler

    def to_plugin(self, slot: "Slot", index: int, params: list[str], version: "Version | None" = None) -> None:
        """Hand it to a worker of ``slot``, as route ``index`` of ``version``, once the body (or enough) is there."""
        self.slot = slot
        self._route = (index, params)
        self._version = version

    def to_runtime(self, slot: "Slot", index: int, body: bytes) -> None:
        """Hand it, from its host handler, to the worker's runtime, with ``body`` for a body."""
        self.to_plugin(slot, index, [])
        self._buffer = [body]
        self._front.wait_for(self)
        self._submit()

    def answered_by(self, source: Source) -> None:
        """Have ``source`` answer it, from its host handler, with ``head``, ``body`` and ``failed``."""
        self._worker = source

    def _submit(self) -> None:
        assert self.slot is not None
        self.slot = self.slot.current()
        self.slot.submit(self)

    # ---- the worker, from its slot

    def begin(self, worker: "Worker") -> None:
        if self._version is not None and worker.version is not self._version:
            # It was routed before another version took over: what counts is what the worker has.
            try:
                found = self._front.match(self, worker.version)
            except RequestError as error:
                self.refuse(error)
                return
            if found is None:
                return
            self._route = (found.route, found.params)
        self._worker = worker
        body, self._buffer = b"".join(self._buffer), []
        whole = self._request_ended and len(body) <= _INLINE
        headers = self._head.for_plugin
        if self.trace is not None:
            headers = self.trace.headers(headers)
            worker.traced(self.trace)
        self._window = wire.WINDOW
        self._stream = worker.open(
            self,
            lambda id: wire.Request(
                id,
                self._route[0],
                "GET" if self.method == "HEAD" else self.method,
                self.path,
                self.query,
                self._route[1],
                headers,
                self.id,
                body if whole else b"",
                whole,
            ),
        )
        if not whole:
            self._send(body)
            if self._request_ended:
                worker.send(wire.Body(self._stream, b"", True))
        self._resume()

    def _send(self, data: bytes) -> None:
        # What Tornado has read is sent on whole: the window may be overdrawn by one read, then reading stops.
        assert self._worker is not None
        for start in range(0, len(data), wire.CHUNK):
            self._worker.send(wire.Body(self._stream, data[start : start + wire.CHUNK], False))
        self._window -= len(data)

    def credit(self, size: int) -> None:
        self._window += size
        if self._window > wire.WINDOW:
            self._misbehaved("more room than there was")
        elif self._window > 0:
            self._resume()

    def _resume(self) -> None:
        """Read on."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _cancel(self) -> None:
        """Tell the worker, or the queue, that nobody waits any more."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.cancel(self._stream)
        elif self.slot is not None:
            self.slot.forget(self)
        if self._streaming is not None:
            self._streaming.cancel()

    def timed_out(self) -> None:
        """Its deadline has passed: the client's, the queue's or the handler's, depending on who is waited for."""
        if self._closed:  # answered, and the client does not take the rest
            self._connection.close()
            return
        held_up = self._room is not None and not self._room.done()  # we read no more of the body, for want of a taker
        waited, worker = not self._request_ended and not held_up, self._worker
        self._cancel()
        limit = f"{self._front.settings.request_timeout:g} s"
        if self._headed:
            self._break_off()
        elif waited:
            self.refuse(RequestError(f"The request's body did not arrive for {limit}", status=408), last=True)
        elif worker is not None:
            self.refuse(RequestTimeoutError(f"The plugin did not answer within {limit}"))
        else:
            self.refuse(NoWorkerError(f"No worker became free within {limit}"))

    # ---- the answer, from the worker

    def head(self, message: wire.ResponseHead) -> None:
        if self._headed:
            self._misbehaved("an answer with two heads")
            return
        bodiless = message.status in _BODILESS
        try:
            if message.end and not bodiless and self._may_write_whole():
                self._worker = None
                self._write_whole(whole_head(message.status, message.headers, self.base), message)
                return
            headers, length = plugin_headers(message.headers, self.base)
        except BadResponseError:
            if message.end:
                self._worker = None
            self._cancel()
            self.refuse(WorkerLostError("The plugin answered with a malformed header"))
            return
        if message.end:
            self._worker = None
            length = len(message.body)
        if length is not None and not bodiless:
            headers["Content-Length"] = str(length)
        if message.end or bodiless or self.method == "HEAD":
            self._cancel()
            self._write_head(message.status, headers, b"" if bodiless or self.method == "HEAD" else message.body)
            self._end_answer()
            return
        self._remaining = length
        self._wait_for_client(0, self._write_head(message.status, headers, b""))
        if message.body:
            self._more(message.body)

    def body(self, message: wire.Body) -> None:
        if not self._headed:
            self._misbehaved("an answer without a head")
        elif self._more(message.data) and message.end:
            self._worker = None
            if self._remaining:
                self._break_off()
            else:
                self._end_answer()

    def _more(self, data: bytes) -> bool:
        """Take in a piece of the body; whether that was allowed."""
        self._outstanding += len(data)
        if self._remaining is not None:
            self._remaining -= len(data)
        if self._outstanding > wire.WINDOW or (self._remaining is not None and self._remaining < 0):
            self._misbehaved("more of an answer than was announced or granted")
            return False
        if data:
            self._pending.append(data)
            self._write_pending()
        return True

    def failed(self, error: RequestError) -> None:
        self._worker = None
        if self._headed:
            self._break_off()
        else:
            self.refuse(error)

    def _misbehaved(self, how: str) -> None:
        worker = self._worker
        self.failed(WorkerLostError("The plugin broke off its answer"))
        if worker is not None:
            worker.misbehaved(how)

    # ---- the answer, to Tornado

    def refuse(self, error: RequestError, *, last: bool = False) -> None:
        """Answer with an error as JSON; if it is the ``last`` answer on its connection, without the request's rest."""
        if error.status >= 502:
            self.counts.of.refused[error.status, error.reason] += 1
        headers = {**error.headers, "Connection": "close"} if last else error.headers
        self.answer(Answer(error.status, {"error": error.message}, headers))
        if last:
            self._finish()

    def answer(self, answer: Answer) -> None:
        """Answer with something of the host's own."""
        if self._headed or self._closed:
            return
        headers = HTTPHeaders(answer.headers)
        content = answer.body
        if isinstance(content, AsyncIterator):
            self._streaming = self._front.loop.create_task(self._stream_answer(answer.status, headers, content))
            return
        body = b""
        if answer.status not in _BODILESS:
            if isinstance(content, bytes):
                body = content
            else:
                body = msgspec.json.encode(content)
                headers["Content-Type"] = "application/json"
            headers["Content-Length"] = str(len(body))
            headers["X-Content-Type-Options"] = "nosniff"
            headers.setdefault("Cache-Control", "no-store")
        self._write_head(answer.status, headers, b"" if self.method == "HEAD" else body)
        self._end_answer()

    async def _stream_answer(self, status: int, headers: HTTPHeaders, chunks: AsyncIterator[bytes]) -> None:
        """Send ``chunks`` as they come; each is asked for when the client has taken the one before."""
        headers.setdefault("Cache-Control", "no-store")
        headers["X-Content-Type-Options"] = "nosniff"
        try:
            self._write_head(status, headers, b"")
            if self.method != "HEAD":
                async for chunk in chunks:
                    self._front.wait_for(self)  # the client has its time to take it
                    await self._connection.write(chunk)
                    self._front.answering(self)
            self._end_answer()
        except StreamClosedError:
            pass
        except Exception as error:
            get_logger().error("an answer was broken off", path=self.path, reason=repr(error))
            self._break_off()
        finally:
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()

    def _write_head(self, status: int, headers: HTTPHeaders, body: bytes) -> "asyncio.Future[None]":
        self._headed = True
        if not self._request_ended:  # and what comes of it may still turn out not to be HTTP
            self._connection.stream.answering = True  # type: ignore[attr-defined]  # of the host's own kind
        self.status = status
        headers["Date"] = self._front.date()
        headers["Server"] = "hayhost"
        if self._until_close:
            headers["Connection"] = "close"
        elif self.version == "HTTP/1.0" and "Content-Length" not in headers and status not in _BODILESS:
            self._until_close = True  # nothing else tells such a client where the body ends
            self._headers.pop("Connection", None)  # or Tornado promises that the connection stays
        self._front.answered(self)
        future = self._connection.write_headers(start_line(status), headers, body)
        self._resume()  # an upload that nobody wants any more is read to its end and dropped
        return future

    def _may_write_whole(self) -> bool:
        """Whether nothing about this answer's end is for Tornado to decide: most requests are like that."""
        return self._request_ended and self._head.plain and self.version == "HTTP/1.1" and self.method != "HEAD"

    def _write_whole(self, head: bytes, message: wire.ResponseHead) -> None:
        self._headed = True
        self.status = message.status
        self._front.answered(self)
        self._connection.write(
            b"%sContent-Length: %d\r\n%s%s" % (head, len(message.body), self._front.end_of_head(), message.body)
        )
        self._end_answer()

    def _write_pending(self) -> None:
        if not self._writing and self._pending and not self._closed:
            data, self._pending = b"".join(self._pending), []
            self._wait_for_client(len(data), self._connection.write(data))

    def _wait_for_client(self, size: int, written: "asyncio.Future[None]") -> None:
        """Write nothing more, and grant the worker nothing more, until the client has taken ``size`` bytes."""
        self._writing += 1
        self._front.wait_for(self)

        def done(_future: "asyncio.Future[None]") -> None:
            self._writing -= 1
            if self._closed:
                return
            self._front.answering(self)
            self._outstanding -= size
            if size and self._worker is not None:
                self._worker.send(wire.Window(self._stream, size))
            self._write_pending()

        written.add_done_callback(done)

    def _end_answer(self) -> None:
        self._answer_ended = True
        if self._request_ended:
            self._finish()
        elif not self._closed:
            self._front.wait_for(self)  # not for ever: the client may be sending something endless

    def _finish(self) -> None:
        if self._closed:
            return
        if self._pending:
            self._connection.write(b"".join(self._pending))
            self._pending.clear()
        self._closed = True
        self._resume()
        stream = self._connection.stream
        self._connection.finish()
        if stream.writing():  # it is over when the client has taken it all, for which it has its time
            self._front.wait_for(self)
            stream.write(b"").add_done_callback(lambda _: self._taken())
        else:
            self._taken()

    def _taken(self) -> None:
        self._front.closed(self)
        if self._until_close:
            self._connection.close()

    def _break_off(self) -> None:
        """Close the connection, so that the client cannot take what it has for the whole."""
        if not self._closed:
            self.counts.of.broken_off += 1
            self._close()
            self._connection.close()

    def _close(self) -> None:
        self._closed = True
        self._resume()
        self._front.closed(self)
