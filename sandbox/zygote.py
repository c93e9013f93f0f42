"""The plugin zygote: one per loaded version of a plugin. It knows no org.

It confines itself, imports the plugin, runs ``on_initialize``, reports what was registered, and from then on forks a
worker for each socket that the front sends it. No event loop and no thread of ours ever runs here.
"""

import functools
import os
import select
import signal
import socket
import sys
import time
from typing import Final

import dill
import msgspec

from hayhost.sdk import Logger
from hayhost.sdk.errors import PluginError, RegistrationError

from . import confinement, network, processes, refusals, tracing, wire
from .capture import Capture
from .confinement import Plan
from .keeper import split
from .loader import LoadedPlugin, author_traceback, describe, load
from .mcp.prewarm import prewarm, uses_package
from .packing import pack
from .snapshot import installed_sources
from .spec import PluginSpec

__all__ = ["run"]

_SWEEP_AFTER: Final = 0.2
_ADMITTED: Final = wire.encode(wire.Admitted())
# Numeric libraries start threads as soon as they are loaded, and a process with threads cannot be forked.
_POOLS: Final = ("OPENBLAS", "OMP", "MKL", "NUMEXPR")
_MAX_METADATA: Final = wire.MAX_FRAME - wire.CHUNK  # there are hooks and warnings in the same frame


class _Stamps:
    def __init__(self) -> None:
        self.all: list[wire.Stamp] = []

    def __call__(self, phase: str) -> None:
        self.all.append((phase, time.monotonic_ns()))


def run(pickled: bytes, control: int, output: int, keeper: int) -> None:
    """Be a zygote; the body of a process that the nursery forked. The last three arguments are descriptors."""
    stamps = _Stamps()
    stamps("forked")
    _detach(output)
    spec: PluginSpec = dill.loads(pickled)  # noqa: S301  # made by the front from the manifest: host -> child
    try:
        if "namespaces" in spec.plan.layers:
            split(spec.plan, control, keeper)
        else:
            os.setsid()
        sock = socket.socket(fileno=os.dup(control))
        processes.set_child_subreaper()
        processes.set_name(f"hay:{spec.name}")
        confinement.before_import(spec.plan, {sock.fileno()})
    except OSError as error:
        with socket.socket(fileno=control) as refusal:
            refusal.sendall(wire.encode(wire.LoadFailed(f"the plugin cannot be isolated: {error}", "")))
        os._exit(1)
    if spec.plan.layers:
        network.install()
        refusals.install(spec.plan)
    stamps("confined")
    zygote = _Zygote(sock)
    zygote.send(wire.Hello(wire.VERSION, stamps.all))
    zygote.wait()
    stamps("admitted")
    plugin = zygote.load(spec, stamps)
    if plugin is not None:
        zygote.serve(plugin)
    os._exit(0)


def _detach(output: int) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.dont_write_bytecode = True
    for library in _POOLS:
        os.putenv(f"{library}_NUM_THREADS", "1")  # for C, and not seen in os.environ
    os.chdir("/")


