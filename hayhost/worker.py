"""The front's handle on one worker process: its streams, hooks, pings and end."""

import asyncio
import random
import secrets
import signal
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

import msgspec

from sandbox import wire

from .channel import Channel
from .configs import secrets_of
from .errors import RequestError, StartFailedError, WorkerLostError
from .inspection import pid_inside
from .installs import Installation
from .isolation import Isolation, Quarters
from .logs import PluginLog
from .processes import Process, Zygote
from .sessions import began, end_session
from .states import Lifecycle, WorkerState
from .version import Version

if TYPE_CHECKING:
    from .tracing import Trace

__all__ = ["Stream", "Worker"]

# Besides the hooks it runs: a loaded machine's scheduling.
SLACK: Final = 5.0
_DUMP_TIMEOUT: Final = 2.0
_SECRET: Final = 24  # bytes
# Requests that are nearly done may still change the state: it is asked for when they are, or after this many seconds.
_PAUSE: Final = 0.1
# Spans may end some time after their request.
_TRACES: Final = 512


class Stream(Protocol):
    """Whoever waits for the answer on one stream of a worker."""

    def head(self, message: wire.ResponseHead) -> None:
        """The answer begins, and with ``message.end`` is complete."""

    def body(self, message: wire.Body) -> None:
        """More of the answer."""

    def credit(self, size: int) -> None:
        """``size`` more bytes of the request may be sent."""

    def failed(self, error: RequestError) -> None:
        """There will be no (further) answer."""


