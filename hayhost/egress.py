"""The front's handle on the egress broker, which connects for workers. What it did is logged and counted here."""

import asyncio
import os
import select
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from sandbox import wire
from sandbox.broker import messages
from sandbox.broker.limits import TokenBucket
from sandbox.confinement import MINIMAL_ENVIRONMENT

from .channel import Channel, socket_pair
from .errors import HostError
from .logs import get_logger

__all__ = ["Counters", "Egress"]

_NOBODY: Final = 65534
_START_TIMEOUT: Final = 60.0
_RATE: Final = (20.0, 200)  # lines per second and at once, per org; the rest is counted
_REMEMBERED: Final = 10_000
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 30.0
_SHORT_LIFE: Final = 10.0

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class Counters:
    """What one plugin did for one org. ``sent`` and ``received`` are bytes: of a worker's own connections what it
    says, of those of its programs what was counted."""

    connected: int = 0
    refused: int = 0
    failed: int = 0
    closed: int = 0
    sent: int = 0
    received: int = 0


class _Log:
    """The lines of one org, rated."""

    def __init__(self) -> None:
        self._bucket = TokenBucket(*_RATE)
        self._dropped = 0

    def write(self, event: str, fields: dict[str, Any]) -> None:
        if not self._bucket.take():
            self._dropped += 1
            return
        if self._dropped:
            fields["dropped"], self._dropped = self._dropped, 0
        get_logger().info(event, **fields)


