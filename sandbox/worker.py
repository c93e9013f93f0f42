"""A worker: one plugin for one org, forked from the plugin's zygote without an identity.

Org, config and credentials arrive in the ``Start`` frame, never through the environment, argv or the zygote's memory.
"""

import asyncio
import gc
import inspect
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import thread as thread_pools
from typing import Any, Final, NoReturn

import dill
import msgspec

from hayhost.sdk import (
    AuthReader,
    AuthState,
    HayAuthValidationContext,
    HayConfigUpdateContext,
    HayDisableContext,
    HayEnableContext,
    HayStartContext,
    Logger,
    Mcp,
    McpInitContext,
    Org,
    OrgConfig,
)
from hayhost.sdk._checks import check

from . import confinement, network, processes, programs, refusals, wire
from .capture import Capture
from .dispatch import Caller, Dispatcher
from .link import Link
from .loader import LoadedPlugin, author_traceback, describe
from .mcp import McpRuntime
from .tracing import Tracing

__all__ = ["run"]

# How long a stopping worker waits for a front that does not read its last frames.
_LAST_WRITE: Final = 2.0
_MCP_STOP: Final = 5.0
# How long an on_start that is cancelled, as the worker is to stop, may take to end before the hook that follows it.
_GIVE_UP_START: Final = 1.0
_DUMP_ATTEMPTS: Final = 5
# What Python from 3.12 on counts on for its own recursion; what a program is started with may be less.
_STACK: Final = 8 << 20
_Then = Callable[[], Awaitable[None]] | None


def run(
    plugin: LoadedPlugin,
    capture: Capture,
    prepared: confinement.Prepared | None,
    scratch: str,
    proxy: int,
    descriptor: int,
    output: int,
    broker: int = -1,
) -> NoReturn:
    """Be a worker; the body of a forked process.

    ``prepared`` is its confinement if that could be made ready before, ``scratch`` the folder that it may write to,
    ``proxy`` the port that its programs may connect to, or 0, ``descriptor`` its socket, ``output`` where raw output
    goes, ``broker`` its socket to the egress broker if it may connect to anything.
    """
    stamps: list[wire.Stamp] = [("forked", time.monotonic_ns())]
    _detach(output)
    sock = socket.socket(fileno=descriptor)
    try:
        prepared = prepared or confinement.Prepared(plugin.spec.plan)
        confinement.after_fork(prepared, {descriptor, broker}, scratch, proxy)
    except OSError as error:
        sock.sendall(wire.encode(wire.Failed(f"it cannot be isolated: {error}")))
        os._exit(1)
    stamps.append(("confined", time.monotonic_ns()))
    sock.sendall(wire.encode(wire.Hello(wire.VERSION, stamps)))
    _settle(plugin.spec.plan, scratch, broker)  # while the front looks at this process; nothing is opened until it has
    select.select([sock], [], [])
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    link = Link(sock, loop)
    capture.rebind(link.send_now, loop)
    worker = _Worker(plugin, capture, link, loop)
    link.listen(worker.receive)
    try:
        loop.run_forever()
    except SystemExit as error:  # sys.exit() in a task of the author's own: that is the end of the worker
        capture.log("error", f"the plugin called sys.exit({error.code!r})")
        os._exit(error.code if isinstance(error.code, int) else 1)
    except BaseException as error:
        capture.log(
            "error", "the worker's event loop ended", {"traceback": author_traceback(error, plugin.spec.folder)}
        )
    os._exit(1)


