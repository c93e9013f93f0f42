"""Handles on the processes that plugins run in: the nursery, the plugin zygotes, and any child by its pidfd."""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Final

from sandbox import pickling  # noqa: F401  # before dill

# isort: split
import dill

from sandbox import wire
from sandbox.confinement import MINIMAL_ENVIRONMENT, Plan
from sandbox.spec import PluginSpec

from .channel import Channel, Exits, socket_pair
from .errors import HostError, PluginLoadError
from .inspection import Descriptors, pid_inside, threads_of
from .logs import PluginLog, get_logger
from .scratch import Keeper

__all__ = ["Nursery", "Process", "Zygote"]

# Besides the plugin's own hooks: forking, importing the SDK, a busy machine.
_SLACK: Final = 10.0
_READ: Final = 64 << 10
_PROBE: Final = 30.0
# A zygote that is let go finishes the forks that it was asked for.
_LEAVE: Final = 1.0
# A zygote's parent reports within this many seconds how it ended.
_REPORTED: Final = 0.1
_CRASHES: Final = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)


Contain = Callable[[str, int, Plan], Awaitable[str]]


async def _nowhere(_name: str, _pid: int, _plan: Plan) -> str:
    return ""


class Process:
    """A child by pidfd: it can be killed without ever hitting a stranger that got its pid, and its end is seen."""

    def __init__(self, pid: int, exited: Callable[[], None]) -> None:
        """Raises ``ProcessLookupError`` if there is no such process any more."""
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)
        self._exited = exited
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._end)

    def kill(self) -> None:
        """SIGKILL it."""
        if self._descriptor < 0:
            return
        try:
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it is gone, or not ours to kill: either way its socket is closed next

    def _end(self) -> None:
        exited = self._exited
        self.close()
        exited()

    def close(self) -> None:
        """Stop watching. Closing twice is safe."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            self._exited = lambda: None  # it leads back to who holds this


class _Output:
    """Reads a pipe that children write raw output to, as lines of a log. It never lets the pipe stay full."""

    def __init__(self, descriptor: int, log: PluginLog) -> None:
        self._descriptor = descriptor
        self._log = log
        self._partial = b""
        self._loop = asyncio.get_running_loop()
        os.set_blocking(descriptor, False)
        self._loop.add_reader(descriptor, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, _READ)
        except BlockingIOError:
            return
        *lines, partial = (self._partial + data).split(b"\n")
        self._partial = partial[:_READ]
        for line in lines:
            self._record(line)
        if not data:
            self._record(self._partial)
            self.close()

    def _record(self, line: bytes) -> None:
        if text := line.decode("utf-8", "replace").strip():
            self._log.record("warning", text)

    def close(self) -> None:
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


class Nursery:
    """The base zygote's process. Started before the front serves anything; started anew if it dies.

    ``lost`` is called when it died: zygotes and workers live on, but nothing would end them with the host any more.
    """

    def __init__(self, lost: Callable[[], None]) -> None:
        self._lost = lost
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ids = 0
        self._closing = False
        self._probed: asyncio.Future[wire.Probed] | None = None
        self.contain: Contain = _nowhere
        """Puts a zygote into a cgroup before it imports anything; why that failed, or empty."""
        self.left: Callable[[str], None] = lambda name: None
        """Called with the name of a zygote's cgroup when it is gone."""
        self.ran_out: Callable[[str, Plan], str] = lambda name, plan: ""
        """What to tell the author of a zygote that was killed because of its memory; empty if it was not."""
        self.exits = Exits()
        """How its last zygotes ended that have no keeper."""

    @property
    def pid(self) -> int:
        """Its process id; 0 while there is none."""
        return self._process.pid if self._process and self._process.poll() is None else 0

    async def start(self) -> None:
        """Exec it and wait until it can fork. Raises ``HostError`` if it cannot be started."""
        ours, theirs = socket_pair()
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self._ready = asyncio.get_running_loop().create_future()
        try:
            self._process = subprocess.Popen(  # noqa: ASYNC220  # it must be there before anything else is
                [sys.executable, "-I", "-m", "sandbox.nursery", str(theirs.fileno())],
                env=MINIMAL_ENVIRONMENT,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            os.close(reader)
            ours.close()
            raise HostError(f"cannot start the nursery process: {error.strerror}") from None
        finally:
            theirs.close()
            os.close(writer)
        _Output(reader, PluginLog(process="nursery"))
        self._channel = Channel(ours, wire.FromNursery, hello=self._hello, receive=self._receive, closed=self._closed)
        try:
            async with asyncio.timeout(60):
                await self._ready
        except TimeoutError:
            raise HostError("the nursery process did not start within 60 s") from None

    def _hello(self, _pid: int, _message: wire.Hello) -> None:
        if not self._ready.done():
            self._ready.set_result(None)

    def _closed(self, reason: str) -> None:
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
            self._process = None
        if self._closing:
            return
        if not self._ready.done():
            self._ready.set_exception(HostError(f"the nursery process could not start {reason}".strip()))
        else:
            get_logger().error("the nursery died; starting it anew", reason=reason)
            self._lost()

    async def probe(self) -> wire.Probed:
        """What of the confinement this machine gives. Raises ``HostError`` if the nursery is gone or does not say."""
        assert self._channel is not None
        self._probed = asyncio.get_running_loop().create_future()
        self._channel.send(wire.Probe())
        try:
            async with asyncio.timeout(_PROBE):
                return await self._probed
        except TimeoutError:
            raise HostError("the nursery did not find out how plugins can be isolated") from None

    def _receive(self, message: wire.Hello | wire.ChildExited | wire.Probed) -> None:
        if isinstance(message, wire.ChildExited):
            self.exits.add(message)
        elif isinstance(message, wire.Probed) and self._probed is not None and not self._probed.done():
            self._probed.set_result(message)

    async def spawn(self, spec: PluginSpec, log: PluginLog, *, execute: bool = False) -> "Zygote":
        """A new zygote for ``spec``, loading; with ``execute`` a program of its own.

        Raises ``HostError`` if there is no nursery to start it.
        """
        if self._channel is None or self._channel.is_closed:
            await self.start()
        assert self._channel is not None
        self._ids += 1
        ours, theirs = socket_pair()
        keeper, its = socket_pair()
        reader, writer = os.pipe2(os.O_CLOEXEC)
        output = _Output(reader, log)
        zygote = Zygote(spec, ours, keeper, output, log, self)
        descriptors = [theirs.detach(), writer, its.detach()]
        self._channel.send(wire.SpawnZygote(self._ids, dill.dumps(spec), execute), descriptors)
        return zygote

    async def stop(self) -> None:
        """Let it kill everything below it and exit."""
        self._closing = True
        if self._channel:
            self._channel.close()
        if self._process is None:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._process.wait, 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Zygote:
    """A plugin zygote: loads its plugin once, then forks workers."""

    def __init__(
        self,
        spec: PluginSpec,
        sock: socket.socket,
        keeper: socket.socket,
        output: _Output,
        log: PluginLog,
        nursery: Nursery,
    ) -> None:
        self.spec = spec
        self.nursery = nursery.pid
        """The pid of the nursery that forked it."""
        self.started = time.monotonic_ns()
        self.loaded: asyncio.Future[wire.Loaded] = asyncio.get_running_loop().create_future()
        self.loaded.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.stamps: list[wire.Stamp] = []
        self.exits = Exits()
        """How its last workers ended."""
        self.lost: Callable[[], None] = lambda: None
        self.alive = True
        self.threads = 1
        """How many threads it had when the plugin was loaded."""
        self.keeper = Keeper(keeper, proxied=spec.plan.proxied) if "namespaces" in spec.plan.layers else None
        """Who makes its workers' scratch folders, if they are in namespaces."""
        if self.keeper is None:
            keeper.close()
        self._became = False
        self._pid_inside = 0
        self._name = f"zygote-{secrets.token_hex(8)}"
        self._nursery = nursery
        self._containing: asyncio.Task[None] | None = None
        self._log = log
        self._output = output
        self._process: Process | None = None
        self._channel = Channel(sock, wire.FromZygote, hello=self._hello, receive=self._receive, closed=self._closed)
        limit = 3 * spec.hook_timeout + _SLACK  # import, factory and on_initialize each have the hook's limit inside
        self._deadline = asyncio.get_running_loop().call_later(limit, self._too_slow)

    @property
    def pid(self) -> int:
        """Its process id as the kernel gave it; 0 before it is known."""
        return self._process.pid if self._process else 0

    def _hello(self, pid: int, message: wire.Hello) -> None:
        self.stamps = list(message.stamps)
        try:
            self._process = Process(pid, self._exited)
        except OSError:
            return  # dead already: the socket says so next
        self._pid_inside = pid_inside(pid) if self.keeper else pid
        self._containing = asyncio.get_running_loop().create_task(self._admit(pid))

    async def _admit(self, pid: int) -> None:
        if problem := await self._nursery.contain(self._name, pid, self.spec.plan):
            if not self.loaded.done():
                self.loaded.set_exception(PluginLoadError(f"the plugin cannot be isolated: {problem}"))
            self.kill()
        self._channel.send(wire.Admitted())

    def _receive(self, message: wire.Loaded | wire.LoadFailed | wire.Log | wire.ChildExited | wire.Hello) -> None:
        match message:
            case wire.Log():
                self._log.record(message.level, message.message, message.meta, message.request, message.dropped)
            case wire.Loaded() if not self.loaded.done():
                self._deadline.cancel()
                self.stamps = list(message.stamps)
                self.threads = threads_of(self.pid)
                self.loaded.set_result(message)
            case wire.LoadFailed() if not self.loaded.done():
                self._deadline.cancel()
                self.loaded.set_exception(PluginLoadError(message.error, message.traceback))
            case wire.ChildExited():
                self.exits.add(message)
            case _:
                self._closed("protocol error: a frame that a zygote may not send now")

    def _too_slow(self) -> None:
        if not self.loaded.done():
            self.loaded.set_exception(
                PluginLoadError("the plugin did not load within its time limit, and could not be interrupted")
            )
        self.kill()

    def _exited(self) -> None:
        self._channel.drain()
        self._closed("")

    def _closed(self, reason: str) -> None:
        if not self.alive:
            return
        self.alive = False
        self._deadline.cancel()
        if self.loaded.done():
            self._dispose()
            self.lost()
        elif reason:
            self._failed(reason)
        else:  # how it ended is on its way from its parent
            asyncio.get_running_loop().call_later(_REPORTED, lambda: self._failed(self._how_it_ended()))

    def _failed(self, why: str) -> None:
        if not self.loaded.done():
            self.loaded.set_exception(PluginLoadError(f"the plugin did not load: {why}"))
        self._dispose()

    def _how_it_ended(self) -> str:
        status = (self.keeper.exits if self.keeper else self._nursery.exits).get(self._pid_inside)
        if status is None:
            return "its process died while it was loading"
        if status >= 0:
            return f"its process exited with code {status} while it was loading"
        if status == -signal.SIGKILL and (memory := self._nursery.ran_out(self._name, self.spec.plan)):
            return memory
        died = f"its process was killed by signal {-status} ({signal.strsignal(-status)}) while it was loading"
        if status == -signal.SIGXCPU:
            return f"{died}; permissions.cpu_seconds in the manifest can ask for more"
        if status in _CRASHES and "limits" in self.spec.plan.layers:
            return f"{died}; if it lacks memory, permissions.memory in the manifest can ask for more"
        return died

    def _dispose(self) -> None:
        if self._process:
            if not self._became:
                self._process.kill()
            self._process.close()
        self._channel.close()
        self._left()
        if self.keeper is not None and not self._became:
            self.keeper.close()

    def _left(self) -> None:
        # A worker that it has forked just now is still in its cgroup.
        asyncio.get_running_loop().call_later(_LEAVE, self._nursery.left, self._name)

    def fork(
        self, log: PluginLog, scratch: str, *, become: bool = False, broker: int = -1, proxy: int = 0
    ) -> tuple[socket.socket, Descriptors]:
        """Have a worker forked; the front's end of its socket, and the descriptors that it is given.

        With ``become`` the zygote itself is the worker. ``broker``, if there is one, is its end of a socket to the
        egress broker, and closed here; ``proxy`` is the port of its programs' proxy, or 0. What it writes to its
        descriptors 1 and 2 goes to ``log``, and through no pipe that another org's worker has.
        """
        try:
            ours, theirs = socket_pair()
            reader, writer = os.pipe2(os.O_CLOEXEC)
        except OSError:
            if broker >= 0:
                os.close(broker)
            raise
        _Output(reader, log)
        given = [theirs.detach(), writer, *([broker] if broker >= 0 else [])]
        seen = frozenset((status.st_dev, status.st_ino) for status in map(os.fstat, given))
        self._channel.send(wire.Fork(become, scratch, broker >= 0, proxy), given)
        self._became = become
        return ours, seen

    def kill(self) -> None:
        """SIGKILL it."""
        if self._process:
            self._process.kill()
        else:
            self.close()

    def close(self) -> None:
        """Let it exit. Its workers live on. Closing twice is safe."""
        self.alive = False
        self._deadline.cancel()
        if self.keeper is not None:
            self.keeper.close()
        if not self.loaded.done():
            self.loaded.set_exception(PluginLoadError("the host is stopping"))
        self._channel.close()
        self._left()
        if self._process and not self._became:  # the plugin's code runs in it, and may not let it exit
            asyncio.get_running_loop().call_later(_LEAVE, self._process.kill)
        elif self._process:
            self._process.close()