class Egress:
    """Starts the broker, starts it anew when it dies, and gives it workers.

    When it died, the descriptors of its workers are of no use any more: ``lost`` is called with their (plugin, org)
    once the next one is there. ``allow`` are networks that may be reached though they are special; ``nameserver``
    (``address:port``) is asked instead of the system's resolver. As root it runs as ``uid`` and ``gid``.
    """

    def __init__(
        self,
        *,
        allow: Iterable[str] = (),
        nameserver: str = "",
        uid: int = _NOBODY,
        gid: int = _NOBODY,
    ) -> None:
        root = os.geteuid() == 0
        self._configure = messages.Configure(list(allow), nameserver, uid if root else -1, gid if root else -1)
        self.lost: Callable[[set[tuple[str, str]]], None] = lambda workers: None
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ids = 0
        self._workers: dict[int, tuple[str, str]] = {}
        self._waiting: list[tuple[list[int], messages.Attach]] = []
        self._restart: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._closing = False
        self._started = 0.0
        self._logs: OrderedDict[str, _Log] = OrderedDict()
        self.counters: OrderedDict[tuple[str, str], Counters] = OrderedDict()
        """Per (plugin, org); of the most recent ones."""
        self.totals: dict[str, Counters] = {}
        """Per plugin."""

    @property
    def pid(self) -> int:
        """The broker's process id; 0 while there is none."""
        return self._process.pid if self._process and self._process.poll() is None else 0

    def want(self) -> None:
        """Start the broker in the background, unless that has been done: a plugin that may need it is there."""
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._start_anew(set()))

    async def start(self) -> None:
        """Start the broker. Raises ``HostError`` if it cannot be started."""
        ours, theirs = socket_pair()
        self._ready = asyncio.get_running_loop().create_future()
        try:
            self._process = subprocess.Popen(  # noqa: ASYNC220  # an exec, without a shell or a wait
                [sys.executable, "-I", "-m", "sandbox.broker", str(theirs.fileno())],
                env=MINIMAL_ENVIRONMENT,
                cwd="/",
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise HostError(f"cannot start the egress broker: {error.strerror}") from None
        finally:
            theirs.close()
        channel = self._channel = Channel(
            ours, messages.FromBroker, hello=self._hello, receive=self._receive, closed=self._closed
        )
        channel.send(self._configure)  # it says hello once it is confined
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                await self._ready
        except TimeoutError:
            channel.close()
            self._end()
            raise HostError(f"the egress broker did not start within {_START_TIMEOUT:g} s") from None

    def _hello(self, _pid: int, _message: wire.Hello) -> None:
        self._started = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for descriptors, attach in waiting:
            self._give(descriptors, attach)
        if not self._ready.done():
            self._ready.set_result(None)

    def attach(
        self,
        descriptor: int,
        plugin: str,
        org: str,
        network: bool | Sequence[str],
        *,
        proxy: tuple[int, str] | None = None,
    ) -> None:
        """Give the broker its end of a worker's socket pair, which is closed here: the worker is of ``org`` from now
        on. While there is no broker, the worker waits for the next.

        ``proxy``, for the worker's programs, is the broker's socket to the keeper of their namespaces, closed here as
        well, and the secret by which they make themselves known.
        """
        self._ids += 1
        rules = network if isinstance(network, bool) else list(network)
        end, secret = proxy or (-1, "")
        attach = messages.Attach(self._ids, plugin, org, rules, secret)
        descriptors = [descriptor, end] if proxy else [descriptor]
        if self._closing:
            _close(descriptors)
        elif self._channel is None or self._channel.is_closed or not self._ready.done():
            self._drop_ended()
            self._waiting.append((descriptors, attach))
        else:
            self._give(descriptors, attach)

    def _drop_ended(self) -> None:
        """Close the descriptors of workers that have ended while there was no broker to give them to."""
        poll = select.poll()
        for descriptors, _ in self._waiting:
            poll.register(descriptors[0], 0)  # whose other end is closed is told of in any case
        ended = {descriptor for descriptor, _ in poll.poll(0)}
        for descriptors, _ in self._waiting:
            if descriptors[0] in ended:
                _close(descriptors)
        self._waiting = [waiting for waiting in self._waiting if waiting[0][0] not in ended]

    def _give(self, descriptors: list[int], attach: messages.Attach) -> None:
        assert self._channel is not None
        self._workers[attach.id] = attach.plugin, attach.org
        self._channel.send(attach, descriptors)

    def _closed(self, reason: str) -> None:
        self._end()
        if self._closing:
            return
        if not self._ready.done():
            self._ready.set_exception(HostError(f"the egress broker could not start {reason}".strip()))
            return
        get_logger().error("the egress broker died; starting it anew", reason=reason)
        orphans = set(self._workers.values())
        self._workers.clear()
        self._restart = asyncio.get_running_loop().create_task(self._start_anew(orphans))

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    async def _start_anew(self, orphans: set[tuple[str, str]]) -> None:
        pause = _FIRST_PAUSE
        if self._started and time.monotonic() - self._started < _SHORT_LIFE:
            await asyncio.sleep(pause)
        while True:
            try:
                await self.start()
                break
            except HostError as error:
                get_logger().error("the egress broker does not start", reason=str(error))
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
        if orphans:
            self.lost(orphans)

    def _receive(self, message: Any) -> None:
        if isinstance(message, messages.Dropped):
            get_logger().warning("records of the egress broker are missing", count=message.count)
            return
        worker = self._workers.get(message.id) if not isinstance(message, wire.Hello) else None
        if worker is None:
            return
        if isinstance(message, messages.Gone):
            del self._workers[message.id]
            if message.reason:
                self._log(worker, "the worker is cut off from the network", reason=message.reason)
            return
        for counters in (_recent(self.counters, worker, Counters), self.totals.setdefault(worker[0], Counters())):
            _count(counters, message)
        endpoint = {"host": message.host, "port": message.port}
        if isinstance(message, messages.Connected):
            self._log(worker, "connected", **endpoint, address=message.address, ms=message.ms)
        elif isinstance(message, messages.Closed):
            source = "broker" if message.counted else "worker"
            said = {"sent": message.sent, "received": message.received, "source": source}
            self._log(worker, "connection closed", **endpoint, **said)
        elif message.policy:
            self._log(worker, "connection refused", **endpoint, reason=message.reason)
        else:
            self._log(worker, "connection failed", **endpoint, reason=message.reason)

    def _log(self, worker: tuple[str, str], event: str, **fields: Any) -> None:
        plugin, org = worker
        _recent(self._logs, org, _Log).write(event, {"plugin": plugin, "org": org, **fields})

    async def stop(self) -> None:
        """End the broker. Connections that were made live on."""
        self._closing = True
        for task in (self._starting, self._restart):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for descriptors, _ in self._waiting:
            _close(descriptors)
        self._waiting.clear()
        if self._channel is not None:
            self._channel.close()
        self._end()


def _count(counters: Counters, message: messages.Connected | messages.Closed | messages.Refused) -> None:
    if isinstance(message, messages.Connected):
        counters.connected += 1
    elif isinstance(message, messages.Closed):
        counters.closed += 1
        counters.sent += message.sent
        counters.received += message.received
    elif message.policy:
        counters.refused += 1
    else:
        counters.failed += 1


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _recent(kept: OrderedDict[K, V], key: K, make: Callable[[], V]) -> V:
    """The value of ``key``, made if there is none; that of the key which was not asked for the longest goes."""
    value = kept.get(key)
    if value is None:
        value = kept[key] = make()
        if len(kept) > _REMEMBERED:
            kept.popitem(last=False)
    else:
        kept.move_to_end(key)
    return value
