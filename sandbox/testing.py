"""The test kit for plugin authors: a plugin's hooks, routes and tools in a plain pytest, with no host and no processes.

    from pathlib import Path
    from sandbox.testing import PluginHarness

    def test_hello() -> None:
        with PluginHarness(Path(__file__).parent, config={"greeting": "Hi"}, org_id="acme") as plugin:
            assert plugin.request("GET", "/hello/Ada").json() == {"message": "Hi, Ada!"}

It loads the plugin and calls it through the same pieces as a worker of the host, so what passes here passes there.
Between ``with`` and its end the test's process looks like that worker: the plugin's folder is the working directory
and first on ``sys.path``, ``os.environ`` is the fixed minimal set, and the plugin's modules are its own, fresh for
every harness. Async code runs on an event loop of its own thread, sync handlers and hooks on threads.

What is different from the host, on purpose:

* An error of the plugin is raised in the test. The host would log it, answer 500 or go on, as the contract says.
* Nothing is confined, and ``permissions`` in the manifest have no effect: a mock provider on loopback is reachable.
* ``print`` and ``logging`` are left to pytest; ``plugin.logs`` has what went through ``ctx.logger``.

In an async test, use ``async with`` and call the methods with ``await asyncio.to_thread(plugin.request, ...)``.
"""

import asyncio
import inspect
import itertools
import json as json_text
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import msgspec

from hayhost.sdk import (
    AuthReader,
    AuthState,
    HayAuthValidationContext,
    HayConfigUpdateContext,
    HayDisableContext,
    HayEnableContext,
    HayGlobalContext,
    HayStartContext,
    Headers,
    HTTPError,
    Logger,
    Mcp,
    McpInitContext,
    Org,
    OrgConfig,
    Request,
)
from hayhost.sdk._checks import check
from hayhost.sdk._registry import RESERVED_PATHS, Registry
from hayhost.sdk.logger import Level

from . import wire
from .answers import Answer, error_answer, render, stream_type
from .dispatch import END, Caller, Handler, item_bytes
from .loader import LoadedPlugin, author_traceback, find_plugin, import_entry
from .mcp import McpRuntime, NoSuchToolError, ToolFailedError
from .standin import LoopThread, World, find_route, read_manifest

__all__ = ["LogRecord", "NoSuchToolError", "PluginHarness", "PluginResponse"]

T = TypeVar("T")

_NOT_GIVEN: Final = object()
_STOP_SECONDS: Final = 5.0


class LogRecord(NamedTuple):
    """What the plugin logged; ``meta`` is as it was given."""

    level: Level
    message: str
    meta: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class PluginResponse:
    """A route's answer. ``chunks`` are the pieces of a streamed answer as they were produced, else the one body."""

    status: int
    headers: Headers
    chunks: tuple[bytes, ...]

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(self.chunks)

    @property
    def text(self) -> str:
        """The body as UTF-8."""
        return self.body.decode()

    def json(self) -> Any:
        """The body as JSON. Raises ``ValueError`` if it is not."""
        return json_text.loads(self.body)


