"""The base zygote: trusted code only, one thread, no event loop. It forks plugin zygotes on command.

It is exec'd with a clean environment and preloads everything a worker needs, so that all that follows is a fork. As
the subreaper of all its descendants it also sees to it that none of them outlives the host: when the front's end of
the control socket closes, for whatever reason, it kills every process below it and exits.
"""

import os
import select
import signal
import socket
import sys
from typing import NoReturn

from . import processes, wire
from .confinement import MINIMAL_ENVIRONMENT
from .confinement.probes import interpreter, probe
from .zygote import run as run_zygote

__all__ = ["main", "preload"]

_BY_HAND = """\
This is the nursery of hayhost, the process that plugin workers are forked from. It speaks a private protocol
(version {version}) on a socket that `hayhost` hands it and is of no use by itself.
To serve plugins: hayhost serve PLUGINS_DIR        To develop one: hayhost dev PLUGINS_DIR
"""


class _Nursery:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._decoder: wire.Decoder[wire.ToNursery] = wire.Decoder(wire.ToNursery)
        self._descriptors: list[int] = []

    def run(self) -> None:
        """Serve until the front is gone."""
        processes.set_child_subreaper()
        wake = processes.wake_on_child()
        self._send(wire.Hello(wire.VERSION, []))
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == wake:
                    os.read(wake, 4096)
                    for pid, status in processes.reap():
                        self._send(wire.ChildExited(pid, status))
                elif not self._serve():
                    return

    def _serve(self) -> bool:
        data = processes.receive(self._control, 1 << 16, self._descriptors)
        for message in self._decoder.feed(data):
            if isinstance(message, wire.Probe):
                self._send(wire.Probed(probe(), interpreter()))
                continue
            control, output, keeper = descriptors = self._descriptors[:3]
            del self._descriptors[:3]
            run = execute_zygote if message.execute else run_zygote
            try:
                processes.fork(run, message.spec, control, output, keeper)
            except OSError as error:
                self._refuse(control, error)
            for descriptor in descriptors:
                os.close(descriptor)
        return bool(data)

    def _refuse(self, control: int, error: OSError) -> None:
        """Tell the front, on the socket that the zygote would have had, that there is none."""
        with socket.socket(fileno=os.dup(control)) as sock:
            sock.sendall(wire.encode(wire.LoadFailed(f"cannot fork a process for the plugin: {error.strerror}", "")))

    def _send(self, message: wire.Message) -> None:
        try:
            self._control.sendall(wire.encode(message))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the front is gone: the next read says so


def execute_zygote(spec: bytes, control: int, output: int, keeper: int) -> NoReturn:
    """Become a zygote that shares nothing with this process, by executing the interpreter anew."""
    file = os.memfd_create("spec")
    os.pwrite(file, spec, 0)
    descriptors = (file, control, output, keeper)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    program = [sys.executable, "-I", "-m", "sandbox.strict", *map(str, descriptors)]
    os.execve(sys.executable, program, MINIMAL_ENVIRONMENT)


def _kill_all() -> None:
    while pids := processes.descendants():
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for _ in processes.reap():
            pass


def preload() -> None:
    """Import what workers need before any of them exists; all forks share the pages."""
    import asyncio
    import concurrent.futures.thread  # noqa: F401  imported lazily by concurrent.futures
    import json  # noqa: F401
    import logging
    import random  # noqa: F401

    import hayhost.sdk  # noqa: F401

    from . import network, worker  # noqa: F401

    logging.raiseExceptions = False
    wire.Decoder(wire.ToWorker)
    asyncio.new_event_loop().close()  # warms what the first loop of a process imports


def main() -> NoReturn:
    """Entry point of the exec'd process: ``python -I -m sandbox.nursery FD``."""
    try:
        [descriptor] = sys.argv[1:]
        control = socket.socket(fileno=int(descriptor))
    except (ValueError, OverflowError, OSError):
        sys.stderr.write(_BY_HAND.format(version=wire.VERSION))
        sys.exit(64)
    control.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes.set_name("hay-nursery")
    preload()
    try:
        _Nursery(control).run()
    finally:
        _kill_all()
    sys.exit(0)


if __name__ == "__main__":
    main()