class Worker:
    """One worker process.

    It is created without an org; ``identify`` gives it one. ``gone(worker, reason)`` is called once, when it has ended
    for whatever reason and all its streams have been told.
    """

    def __init__(
        self,
        version: Version,
        zygote: Zygote,
        quarters: Quarters,
        isolation: Isolation,
        log: PluginLog,
        gone: Callable[["Worker", str], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.quarters = quarters
        self._isolation = isolation
        self._pid_inside = 0
        self._began = 0
        self._containing: asyncio.Task[str] | None = None
        self.version = version
        self.zygote = zygote
        """Where it comes from: its version's zygote or, if that must not fork, one of its own that turns into it."""
        self.installation: Installation | None = None
        """What it was started with, once it has an org."""
        self.lifecycle = Lifecycle(WorkerState.STOPPED)
        self.lifecycle.to(WorkerState.STARTING)
        self.asked = time.monotonic_ns()
        self.started_at = time.time()
        """When it was started for its org; for a spare, when it was made."""
        self.stamps: list[wire.Stamp] = []
        """Phases of its start with the CLOCK_MONOTONIC nanoseconds at which each ended; ``asked`` began them."""
        self.hook_times: dict[str, tuple[int, int]] = {}
        self.requests = 0
        self.used = loop.time()
        self.mcp_servers: list[wire.McpServer] = []
        self.hooked: Callable[[Worker, str, int, int, bool], None] = lambda worker, name, started, ended, failed: None
        """Called with the worker and every hook that has run, when it began and ended, and whether it failed."""
        self.traces: OrderedDict[str, Trace] = OrderedDict()
        """The traces of the last requests that it was given."""
        self.mcp_changed: Callable[[], None] = lambda: None
        """Called when ``mcp_servers`` is another."""
        self.mcp_noticed: Callable[[wire.McpNotice], None] = lambda notice: None
        """Called with what one of them says to all its clients."""
        self.streams: dict[int, Stream] = {}
        self.cancelled: dict[int, float] = {}
        """Streams that nobody waits for but whose handlers still run, with the time since."""
        self.told: dict[int, float] = {}
        """Those of them that the worker has heard of, with the time at which it had: it may only be behind."""
        self.pinged: float | None = None
        self._ping = -1
        self.hello: asyncio.Future[None] = loop.create_future()
        self.exit: asyncio.Future[str] = loop.create_future()
        self._ready: asyncio.Future[str] = loop.create_future()
        for future in (self.hello, self._ready):
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # may go unawaited
        self._hooks: dict[int, asyncio.Future[wire.HookDone]] = {}
        self._loop = loop
        self._log = log
        self._gone = gone
        self._process: Process | None = None
        self._cause = ""  # why the front ended it, if it did
        self._ids = 0
        self._ending = False
        self._stopping = False
        self._identified = False
        self._serves = False
        self._quiet = asyncio.Event()
        self.released: Callable[[], None] = lambda: None
        """Called whenever a stream has ended."""
        self._state: bytearray | None = None
        self._dumped: asyncio.Future[bytes] | None = None
        self._dumps_due = 0
        self._broker: socket.socket | None = None
        broker = -1
        if zygote.spec.plan.layers and version.manifest.permissions.network:
            self._broker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            broker = theirs.detach()
        self._doorway = zygote.keeper.doorways.get(quarters.name) if zygote.keeper else None
        sock, self._descriptors = zygote.fork(
            log,
            quarters.scratch,
            become=zygote is not version.zygote,
            broker=broker,
            proxy=self._doorway.port if self._doorway else 0,
        )
        self._channel = Channel(
            sock,
            wire.FromWorker,
            hello=self._hello,
            receive=self._receive,
            closed=self._end,
        )

    # ---- its life

    def masked(self, text: str) -> str:
        """What it says without its org's secrets, for everybody else."""
        return self._log.masked(text)

    @property
    def pid(self) -> int:
        """Its process id, as the kernel vouches for it and the host sees it; 0 before that."""
        return self._process.pid if self._process else 0

    @property
    def has_begun(self) -> bool:
        """Whether its ``on_start`` has been asked for, so that it is owed a hook at its end."""
        return self._serves

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do."""
        return not self.streams and not self.cancelled and not self._hooks

    def _hello(self, pid: int, message: wire.Hello) -> None:
        try:
            self._process = Process(pid, self._exited)
        except OSError as error:
            self._end(f"it died at once ({error.strerror})")
            return
        self.stamps = list(message.stamps)
        self._log.bind(worker=pid)
        plan = self.zygote.spec.plan
        self._began = began(pid)
        self._pid_inside = pid_inside(pid) if "namespaces" in plan.layers else pid
        threads = 1 if self.zygote is self.version.zygote else self.zygote.threads
        if problem := self._isolation.admit(pid, plan, self._descriptors, threads):
            self._end(f"it is not admitted: {problem}")
            return
        containing = self._loop.create_task(self._isolation.contain(self.quarters.name, pid, plan))
        containing.add_done_callback(self._contained)
        self._containing = containing  # a task that nobody holds may be lost
        self._channel.send(wire.Admitted())
        if not plan.programs and not self.hello.done():
            self.hello.set_result(None)

    def _contained(self, containing: "asyncio.Task[str]") -> None:
        self._containing = None
        if self._ending or containing.cancelled():
            return
        if problem := containing.result():
            self.kill(problem)
        elif not self.hello.done():  # what it started before it was in its cgroup would stay outside
            self.hello.set_result(None)

    def start(self, installation: Installation, *, serve: bool, hook_timeout: float) -> None:
        """Tell it whose it is. With ``serve`` false it runs no ``on_start`` and serves no requests.

        Raises ``StartFailedError`` if that does not fit into a frame.
        """
        encode = msgspec.json.encode
        self._log.bind(org=installation.org_id)
        self._log.hide(secrets_of(self.version, installation.config, installation.auth))
        self.installation = installation
        secret = secrets.token_urlsafe(_SECRET) if self._doorway else ""
        identity = wire.Start(
            installation.org_id,
            installation.org_name,
            encode(installation.config),
            encode(installation.auth),
            encode(self.version.env),
            serve,
            hook_timeout,
            installation.problem,
            f"http://worker:{secret}@127.0.0.1:{self._doorway.port}" if self._doorway else "",
        )
        try:
            self._channel.send(identity)
        except wire.ProtocolError as error:
            raise StartFailedError(f"the org's settings are too large: {error}") from None
        self._identified, self._serves = True, serve
        self.started_at = time.time()
        if self._broker is not None:
            network = self.version.manifest.permissions.network
            self._isolation.egress.attach(
                self._broker.detach(),
                self.version.manifest.name,
                installation.org_id,
                network,
                proxy=(self._doorway.end.detach(), secret) if self._doorway else None,
            )

    async def ready(self, timeout: float) -> str:
        """Wait until it is; the reason why it is degraded, or ``""``. Raises ``StartFailedError``."""
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(self._ready)
        except TimeoutError:
            self.kill()
            raise StartFailedError(f"it was not ready within {timeout:g} s") from None

    def _on_ready(self, message: wire.Ready) -> None:
        if self._ready.done() or not self._identified:
            self._end("protocol error: Ready out of turn")
            return
        self.stamps += message.stamps
        phases = [stamp for stamp in message.stamps if stamp[0] in ("identity", "on_start")]
        failed = bool(message.error) and self.installation is not None and message.error != self.installation.problem
        if len(phases) == 2:  # the hook runs right after the identity is taken
            self._hook_ran("on_start", phases[0][1], phases[1][1], failed)
        error = self.masked(message.error)
        if not self._stopping:  # what it sent before it heard of that
            self.lifecycle.to(WorkerState.DEGRADED if error else WorkerState.READY, error)
        self._ready.set_result(error)

    def _exited(self) -> None:
        self._channel.drain()  # answers that were sent before the end are answers
        self._end("")

    def _end(self, reason: str) -> None:
        if self._ending:
            return
        self._ending = True
        self._channel.close()
        if self._broker is not None:
            self._broker.close()
            self._broker = None  # who starts it all the same has nothing to give to the broker
        if self._process:
            self._process.kill()
            self._process.close()
            if self.zygote.spec.subprocess:
                self._loop.run_in_executor(None, end_session, self._process.pid, self._began)
        if reason.startswith("protocol error: "):
            self._cause = self._cause or reason
        reason = self._cause or reason or self.how_it_ended() or "it died"
        self.exit.set_result(reason)
        stopping = self.lifecycle.state is WorkerState.DRAINING
        self.lifecycle.to(WorkerState.STOPPED if stopping else WorkerState.ERROR, reason)
        lost = StartFailedError(f"the worker died before it was ready: {reason}")
        for future in (self.hello, self._ready):
            if not future.done():
                future.set_exception(lost)
        for hook in self._hooks.values():
            if not hook.done():
                hook.set_exception(WorkerLostError("the worker died during the hook"))
        self._hooks.clear()
        if self._dumped is not None and not self._dumped.done():
            self._dumped.set_exception(WorkerLostError("the worker died"))
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.failed(WorkerLostError("The worker died before it answered"))
        self.cancelled.clear()
        self.told.clear()
        self._quiet.set()
        self._gone(self, reason)
        self.released = self.mcp_changed = lambda: None  # they lead back here: it shall leave memory at once
        self.mcp_noticed = lambda notice: None

    def how_it_ended(self) -> str | None:
        """Why it was ended, or what its zygote says of its end, if it has yet."""
        if self._cause:
            return self._cause
        status = self.zygote.exits.get(self._pid_inside)
        if status is None:
            return None
        if status == -signal.SIGKILL and (memory := self._isolation.ran_out(self.quarters.name, self.zygote.spec.plan)):
            return memory
        if status == -signal.SIGXCPU:
            spent = f"{self.version.manifest.permissions.cpu_seconds} s of processor time"
            return f"it used more than its {spent}; permissions.cpu_seconds in the manifest can ask for more"
        return f"it exited with code {status}" if status >= 0 else f"it was killed by signal {-status}"

    def kill(self, why: str = "") -> None:
        """SIGKILL it; ``gone`` follows, with ``why`` if that is given."""
        self._cause = self._cause or why
        if self._process:
            self._process.kill()
        else:
            self._end("it was stopped before it said hello")

    async def stop(self, hook: str, drain: float, hook_timeout: float) -> None:
        """Let requests in flight finish for ``drain`` seconds, run ``hook``, and end it whatever it does.

        A worker is told once: a later call only waits, so that no second hook runs.
        """
        if self.exit.done():
            return
        if self._stopping:
            await asyncio.wait({self.exit}, timeout=drain + hook_timeout + 3 * SLACK)
            return
        self._stopping = True
        if self.lifecycle.state is not WorkerState.DRAINING:
            self.lifecycle.to(WorkerState.DRAINING, hook)
        await self._wait_until_quiet(drain)
        for id in list(self.streams):
            stream = self.streams[id]
            self.cancel(id)
            stream.failed(WorkerLostError("The worker was stopped before it answered"))
        self._channel.send(wire.Stop(hook))
        await asyncio.wait({self.exit}, timeout=hook_timeout + 2 * SLACK)
        if not self.exit.done():
            self.kill()
            await asyncio.wait({self.exit}, timeout=SLACK)
            self._end("it did not stop")  # a process in an uninterruptible state is given up

    async def _wait_until_quiet(self, seconds: float) -> None:
        if self.streams:
            self._quiet.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._quiet.wait()
            except TimeoutError:
                pass

    def memory(self) -> dict[str, int | None]:
        """Resident and proportional set size in bytes, as ``rss`` and ``pss``; ``None`` where the kernel does not
        say."""
        sizes: dict[str, int | None] = {"rss": None, "pss": None}
        try:
            with open(f"/proc/{self.pid}/smaps_rollup", "rb") as file:
                for line in file:
                    key = line.partition(b":")[0].decode().lower()
                    if key in sizes:
                        sizes[key] = int(line.split()[1]) * 1024
        except OSError:
            pass
        return sizes

    def phases(self) -> dict[str, float]:
        """Milliseconds that each phase of its start took; a spare's ``identity`` includes the wait for an org."""
        before, phases = self.asked, {}
        for name, ended in self.stamps:
            phases[name] = round((ended - before) / 1e6, 3)
            before = ended
        return phases

    # ---- requests

    def open(self, stream: Stream, request: Callable[[int], wire.Request]) -> int:
        """Begin a stream with the frame that ``request(id)`` builds; returns the id."""
        self._ids += 1
        id = self._ids
        self.streams[id] = stream
        self.requests += 1
        self._channel.send(request(id), now=len(self.streams) == 1)
        return id

    def send(self, message: wire.Body | wire.Window) -> None:
        """Continue a stream."""
        self._channel.send(message)

    def cancel(self, id: int) -> None:
        """Nobody waits for stream ``id`` any more. Until its handler has really ended the worker counts as busy."""
        if self.streams.pop(id, None) is not None:
            self.cancelled[id] = self._loop.time()
            self._channel.send(wire.Cancel(id))
            self._one_less()

    def _finish(self, id: int) -> None:
        self.told.pop(id, None)
        if self.streams.pop(id, None) is None and self.cancelled.pop(id, None) is None:
            self._end(f"protocol error: an answer on stream {id}, which is not open")
        else:
            self._one_less()

    def _one_less(self) -> None:
        self.used = self._loop.time()
        if not self.streams:
            self._quiet.set()
        self.released()

    def _on_head(self, message: wire.ResponseHead) -> None:
        stream = self.streams.get(message.id)
        if message.end or (stream is None and message.id not in self.cancelled):
            self._finish(message.id)
        if stream is not None:
            stream.head(message)

    def _on_body(self, message: wire.Body) -> None:
        stream = self.streams.get(message.id)
        if message.end or (stream is None and message.id not in self.cancelled):
            self._finish(message.id)
        elif not message.data:
            self._end("protocol error: a piece of an answer with nothing in it")
            return
        if stream is not None:
            stream.body(message)

    def _on_abort(self, message: wire.Abort) -> None:
        stream = self.streams.get(message.id)
        self._finish(message.id)
        if stream is not None:
            stream.failed(WorkerLostError("The plugin broke off its answer"))

    def _on_window(self, message: wire.Window) -> None:
        if (stream := self.streams.get(message.id)) is not None:
            stream.credit(message.size)
        elif message.id not in self.cancelled:
            self._end(f"protocol error: room on stream {message.id}, which is not open")

    # ---- state

    async def dump_state(self) -> bytes:
        """The worker's ``state``, pickled by it: bytes for the next worker of the same org, opaque here.

        Empty if it is empty, cannot be had soon, or is larger than a state may be; the log says so.
        """
        if self.exit.done() or self._dumped is not None:
            return b""
        await self._wait_until_quiet(_PAUSE)
        if self.exit.done():
            return b""
        self._dumped, self._state = self._loop.create_future(), bytearray()
        self._dumps_due += 1
        self._channel.send(wire.DumpState())
        try:
            async with asyncio.timeout(_DUMP_TIMEOUT):
                return await self._dumped
        except (TimeoutError, WorkerLostError):
            self._log.record("warning", "the worker did not hand over its state in time; the next starts without")
            return b""
        finally:
            self._dumped = self._state = None

    def _on_state(self, message: wire.State) -> None:
        late = self._dumps_due != 1  # of a dump that nobody waits for any more
        if message.end:
            self._dumps_due = max(0, self._dumps_due - 1)
        if late or self._state is None or self._dumped is None or self._dumped.done():
            return
        self._state += message.data
        if len(self._state) > wire.MAX_STATE:
            self.misbehaved("more state than a worker may have")
        elif message.end:
            self._dumped.set_result(bytes(self._state))

    def send_state(self, state: bytes) -> None:
        """Give it the state of the worker that it replaces; before ``start``."""
        for start in range(0, len(state), wire.CHUNK):
            self._channel.send(wire.State(state[start : start + wire.CHUNK], start + wire.CHUNK >= len(state)))

    # ---- hooks and the rest

    async def hook(self, name: str, config: dict[str, Any], auth: Any, timeout: float) -> wire.HookDone:
        """Run ``on_validate_auth``, ``on_config_update`` or ``on_enable``.

        Raises ``WorkerLostError`` if the worker dies or does not answer within ``timeout`` and some slack, and
        ``RequestError`` with status 413 if ``config`` and ``auth`` do not fit into a frame.
        """
        if self._ending:
            raise WorkerLostError("the worker died before the hook")
        self._log.hide(secrets_of(self.version, config, auth))
        self._ids += 1
        id = self._ids
        try:
            self._channel.send(wire.Hook(id, name, msgspec.json.encode(config), msgspec.json.encode(auth)))
        except wire.ProtocolError as error:
            raise RequestError(f"The config and credentials are too large: {error}", status=413) from None
        done = self._hooks[id] = self._loop.create_future()
        try:
            async with asyncio.timeout(timeout + SLACK):
                result: wire.HookDone = await done
        except TimeoutError:
            raise WorkerLostError(f"{name} did not finish within {timeout:g} s") from None
        finally:
            self._hooks.pop(id, None)
        self._hook_ran(name, result.started, result.ended, bool(result.error))
        return result

    def _hook_ran(self, name: str, started: int, ended: int, failed: bool) -> None:
        self.hook_times[name] = (started, ended)
        if name in self.version.hooks:
            self.hooked(self, name, started, ended, failed)

    def _on_hook_done(self, message: wire.HookDone) -> None:
        if message.id == 0:  # the hook of a Stop
            self._hook_ran(self.lifecycle.why, message.started, message.ended, bool(message.error))
        elif (future := self._hooks.get(message.id)) is not None and not future.done():
            message.error = self.masked(message.error)
            future.set_result(message)

    def traced(self, trace: "Trace") -> None:
        """It is given a request of this trace."""
        self.traces[trace.id] = trace
        if len(self.traces) > _TRACES:
            self.traces.popitem(last=False)

    def _on_spans(self, message: wire.Spans) -> None:
        for span in message.spans:
            if (trace := self.traces.get(span.trace_id)) is not None:
                trace.add(span)

    def _on_mcp_servers(self, message: wire.McpServers) -> None:
        for server in message.servers:
            server.url, server.error = self.masked(server.url), self.masked(server.error)
        self.mcp_servers = message.servers
        self.mcp_changed()

    def _on_pong(self, message: wire.Pong) -> None:
        if message.id != self._ping:  # a number to be read first: nobody answers what it has not heard
            self._end("protocol error: the answer to a ping that there was not")
        now = self._loop.time()
        for id, since in self.cancelled.items():
            if self.pinged is not None and since <= self.pinged:  # the ping came after it
                self.told.setdefault(id, now)
        self.pinged, self._ping = None, -1

    def ping(self, now: float) -> None:
        """Ask for a sign of life, unless an answer is still due."""
        if self.pinged is None:
            self.pinged = now
            if self._ping < 0:
                self._ping = random.getrandbits(62)
                self._channel.send(wire.Ping(self._ping))

    def _on_log(self, message: wire.Log) -> None:
        self._log.record(message.level, message.message, message.meta, message.request, message.dropped)

    def _receive(self, message: Any) -> None:
        handle = self._HANDLERS.get(type(message))
        if handle is None:
            self._end(f"protocol error: {type(message).__name__} out of turn")
        else:
            handle(self, message)

    def misbehaved(self, how: str) -> None:
        """It does not keep to the protocol: it is ended, and its other requests are told."""
        self._end(f"protocol error: {how}")

    _HANDLERS: ClassVar[dict[type, Callable[["Worker", Any], None]]] = {
        wire.ResponseHead: _on_head,
        wire.Body: _on_body,
        wire.Abort: _on_abort,
        wire.Window: _on_window,
        wire.Log: _on_log,
        wire.Pong: _on_pong,
        wire.Ready: _on_ready,
        wire.HookDone: _on_hook_done,
        wire.McpServers: _on_mcp_servers,
        wire.Spans: _on_spans,
        wire.McpNotice: lambda worker, message: worker.mcp_noticed(message),
        wire.State: _on_state,
        wire.Failed: lambda worker, message: worker._end(worker.masked(message.error)),
    }