def _detach(output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        os.setsid()  # a group of its own, so that what it starts can be ended with it
    except PermissionError:
        pass  # a zygote that turned into the worker leads a session already


def _settle(plan: confinement.Plan, scratch: str, broker: int) -> None:
    processes.set_child_subreaper()  # what it starts stays below it, however it is started
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if "numpy.random" in sys.modules:  # the standard generators reseed themselves after a fork
        sys.modules["numpy.random"].seed()
    threading.stack_size(_STACK)
    gc.enable()
    # Without it what is forked in a handler waits at its end for the pool's threads, of which it is one: exit code 1.
    os.register_at_fork(after_in_child=thread_pools._threads_queues.clear)  # type: ignore[attr-defined]
    if scratch:
        os.environ["HOME"] = os.environ["TMPDIR"] = scratch
        if "tempfile" in sys.modules:
            vars(sys.modules["tempfile"])["tempdir"] = None  # it may have looked in the zygote's environment
    refusals.refuse_forks(plan)
    if plan.layers:
        network.use(broker if broker >= 0 else None)


class _Worker:
    def __init__(self, plugin: LoadedPlugin, capture: Capture, link: Link, loop: asyncio.AbstractEventLoop) -> None:
        self._plugin = plugin
        self._capture = capture
        self._link = link
        self._loop = loop
        self._starting: asyncio.Task[Any] | None = None
        """``on_start``, once it runs."""
        self._stopping = False
        self._call = Caller(loop)
        self._logger = Logger(capture.log)
        self._tasks: set[asyncio.Task[None]] = set()
        self._carried: list[bytes] = []
        self._state: dict[str, Any] = {}
        self._receive: dict[type, Callable[[Any], None]] = {
            wire.Start: lambda message: self._spawn(self._start(message)),
            wire.Hook: lambda message: self._spawn(self._hook(message)),
            wire.Stop: lambda message: self._spawn(self._stop(message)),
            wire.State: self._take_state,
            wire.DumpState: lambda _: self._dump_state(),
            wire.Admitted: lambda _: None,
            wire.Ping: lambda message: link.send(wire.Pong(message.id)),
        }
        loop.set_exception_handler(self._loop_failed)

    def receive(self, message: wire.ToWorker) -> None:
        self._receive[type(message)](message)

    def _spawn(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _failed(self, what: str, error: BaseException) -> None:
        """Tell the author, and nobody else, what went wrong."""
        summary = f"{what}: {describe(error)}"
        if help := refusals.hint(error, self._plugin.spec.plan):
            summary += f" ({help})"
        self._capture.log("error", summary, {"traceback": author_traceback(error, self._plugin.spec.folder)})

    def _loop_failed(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception):
            self._failed(str(context.get("message", "a task failed")), error)
        else:
            self._capture.log("error", str(context.get("message", "the event loop reports an error")))

    async def _start(self, start: wire.Start) -> None:
        stamps: list[wire.Stamp] = [("identity", time.monotonic_ns())]
        self._hook_timeout = start.hook_timeout
        self._org = Org(start.org_id, start.org_name)
        if start.proxy:
            programs.use_proxy(start.proxy)
        self._env: dict[str, str] = msgspec.json.decode(start.env)
        self._take(start.config, start.auth)
        init = McpInitContext(self._config, self._auth, self._logger)
        registry = self._plugin.registry
        self._mcp = McpRuntime(
            self._plugin.spec,
            init,
            self._call,
            lambda call: registry.need("mcp", call),
            lambda servers: self._link.send(wire.McpServers(servers)),
            self._link.send,
            self._failed,
        )
        self._load_state()
        context = HayStartContext(self._org, self._config, self._auth, Mcp(self._mcp), self._state, self._logger)
        dispatcher = Dispatcher(
            self._link,
            self._loop,
            [handler for _, _, handler in registry.routes],
            context,
            self._call,
            self._mcp,
            self._failed,
            Tracing(self._link.send_now, [f"{method} {path}" for method, path, _ in registry.routes])
            if self._plugin.spec.tracing
            else None,
        )
        error = start.degraded
        if start.serve:
            error = await self._run_hook("on_start", context, self._mcp.settle) or error
            if self._stopping:
                return
            stamps.append(("on_start", time.monotonic_ns()))
        self._receive[wire.Request] = dispatcher.request
        self._receive[wire.Body] = dispatcher.body
        self._receive[wire.Window] = dispatcher.window
        self._receive[wire.Cancel] = dispatcher.cancel
        self._link.send(wire.Ready(error, stamps))

    def _take(self, config: bytes, auth: bytes) -> None:
        self._values: dict[str, Any] = msgspec.json.decode(config)
        given = msgspec.json.decode(auth)
        state = AuthState(given["methodId"], given["credentials"]) if given else None
        self._auth = AuthReader(state)
        self._config = OrgConfig(self._plugin.registry.config, self._values, self._env, self._warn)

    def _warn(self, message: str) -> None:
        self._capture.log("warning", message)

    async def _run_hook(self, name: str, context: Any, then: _Then = None) -> str:
        """Run one hook, and ``then``, under the hook's time limit; the error text if one raised, else empty."""
        return (await self._run_hook_for(name, context, then))[1]

    async def _run_hook_for(self, name: str, context: Any, then: _Then = None) -> tuple[Any, str]:
        function = self._plugin.hooks.get(name)
        if function is None:
            return None, ""
        task = self._loop.create_task(self._guarded(function, context, then))
        if name == "on_start":
            self._starting = task
        await asyncio.wait({task}, timeout=self._hook_timeout)
        if not task.done():
            task.cancel()  # and not waited for: it may refuse
            error: BaseException | None = TimeoutError(f"{name} did not finish within {self._hook_timeout:g} s")
            value = None
        else:
            value, error = task.result()
        if error is None or (task is self._starting and self._stopping):
            return value, ""
        self._failed(f"{name} failed", error)
        return None, f"{name} failed: {describe(error)}"[: 4 << 10]

    async def _guarded(
        self, function: Callable[..., Any], context: Any, then: _Then
    ) -> tuple[Any, BaseException | None]:
        try:
            value = await self._call(function, context)
            if then is not None:
                await then()
            return value, None
        except BaseException as error:  # sys.exit() in a hook is a failed hook
            return None, error

    async def _hook(self, message: wire.Hook) -> None:
        config = OrgConfig(self._plugin.registry.config, msgspec.json.decode(message.config), self._env, self._warn)
        given = msgspec.json.decode(message.auth)
        auth = AuthReader(AuthState(given["methodId"], given["credentials"]) if given else None)
        contexts: dict[str, Callable[[], Any]] = {
            "on_validate_auth": lambda: HayAuthValidationContext(self._org, config, auth, self._logger),
            "on_config_update": lambda: HayConfigUpdateContext(self._org, config, self._logger),
            "on_enable": lambda: HayEnableContext(self._org, config, self._logger),
        }
        started = time.monotonic_ns()
        value, error = await self._run_hook_for(message.name, contexts[message.name]())
        ended = time.monotonic_ns()
        valid = True
        if message.name == "on_validate_auth" and message.name in self._plugin.hooks:
            valid = False
            if not error:
                try:
                    check(value, bool, "the result of on_validate_auth")
                    valid = value
                except Exception as problem:
                    self._failed("on_validate_auth failed", problem)
                    error = str(problem)
        self._link.send(wire.HookDone(message.id, valid, error, started, ended))

    def _take_state(self, message: wire.State) -> None:
        self._carried.append(message.data)

    def _load_state(self) -> None:
        """Take over the state of the worker before this one. One that does not load is dropped, never an error."""
        if not self._carried:
            return
        pickled, self._carried = b"".join(self._carried), []
        try:
            state = dill.loads(pickled)  # noqa: S301  # made by this org's worker before, and loaded where that ran
            if not isinstance(state, dict):
                raise TypeError(f"it is a {type(state).__name__}")
            self._state.update(state)
        except BaseException as error:
            self._warn(f"the state of the worker before this one does not load and is dropped: {_name(error)}")

    def _dump_state(self) -> None:
        pickled = b""
        if self._state:
            for attempt in range(_DUMP_ATTEMPTS):
                try:
                    pickled = dill.dumps(self._state)
                    break
                except RuntimeError as error:  # a handler on a thread changed it meanwhile
                    if attempt + 1 == _DUMP_ATTEMPTS:
                        self._warn(f"the state cannot be carried over and is dropped: {_name(error)}")
                except BaseException as error:
                    self._warn(f"the state cannot be carried over and is dropped: {_name(error)}")
                    break
            if len(pickled) > wire.MAX_STATE:
                self._warn(f"the state is {len(pickled)} bytes when pickled, over {wire.MAX_STATE}, and is dropped")
                pickled = b""
        for start in range(0, len(pickled), wire.CHUNK):
            self._link.send(wire.State(pickled[start : start + wire.CHUNK], False))
        self._link.send(wire.State(b"", True))

    async def _end_start(self) -> None:
        """Let ``on_start`` end before the hook that follows it: at once if it is async, else as soon as it does."""
        if self._starting is None or self._starting.done():
            return
        if inspect.iscoroutinefunction(self._plugin.hooks["on_start"]):
            self._starting.cancel()
        await asyncio.wait({self._starting}, timeout=_GIVE_UP_START)

    async def _stop(self, message: wire.Stop) -> None:
        self._stopping = True
        await self._end_start()
        if message.hook and hasattr(self, "_org"):
            started = time.monotonic_ns()
            error = await self._run_hook(message.hook, HayDisableContext(self._org, self._logger))
            self._link.send(wire.HookDone(0, True, error, started, time.monotonic_ns()))
            await self._mcp.stop(_MCP_STOP)
        self._capture.flush()
        self._link.close(_LAST_WRITE)
        os._exit(0)


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]
