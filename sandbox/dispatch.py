"""Requests in a worker: from frames to a handler's call, and from its result to frames."""

import asyncio
import contextvars
import inspect
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, Final

import msgspec

from hayhost.sdk import HayStartContext, HTTPError, Request

from . import wire
from .answers import Answer, error_answer, render, stream_type
from .capture import request_id
from .link import Link
from .mcp import McpError, McpRuntime, NoSuchToolError, ToolFailedError, encode
from .tracing import Handling, Tracing

__all__ = ["END", "Caller", "Dispatcher", "Handler", "item_bytes"]

Handler = Callable[[Request], Any]

# Sync handlers that run at once; more wait. Enough for handlers that block on a network, few enough for memory.
_THREADS: Final = 32
_LINES: Final = [("content-type", "application/x-ndjson")]
END: Final = object()
"""What ``Caller.next`` gives after the last item."""


class Caller:
    """Calls an author's function: async ones on the loop, sync ones on a thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:  # not before it is needed: many plugins are async all through
        return ThreadPoolExecutor(_THREADS, thread_name_prefix="handler")

    async def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result. A thread goes on when its caller is cancelled: see ``thread_jobs``."""
        if inspect.iscoroutinefunction(function):
            return await function(*arguments)
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            return function(*arguments)  # runs nothing yet
        result = await self._on_thread(function, *arguments)
        return await result if inspect.isawaitable(result) else result

    def close(self) -> None:
        """Let the threads end; a function that runs on one goes on."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def next(self, iterator: Any) -> Any:
        """The next item of a (sync or async) iterator, ``END`` after the last."""
        if isinstance(iterator, AsyncIterator):
            return await anext(iterator, END)
        return await self._on_thread(next, iterator, END)

    async def _on_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        job: Future[Any] = self._threads.submit(contextvars.copy_context().run, _no_iteration, function, *arguments)
        if (jobs := thread_jobs.get()) is not None:
            jobs[:] = [*(other for other in jobs if not other.done()), job]
        return await asyncio.wrap_future(job, loop=self._loop)

    async def close_iterator(self, iterator: Any) -> None:
        """Let a generator's ``finally`` run, where the rest of it runs and not at the same time."""
        if hasattr(iterator, "aclose"):
            await iterator.aclose()
        elif hasattr(iterator, "close"):
            if jobs := thread_jobs.get():
                ended = asyncio.Event()
                jobs[-1].add_done_callback(lambda _: self._loop.call_soon_threadsafe(ended.set))
                await ended.wait()
            await self._on_thread(iterator.close)