class _Zygote:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._children: set[int] = set()
        self._sweep_at: float | None = None
        self._prepared: confinement.Prepared | None = None
        self.capture = Capture(self.send)

    def send(self, message: wire.Message) -> None:
        """Send a frame to the front, or exit if it is gone."""
        try:
            self._sock.sendall(wire.encode(message))
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)

    def wait(self) -> None:
        """Wait until the front takes this process, which is the first that it says."""
        if not self._sock.recv(len(_ADMITTED), socket.MSG_WAITALL):
            os._exit(0)

    def load(self, spec: PluginSpec, stamps: _Stamps) -> LoadedPlugin | None:
        """Load the plugin and report it; ``None`` if it does not load, which is reported as well."""
        self.capture.install()
        try:
            os.chdir(spec.folder)  # an author's relative paths mean the plugin's own files
            plugin = load(spec, Logger(self.capture.log), stamps)
            if "mcp" in spec.capabilities and uses_package(installed_sources()):
                try:
                    prewarm()
                except ImportError as error:
                    plugin.registry.warnings.append(f"the mcp package (2.x) cannot be used: {error}")
                stamps("mcp")
            if spec.tracing:
                tracing.prepare()
            metadata = msgspec.json.encode(plugin.registry.metadata())
            if len(metadata) > _MAX_METADATA:
                size = f"the plugin's metadata is {len(metadata)} bytes"
                raise RegistrationError(f"{size}; at most {_MAX_METADATA} are allowed")
            loaded = wire.Loaded(
                metadata=metadata,
                warnings=plugin.registry.warnings,
                hooks=list(plugin.hooks),
                stamps=stamps.all,
            )
        except BaseException as error:
            self.capture.flush()
            self.send(_failure(error, spec))
            return None
        self.capture.flush()
        pack()
        self.send(loaded)
        return plugin

    def serve(self, plugin: LoadedPlugin) -> None:
        """Fork workers until the front closes the socket."""
        wake = processes.wake_on_child()
        self._prepare(plugin.spec.plan)
        self._children = set(processes.children())  # what the plugin itself has started
        decoder: wire.Decoder[wire.ToZygote] = wire.Decoder(wire.ToZygote)
        descriptors: list[int] = []
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll(None if self._sweep_at is None else _SWEEP_AFTER * 1000):
                if descriptor == wake:
                    os.read(wake, 4096)
                    for pid, status in processes.reap():
                        self._children.discard(pid)
                        self._sweep_at = self._sweep_at or time.monotonic() + _SWEEP_AFTER
                        self.send(wire.ChildExited(pid, status))
                    continue
                data = processes.receive(self._sock, 1 << 16, descriptors)
                for message in decoder.feed(data):
                    assert isinstance(message, wire.Fork)
                    given = descriptors[: 3 if message.network else 2]
                    del descriptors[: len(given)]
                    self._fork(plugin, message, given)
                if not data:
                    return
            if self._sweep_at is not None and time.monotonic() >= self._sweep_at:
                self._sweep()

    def _sweep(self) -> None:
        """Kill what a dead worker has left behind, and what had got out of its process group to be spared.

        A worker is the subreaper of its descendants, and this process the next one: they are found as children that it
        has never forked. A while after the worker, as it means a look at every process of the machine.
        """
        self._sweep_at = None
        for pid in processes.children():
            if pid not in self._children:
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass  # it has another user by now

    def _fork(self, plugin: LoadedPlugin, message: wire.Fork, descriptors: list[int]) -> None:
        from .worker import run as run_worker

        confined = (self._prepared, message.scratch, message.proxy)
        run = functools.partial(run_worker, plugin, self.capture, *confined, *descriptors)
        if message.become:
            run()
        try:
            self._children.add(processes.fork(run))
        except OSError as error:
            with socket.socket(fileno=os.dup(descriptors[0])) as sock:
                sock.sendall(wire.encode(wire.Failed(f"cannot fork a worker: {error.strerror}")))
        for descriptor in descriptors:
            os.close(descriptor)
        self._prepare(plugin.spec.plan)

    def _prepare(self, plan: Plan) -> None:
        """Make the next worker's confinement ready, while nobody waits for it."""
        if self._prepared is not None:
            self._prepared.close()
        try:
            self._prepared = confinement.Prepared(plan)
        except OSError:
            self._prepared = None  # the worker tries again, and says why


def _failure(error: BaseException, spec: PluginSpec) -> wire.LoadFailed:
    if isinstance(error, SystemExit):
        text = f"the plugin called sys.exit({error.code!r}) while it was loading"
    elif isinstance(error, SyntaxError):
        text = f"{type(error).__name__}: {error.msg} ({os.path.basename(error.filename or '?')}, line {error.lineno})"
    elif isinstance(error, PluginError):
        text = describe(error).removeprefix(f"{type(error).__name__}: ")
    else:
        text = describe(error)
    if help := refusals.hint(error, spec.plan, loading=True):
        text += f" ({help})"
    trace = author_traceback(error, spec.folder)
    return wire.LoadFailed(text[: 8 << 10], trace if "\n" in trace else "")  # one line would only say it again