class PluginHarness:
    """One plugin for one org. See the module's text for how to use it, and for what is different from the host.

    ``folder`` has the manifest. ``config`` and ``auth`` (``{"methodId": ..., "credentials": {...}}``) are what the
    store would hold for the org; ``env`` is the host's environment, of which the plugin sees what its manifest
    allows. Whatever takes longer than ``timeout`` seconds raises ``TimeoutError``.

    Entering raises what the host would report as a load error: ``PluginError`` and what the plugin itself raises.
    Leaving stops the plugin if it still runs. Methods may be called from several threads, for concurrent requests.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        auth: Mapping[str, Any] | None = None,
        org_id: str = "test",
        org_name: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> None:
        self.spec: Final = read_manifest(Path(folder), timeout)
        self.org: Final = Org(org_id, f"Test Org {org_id}" if org_name is None else org_name)
        self.logs: Final[list[LogRecord]] = []
        self._config = _plain(dict(config or {}))
        self._auth = _auth_state(auth) if auth else None
        self._env = {name: value for name, value in (env or {}).items() if name in self.spec.env}
        self._logger = Logger(self._log)
        self._ids = itertools.count(1)
        self._loaded: _Loaded | None = None
        self._worker: _Worker | None = None

    # Loading

    def __enter__(self) -> Self:
        if self._loaded is not None:
            raise RuntimeError("this harness is in use already")
        world, thread = World(self.spec.folder), LoopThread(self.spec.hook_timeout)
        try:
            world.enter()
            module = import_entry(self.spec)
            registry = Registry(self.spec.capabilities, self.spec.env)
            ctx = HayGlobalContext(registry, self._logger)
            title, hooks = find_plugin(module, self.spec.attribute).create(ctx)
            if initialize := hooks.get("on_initialize"):
                thread.run("on_initialize", _initialize(initialize, ctx))
            registry.freeze()
        except BaseException:
            thread.close()
            world.leave()
            raise
        for warning in registry.warnings:
            self._log("warning", warning)
        plugin = LoadedPlugin(self.spec, title, hooks, registry)
        self._loaded = _Loaded(world, thread, Caller(thread.loop), module, plugin)
        thread.loop.set_exception_handler(self._loop_failed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loaded = self._use()
        try:
            self.stop()
        except Exception as problem:
            if error is None:
                raise
            self._failed("on_stop failed", problem)  # the test has an error of its own, which says more
        finally:
            self._loaded = None
            loaded.thread.close()
            loaded.world.leave()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    @property
    def module(self) -> ModuleType:
        """The plugin's entry module, for instance to name an exception class that a test expects."""
        return self._use().module

    @property
    def state(self) -> dict[str, Any]:
        """``ctx.state`` of the running worker. Raises ``RuntimeError`` if none runs."""
        if self._worker is None:
            raise RuntimeError("the plugin does not run: call start() first")
        return self._worker.context.state

    def metadata(self) -> dict[str, Any]:
        """The answer to ``GET /metadata``, as decoded JSON."""
        servers = [server for server in self._worker.servers if server.state == "running"] if self._worker else []
        local = [{"id": server.id} for server in servers if server.kind != "external"]
        external = [{"id": server.id, "url": server.url} for server in servers if server.kind == "external"]
        static = self._use().plugin.registry.metadata()
        metadata: dict[str, Any] = _plain({**static, "mcp": {"local": local, "external": external}})
        return metadata

    # The life of an org's worker

    def start(self) -> None:
        """Start the worker, with a new ``state``, and run ``on_start``.

        Requests and tools start it too, as the host does. After an ``on_start`` that raised it runs, as ``degraded``.
        """
        if self._worker is not None:
            raise RuntimeError("the plugin runs already: stop() or disable() it first")
        self._run("on_start", self._start)

    def stop(self) -> None:
        """Run ``on_stop`` and stop the worker with its MCP servers, as for idleness or shutdown."""
        if self._worker is not None:
            self._run("on_stop", self._end, "on_stop")

    def enable(self) -> None:
        """Run ``on_enable``, as when the plugin is installed or enabled again."""
        context = HayEnableContext(self.org, self._org_config(self._config), self._logger)
        self._run("on_enable", self._hook, "on_enable", context)

    def disable(self) -> None:
        """Run ``on_disable`` and stop the worker with its MCP servers. ``on_stop`` is not called."""
        self._run("on_disable", self._end, "on_disable")

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Replace the org's settings, run ``on_config_update``, and restart the worker with them if it runs."""
        self._config = _plain(dict(config))
        context = HayConfigUpdateContext(self.org, self._org_config(self._config), self._logger)
        self._run("on_config_update", self._hook, "on_config_update", context)
        if self._worker is not None:
            self.stop()
            self.start()

    def validate_auth(self, auth: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> bool:
        """The result of ``on_validate_auth``; without that hook all credentials are valid.

        The hook's config is the org's, overlaid with ``config``, overlaid with the credentials. Nothing is saved.
        """
        state = _auth_state(auth)
        if "on_validate_auth" not in self._use().plugin.hooks:
            return True
        values = _plain({**self._config, **(config or {}), **state.credentials})
        context = HayAuthValidationContext(self.org, self._org_config(values), AuthReader(state), self._logger)
        valid = self._run("on_validate_auth", self._hook, "on_validate_auth", context)
        check(valid, bool, "the result of on_validate_auth")
        return bool(valid)

    # What a running worker answers

    def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | str = b"",
        json: object = _NOT_GIVEN,
        headers: Mapping[str, str] | None = None,
    ) -> PluginResponse:
        """Send a request to the plugin's routes; ``path`` may have a query. A streamed answer is read to its end.

        ``json`` is sent as the body, with its content type. Raises what the handler raises, but for ``HTTPError``,
        which is its answer; and ``ValueError`` for a path that the host answers itself.
        """
        path, _, query = path.partition("?")
        if not path.startswith("/"):
            raise ValueError(f"a path starts with '/': {path!r}")
        if path in RESERVED_PATHS:
            raise ValueError(f"{path} is answered by the host and never reaches the plugin; use the harness's methods")
        sent = [(name, value) for name, value in (headers or {}).items()]
        content = body.encode() if isinstance(body, str) else body
        if json is not _NOT_GIVEN:
            content = msgspec.json.encode(json)
            sent.append(("content-type", "application/json"))
        worker = self._started()
        found = find_route(self._use().plugin.registry.routes, method, path)
        if isinstance(found, set):
            return _no_route(method, found)
        handler, params = found
        request = Request(
            method=method,
            path=path,
            ctx=worker.context,
            params=params,
            query_string=query,
            headers=sent,
            body=content,
            id=f"test-{next(self._ids)}",
        )
        response = self._run(f"{method} {path}", self._answer, handler, request)
        return replace(response, chunks=()) if method == "HEAD" else response

    def list_tools(self) -> list[dict[str, Any]]:
        """The tools of all running MCP servers. One that fails to list them is left out, and ``logs`` says so."""
        tools: list[dict[str, Any]] = _plain(self._run("list_tools", self._started().mcp.list_tools))
        return tools

    def call_tool(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """The result of a tool, as decoded JSON. Raises what the tool raises; ``NoSuchToolError`` if there is none."""
        call = self._started().mcp.call_tool
        try:
            return _plain(self._run(f"tool {name!r}", call, name, _plain(dict(arguments or {}))))
        except ToolFailedError as error:
            failure = error.__cause__ or error
        raise failure  # outside of the except block: its own cause and context stay as the tool left them

    # Inside

    def _use(self) -> "_Loaded":
        if self._loaded is None:
            raise RuntimeError("use the harness in a with statement: `with PluginHarness(...) as plugin:`")
        self._loaded.world.enter()  # another harness may have been used in between
        return self._loaded

    def _run(self, what: str, function: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        return self._use().thread.run(what, function(*arguments))

    def _started(self) -> "_Worker":
        if self._worker is None:
            self.start()
        assert self._worker is not None  # start() has set it, or raised
        return self._worker

    async def _hook(self, name: str, context: Any) -> Any:
        loaded = self._use()
        function = loaded.plugin.hooks.get(name)
        return None if function is None else await loaded.call(function, context)

    async def _start(self) -> None:
        loaded = self._use()
        servers: list[wire.McpServer] = []

        def changed(now: list[wire.McpServer]) -> None:
            servers[:] = now

        config, auth = self._org_config(self._config), AuthReader(self._auth)
        mcp = McpRuntime(
            self.spec,
            McpInitContext(config, auth, self._logger),
            loaded.call,
            lambda call: loaded.plugin.registry.need("mcp", call),
            changed,
            lambda notice: None,
            self._failed,
        )
        context = HayStartContext(self.org, config, auth, Mcp(mcp), {}, self._logger)
        self._worker = _Worker(context, mcp, servers)
        await self._hook("on_start", context)

    async def _end(self, hook: str) -> None:
        worker, self._worker = self._worker, None
        try:
            await self._hook(hook, HayDisableContext(self.org, self._logger))
        finally:
            if worker is not None:
                await worker.mcp.stop(_STOP_SECONDS)

    async def _answer(self, handler: Handler, request: Request) -> PluginResponse:
        call = self._use().call
        try:
            answer = render(await call(handler, request))
        except HTTPError as error:
            answer = error_answer(error.status, error.message)
        if isinstance(answer.body, bytes):
            return _response(answer)
        headers = list(answer.headers)
        chunks: list[bytes] = []
        began = any(name == "content-type" for name, _ in headers)  # the host has sent the head by now
        try:
            while True:
                item = await call.next(answer.body)
                data = item_bytes(item)
                if not began:
                    began = True
                    headers.append(("content-type", stream_type("" if item is END else item)))
                if item is END:
                    return PluginResponse(answer.status, Headers(headers), tuple(chunks))
                chunks.append(data)
        except HTTPError as error:
            if began:
                raise
            return _response(error_answer(error.status, error.message))
        finally:
            await _close(answer.body)

    def _org_config(self, values: Mapping[str, Any]) -> OrgConfig:
        schema = self._use().plugin.registry.config
        return OrgConfig(schema, values, self._env, lambda message: self._log("warning", message))

    def _log(self, level: Level, message: str, meta: Mapping[str, Any] | None = None) -> None:
        self.logs.append(LogRecord(level, message, meta))
        # For the "captured log" that pytest shows with a failure.
        text = f"{message} {dict(meta)}" if meta else message
        logging.getLogger(f"hayhost.plugin.{self.spec.name}").log(getattr(logging, level.upper()), "%s", text)

    def _failed(self, what: str, error: BaseException) -> None:
        summary = f"{what}: {type(error).__name__}: {error}"
        self._log("error", summary, {"traceback": author_traceback(error, self.spec.folder)})

    def _loop_failed(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        what = str(context.get("message", "a task failed"))
        error = context.get("exception")
        if isinstance(error, BaseException):
            self._failed(what, error)
        else:
            self._log("error", what)


class _Loaded(NamedTuple):
    world: World
    thread: LoopThread
    call: Caller
    module: ModuleType
    plugin: LoadedPlugin


class _Worker(NamedTuple):
    context: HayStartContext
    mcp: McpRuntime
    servers: list[wire.McpServer]


async def _initialize(hook: Callable[[Any], Any], ctx: HayGlobalContext) -> None:
    result = hook(ctx)  # on the loop's thread, which stands for the main thread that the host calls it in
    if inspect.isawaitable(result):
        await result


async def _close(stream: Iterator[Any] | AsyncIterator[Any]) -> None:
    if hasattr(stream, "aclose"):
        await stream.aclose()
    elif hasattr(stream, "close"):
        stream.close()


def _no_route(method: str, allowed: set[str]) -> PluginResponse:
    if not allowed:
        return _response(error_answer(404, "The plugin has no such route"))
    allow = ", ".join(sorted(allowed | {"OPTIONS"}))
    if method == "OPTIONS":
        return PluginResponse(204, Headers([("allow", allow)]), ())
    return _response(error_answer(405, f"This path answers {allow}"), ("allow", allow))


def _response(answer: Answer, *headers: tuple[str, str]) -> PluginResponse:
    assert isinstance(answer.body, bytes)  # not a streamed one
    return PluginResponse(answer.status, Headers([*answer.headers, *headers]), (answer.body,))


def _auth_state(given: Mapping[str, Any]) -> AuthState:
    method, credentials = given.get("methodId"), given.get("credentials")
    if not isinstance(method, str) or not isinstance(credentials, Mapping):
        raise TypeError('auth is {"methodId": "...", "credentials": {...}}')
    return AuthState(method, _plain(dict(credentials)))


def _plain(value: Any) -> Any:
    """``value`` as it is after a way through JSON, as everything that passes between host and plugin is."""
    return msgspec.json.decode(msgspec.json.encode(value))