def _no_iteration(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except (StopIteration, GeneratorExit) as error:  # they would end the coroutine that waits, not pass through it
        raise RuntimeError(f"{type(error).__name__} was raised outside of a generator") from error


thread_jobs: contextvars.ContextVar[list["Future[Any]"] | None] = contextvars.ContextVar("thread_jobs", default=None)
"""The jobs that the current request has put on threads, so that its end can be told from its cancellation."""


class _Exchange:
    """One request: its body until it is complete, then the task that answers it."""

    __slots__ = ("begun", "body", "credit", "handling", "jobs", "more_credit", "request", "task", "unwanted")

    def __init__(self, request: wire.Request) -> None:
        self.request = request
        self.body = [request.body]
        self.task: asyncio.Task[None] | None = None
        self.jobs: list[Future[Any]] = []
        self.handling: Handling | None = None
        self.credit = wire.WINDOW
        self.more_credit: asyncio.Future[None] | None = None
        self.begun = False
        self.unwanted = False


class Dispatcher:
    """Answers the requests of one worker, all of them concurrently.

    Every stream ends with exactly one final frame, ``end`` or ``Abort``, and only when nothing of its handler runs
    any more: a cancelled one that goes on is thereby seen from outside.
    """

    def __init__(
        self,
        link: Link,
        loop: asyncio.AbstractEventLoop,
        handlers: list[Handler],
        context: HayStartContext,
        call: Caller,
        mcp: McpRuntime,
        failed: Callable[[str, BaseException], None],
        tracing: Tracing | None = None,
    ) -> None:
        self._link = link
        self._loop = loop
        self._handlers = handlers
        self._context = context
        self._call = call
        self._mcp = mcp
        self._failed = failed
        self._tracing = tracing
        self._exchanges: dict[int, _Exchange] = {}

    def request(self, message: wire.Request) -> None:
        exchange = self._exchanges[message.id] = _Exchange(message)
        if message.end:
            self._begin(exchange)
        elif message.body:
            self._link.send(wire.Window(message.id, len(message.body)))

    def body(self, message: wire.Body) -> None:
        exchange = self._exchanges.get(message.id)
        if exchange is None or exchange.task is not None:
            return
        exchange.body.append(message.data)
        if message.end:
            self._begin(exchange)
        elif message.data:
            self._link.send(wire.Window(message.id, len(message.data)))

    def window(self, message: wire.Window) -> None:
        if exchange := self._exchanges.get(message.id):
            exchange.credit += message.size
            if exchange.more_credit and not exchange.more_credit.done():
                exchange.more_credit.set_result(None)

    def cancel(self, message: wire.Cancel) -> None:
        exchange = self._exchanges.get(message.id)
        if exchange is None:
            return
        exchange.unwanted = True
        if exchange.task is not None:
            exchange.task.cancel()
        if not exchange.begun:  # nor will it ever: a task that is cancelled before its first step does not make it
            self._end(message.id, wire.Abort(message.id))

    def _begin(self, exchange: _Exchange) -> None:
        context = contextvars.copy_context()
        context.run(request_id.set, exchange.request.request_id)
        context.run(thread_jobs.set, exchange.jobs)
        if self._tracing is not None:
            exchange.handling = context.run(self._tracing.begin, exchange.request)
        exchange.task = self._loop.create_task(self._answer(exchange), context=context)

    async def _answer(self, exchange: _Exchange) -> None:
        id = exchange.request.id
        exchange.begun = True
        final: wire.Message
        try:
            answer = await self._produce(exchange)
            if isinstance(answer.body, bytes):
                final = await self._whole(exchange, answer.status, answer.headers, answer.body)
            else:
                final = await self._stream(exchange, answer)
        except asyncio.CancelledError:
            final = wire.Abort(id)
        except BaseException as error:  # a stream that broke: sys.exit() in it is no different from another error
            self._failed(f"the streamed answer to {exchange.request.method} {exchange.request.path} broke off", error)
            final = wire.Abort(id)
        running = [job for job in exchange.jobs if not job.done()]
        if running:  # cancelled, but a thread of it is still at work
            running[-1].add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._end, id, final))
        else:
            self._end(id, final)

    def _end(self, id: int, final: wire.Message) -> None:
        if (exchange := self._exchanges.pop(id, None)) is not None:
            if exchange.handling is not None and self._tracing is not None:
                failed = isinstance(final, wire.Abort) or (isinstance(final, wire.ResponseHead) and final.status >= 500)
                self._tracing.end(exchange.handling, failed)
            self._link.send(final, now=not self._exchanges)

    async def _produce(self, exchange: _Exchange) -> Answer:
        message = exchange.request
        try:
            if message.route == wire.LIST_TOOLS:
                return render({"tools": _allowed(await self._mcp.list_tools(), b"".join(exchange.body))})
            if message.route == wire.CALL_TOOL:
                return await self._call_tool(b"".join(exchange.body))
            if message.route == wire.MCP:
                return Answer(200, _LINES, self._mcp.answer(b"".join(exchange.body)))
            request = Request(
                method=message.method,
                path=message.path,
                query_string=message.query,
                params=dict(zip(message.params[::2], message.params[1::2], strict=True)),
                headers=message.headers,
                body=exchange.body[0] if len(exchange.body) == 1 else b"".join(exchange.body),
                ctx=self._context,
                id=message.request_id,
            )
            exchange.body.clear()
            return render(await self._call(self._handlers[message.route], request))
        except HTTPError as error:
            return error_answer(error.status, error.message)
        except BaseException as error:  # sys.exit() in a handler ends that request, not the worker
            if isinstance(error, asyncio.CancelledError) and exchange.unwanted:
                raise  # the client's cancellation; the author's own is an error like others
            self._failed(f"{message.method} {message.path} failed", error)
            return error_answer(500, "Internal server error")

    async def _call_tool(self, body: bytes) -> Answer:
        call = msgspec.json.decode(body)  # the front has checked it
        name = call["toolName"]
        try:
            result = await self._mcp.call_tool(name, call.get("arguments") or {})
        except NoSuchToolError:
            return error_answer(404, f"No MCP server found for tool: {name}")
        except ToolFailedError as error:
            self._failed(f"MCP tool {name!r} failed", error.__cause__ or error)
            return error_answer(500, f"Tool execution failed: {error}")
        try:
            return Answer(200, [("content-type", "application/json")], encode(result))
        except McpError as error:
            self._failed(f"MCP tool {name!r} returned something that cannot be passed on", error)
            return error_answer(500, f"Tool execution failed: {error}")

    async def _whole(self, exchange: _Exchange, status: int, headers: Any, body: bytes) -> wire.Message:
        id = exchange.request.id
        if len(body) <= wire.CHUNK:
            return wire.ResponseHead(id, status, headers, body, True)
        self._link.send(wire.ResponseHead(id, status, [*headers, ("content-length", str(len(body)))], b"", False))
        await self._send_body(exchange, body)
        return wire.Body(id, b"", True)

    async def _stream(self, exchange: _Exchange, answer: Answer) -> wire.Message:
        id, iterator = exchange.request.id, answer.body
        head = answer.headers
        began = any(name == "content-type" for name, _ in head)
        length = next((int(value) for name, value in head if name == "content-length"), None)
        try:
            if began:
                self._link.send(wire.ResponseHead(id, answer.status, head, b"", False))
            while True:
                try:
                    item = await self._call.next(iterator)
                    data = item_bytes(item)
                except (Exception, SystemExit) as error:
                    if began:
                        raise
                    if isinstance(error, HTTPError):
                        status, headers, body = error_answer(error.status, error.message)
                    else:
                        what = f"{exchange.request.method} {exchange.request.path} failed before its first item"
                        self._failed(what, error)
                        status, headers, body = error_answer(500, "Internal server error")
                    return await self._whole(exchange, status, headers, body)  # type: ignore[arg-type]  # bytes: an error
                if not began:
                    began = True
                    kind = stream_type("" if item is END else item)
                    self._link.send(wire.ResponseHead(id, answer.status, [*head, ("content-type", kind)], b"", False))
                if length is not None:
                    length -= len(data)
                    if length < 0 or (length and item is END):
                        raise ValueError("the streamed body is not as long as the Content-Length of its Response")
                if item is END:
                    return wire.Body(id, b"", True)
                await self._send_body(exchange, data)
                await asyncio.sleep(0)  # a generator may never wait for anything: the loop is not its own
        finally:
            await self._close(iterator)

    async def _close(self, iterator: Any) -> None:
        """Let a generator's ``finally`` run, also when nobody reads it to its end."""
        try:
            await self._call.close_iterator(iterator)
        except Exception as error:
            self._failed("closing a streamed answer failed", error)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                raise

    async def _send_body(self, exchange: _Exchange, data: bytes) -> None:
        id, view = exchange.request.id, memoryview(data)
        while view:
            while exchange.credit <= 0:
                exchange.more_credit = self._loop.create_future()
                await exchange.more_credit
            size = min(len(view), wire.CHUNK, exchange.credit)
            exchange.credit -= size
            self._link.send(wire.Body(id, bytes(view[:size]), False))
            view = view[size:]
            if view:
                await asyncio.sleep(0)  # let other streams of this worker in between


def _allowed(tools: list[dict[str, Any]], body: bytes) -> list[dict[str, Any]]:
    """Those of ``tools`` that the org's clients may use, by a body as in ``wire.LIST_TOOLS``."""
    if not body:
        return tools
    prefix, allow, deny = msgspec.json.decode(body, type=tuple[str, str, str])
    names = [(tool, f"{prefix}{tool['name']}") for tool in tools]
    return [tool for tool, name in names if re.match(allow, name) and not re.match(deny, name)]


def item_bytes(item: object) -> bytes:
    """One item of a streamed answer as bytes. Raises ``TypeError``, for the author, if it is neither bytes nor str."""
    if item is END:
        return b""
    if isinstance(item, str):
        return item.encode()
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    raise TypeError(f"a streamed answer consists of bytes or str, not {type(item).__name__}")
