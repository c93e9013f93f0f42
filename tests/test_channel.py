"""The front's end of a child's socket, and its handle on a worker, against a child that means harm."""

import array
import asyncio
import contextlib
import functools
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hayhost import worker as worker_module
from hayhost.channel import Channel, socket_pair
from hayhost.errors import RequestError, StartFailedError, WorkerLostError
from hayhost.inspection import Descriptors
from hayhost.installs import Installation, TestInstalls
from hayhost.isolation import Isolation, Quarters
from hayhost.logs import PluginLog
from hayhost.metadata import Metadata
from hayhost.metrics.counts import PluginCounts
from hayhost.pool import Pool
from hayhost.processes import Zygote
from hayhost.settings import Settings
from hayhost.states import WorkerState
from hayhost.version import Version
from hayhost.worker import Worker
from sandbox import wire
from sandbox.confinement import UNCONFINED, Level

HELLO = wire.Hello(wire.VERSION, [])
PID = 4_000_000
"""Of nobody: the process itself is a stand-in."""


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test, and fail it if an exception got into its event loop."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def main() -> None:
            escaped: list[dict[str, Any]] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: escaped.append(context))
            try:
                async with asyncio.timeout(10):
                    await test(*args, **kwargs)
                    await turns(5)
            finally:
                assert escaped == []

        asyncio.run(main())

    return run


async def turns(count: int) -> None:
    """Let the loop turn."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop turn until ``condition()``; the test's own time limit ends it."""
    while not condition():  # noqa: ASYNC110  # it is the turns of the loop that are waited for
        await asyncio.sleep(0)


def frames(*messages: wire.Message) -> bytes:
    return b"".join(map(wire.encode, messages))


class Peer:
    """The child's end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(10)  # the loop does not turn meanwhile: what is said at once must fit the socket's buffer

    def say(self, *what: wire.Message | bytes) -> None:
        for part in what:
            try:
                self.sock.sendall(part if isinstance(part, bytes) else wire.encode(part))
            except (BrokenPipeError, ConnectionResetError):
                return  # cut off in the middle of it

    def heard(self) -> list[Any]:
        """The frames that have arrived."""
        self.sock.setblocking(False)
        decoder: wire.Decoder[Any] = wire.Decoder(wire.ToWorker)
        found: list[Any] = []
        with contextlib.suppress(OSError):
            while data := self.sock.recv(1 << 20):
                found += decoder.feed(data)
        return found


class Ends:
    """A channel to a peer, and all that came of it."""

    def __init__(self, messages: Any = wire.FromWorker) -> None:
        ours, theirs = socket_pair()
        self.peer = Peer(theirs)
        self.greeted: list[int] = []
        self.received: list[Any] = []
        self.reasons: list[str] = []
        self.channel = Channel(
            ours,
            messages,
            hello=lambda pid, _message: self.greeted.append(pid),
            receive=self.received.append,
            closed=self.reasons.append,
        )

    async def ended(self) -> str:
        await until(lambda: self.reasons)
        await turns(5)
        assert self.channel.is_closed
        (reason,) = self.reasons  # told once
        return reason


@contextlib.contextmanager
def ends(messages: Any = wire.FromWorker) -> Iterator[Ends]:
    both = Ends(messages)
    yield both
    both.channel.close()
    both.peer.sock.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---- the channel


@in_loop
async def test_the_kernel_says_who_greets() -> None:
    with ends() as both:
        both.peer.say(HELLO)
        await until(lambda: both.greeted)
        assert both.greeted == [os.getpid()]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"\xff" * 64, "exceeds the limit"),
        (b"GET / HTTP/1.1\r\n\r\n", "exceeds the limit"),
        (b"\x00\x00\x00\x03\xc1\xc1\xc1", "not a valid frame"),
        (b"\x00\x00\x00\x00", "not a valid frame"),
        (frames(wire.Pong(1)), "not a Hello"),
        (frames(wire.Ready("", [])), "not a Hello"),
        (frames(wire.Body(1, b"x", True), HELLO), "not a Hello"),
        (frames(wire.Hello(wire.VERSION + 1, [])), f"version {wire.VERSION + 1} of the protocol, not {wire.VERSION}"),
        (frames(wire.Hello(-1, [])), "version -1"),
    ],
)
@in_loop
async def test_who_does_not_greet_properly_is_cut_off(said: bytes, reason: str) -> None:
    with ends() as both:
        both.peer.say(said)
        ended = await both.ended()
        assert ended.startswith("protocol error: ")
        assert reason in ended
        assert (both.greeted, both.received) == ([], [])
        assert both.peer.sock.recv(1) == b""


@in_loop
async def test_who_leaves_without_a_greeting_has_ended() -> None:
    with ends() as both:
        both.peer.say(frames(HELLO)[:-1])
        both.peer.sock.close()
        assert await both.ended() == "it ended before it said hello"


@pytest.mark.parametrize("said", [b"\xff\xff\xff\xff", b"\x00\x10\x00\x01", b"\x00\x00\x00\x01\xc0"])
@in_loop
async def test_garbage_after_good_frames_ends_it_and_the_good_ones_count(said: bytes) -> None:
    with ends() as both:
        both.peer.say(HELLO, wire.Pong(1), wire.Pong(2), said, wire.Pong(3))
        assert (await both.ended()).startswith("protocol error: ")
        assert both.received == [wire.Pong(1), wire.Pong(2)]


@in_loop
async def test_half_a_frame_and_then_nothing_is_an_end() -> None:
    with ends() as both:
        both.peer.say(HELLO, frames(wire.Pong(1))[:-1])
        await until(lambda: both.greeted)
        both.peer.sock.close()
        assert await both.ended() == ""
        assert both.received == []


@in_loop
async def test_a_slow_writer_is_understood() -> None:
    messages = [wire.Pong(1), wire.Body(2, b"body", True), wire.Log("info", "m", b"", "", 0)]
    with ends() as both:
        for byte in frames(HELLO, *messages):
            both.peer.say(bytes([byte]))
            await turns(2)
        await until(lambda: len(both.received) == 3)
        assert both.received == messages


def send_descriptors(sock: socket.socket, data: bytes, count: int) -> None:
    with open(os.devnull) as file:
        descriptors = array.array("i", [file.fileno()] * count)
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors.tobytes())])


@in_loop
async def test_descriptors_that_come_along_are_not_taken() -> None:
    with ends() as both:
        before = open_descriptors()
        send_descriptors(both.peer.sock, frames(HELLO), 100)
        for number in range(5):  # an ordinary user may not have many more under way
            send_descriptors(both.peer.sock, frames(wire.Pong(number)), 100)
        await until(lambda: len(both.received) == 5)
        assert open_descriptors() == before


@in_loop
async def test_credentials_that_are_claimed_are_the_kernels() -> None:
    with ends() as both:
        claimed = struct.pack("3i", os.getpid(), os.getuid(), os.getgid())
        both.peer.sock.sendmsg([frames(HELLO)], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, claimed)])
        await until(lambda: both.greeted)
        assert both.greeted == [os.getpid()]


class Flood:
    """A process that writes the same frames until nobody can read them any more."""

    PROGRAM = """if True:
        import os, sys
        data, descriptor = sys.stdin.buffer.read(), int(sys.argv[1])
        os.set_blocking(descriptor, True)
        while True:
            os.write(descriptor, data)
        """

    def __init__(self, sock: socket.socket, data: bytes) -> None:
        command = [sys.executable, "-ISc", self.PROGRAM, str(sock.fileno())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[sock.fileno()]
        )
        assert self._process.stdin
        self._process.stdin.write(data)
        self._process.stdin.close()

    @property
    def goes_on(self) -> bool:
        return self._process.poll() is None

    def __enter__(self) -> "Flood":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def all_closed(reader: int) -> bool:
    """Whether nobody has the writing end of a pipe any more; closes the reading one."""
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 1) == b""
    except BlockingIOError:
        return False
    finally:
        os.close(reader)


@in_loop
async def test_a_flood_leaves_the_loop_to_the_others() -> None:
    with ends() as flooding, ends() as other:
        flooding.peer.say(HELLO)
        other.peer.say(HELLO)
        await until(lambda: flooding.greeted and other.greeted)
        with Flood(flooding.peer.sock, frames(wire.Pong(0)) * 1000) as flood:
            for number in range(20):
                other.peer.say(wire.Pong(number))
                await until(lambda: other.received[-1:] == [wire.Pong(number)])  # noqa: B023  # called before the next
            await until(lambda: len(flooding.received) > 10_000)
            assert flood.goes_on
            flooding.channel.close()


@in_loop
async def test_draining_one_that_writes_on_and_on_comes_to_an_end() -> None:
    with ends() as both:
        both.peer.say(HELLO)
        await until(lambda: both.greeted)
        with Flood(both.peer.sock, frames(wire.Pong(0)) * 10_000) as flood:
            await until(lambda: both.received)
            both.channel.drain()
            assert flood.goes_on
            both.channel.close()


@in_loop
async def test_a_reader_that_takes_its_time_gets_everything_in_order() -> None:
    sent = [wire.Body(number, b"x" * wire.CHUNK, False) for number in range(200)]
    with ends() as both:
        both.peer.say(HELLO)
        await until(lambda: both.greeted)
        for message in sent:
            both.channel.send(message)
        await turns(5)
        decoder: wire.Decoder[Any] = wire.Decoder(wire.ToWorker)
        got: list[Any] = []
        both.peer.sock.setblocking(False)
        while len(got) < len(sent):
            await turns(1)
            with contextlib.suppress(BlockingIOError):
                got += decoder.feed(both.peer.sock.recv(100_000))
        assert got == sent


@in_loop
async def test_a_reader_that_never_reads_is_no_reason_to_wait() -> None:
    with ends() as both:
        both.peer.say(HELLO)
        await until(lambda: both.greeted)
        for number in range(100):
            both.channel.send(wire.Body(number, b"x" * wire.CHUNK, False))
        both.peer.say(wire.Pong(1))
        await until(lambda: both.received)
        both.peer.sock.close()
        await both.ended()


@in_loop
async def test_descriptors_for_a_child_that_is_gone_are_closed() -> None:
    with ends() as both:
        both.peer.say(HELLO)
        await until(lambda: both.greeted)
        reader, writer = os.pipe()
        both.peer.sock.close()
        both.channel.send(wire.Fork(), [writer])
        await both.ended()
        assert all_closed(reader)
        reader, writer = os.pipe()
        both.channel.send(wire.Fork(), [writer])  # nor has it been told yet
        await turns(5)
        assert all_closed(reader)


@in_loop
async def test_descriptors_that_still_wait_are_closed_with_it() -> None:
    with ends() as both:
        both.peer.say(HELLO)
        await until(lambda: both.greeted)
        for number in range(100):
            both.channel.send(wire.Body(number, b"x" * wire.CHUNK, False))
        reader, writer = os.pipe()
        both.channel.send(wire.Fork(), [writer])
        await turns(5)
        both.channel.close()
        assert all_closed(reader)


@in_loop
async def test_what_was_said_before_the_end_counts() -> None:
    with ends() as both:
        both.peer.say(HELLO)
        await until(lambda: both.greeted)
        both.peer.say(wire.Pong(1), wire.Pong(2))
        both.peer.sock.close()
        both.channel.send(wire.Ping(3))  # fails: there is no reader
        await both.ended()
        assert both.received == [wire.Pong(1), wire.Pong(2)]


@in_loop
async def test_closing_twice_is_safe() -> None:
    with ends() as both:
        both.channel.close()
        both.channel.close()
        both.channel.send(wire.Ping(1))
        both.channel.drain()
        await turns(5)
        assert both.reasons == []  # it is for the other side to be told


# ---- the worker


class StandIn:
    """A process that does not exist."""

    def __init__(self, pid: int, exited: Callable[[], None]) -> None:
        self.pid = pid if pid != os.getpid() else PID
        self.exited = exited
        self.killed = 0

    def kill(self) -> None:
        self.killed += 1

    def close(self) -> None:
        pass


class Forker:
    """Stands in for the zygote, and gives the test the child's end."""

    pid = 1
    spec = SimpleNamespace(plan=UNCONFINED, subprocess=())
    keeper = None

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.exits: dict[int, int] = {}
        self.alive = True
        self.killed = False
        self.forked: Callable[[Peer], None] = lambda peer: None

    def fork(
        self, log: PluginLog, scratch: str, *, become: bool = False, broker: int = -1, proxy: int = 0
    ) -> tuple[socket.socket, Descriptors]:
        if broker >= 0:
            os.close(broker)
        ours, theirs = socket_pair()
        self.peers.append(Peer(theirs))
        try:
            self.forked(self.peers[-1])
        except OSError:
            ours.close()
            raise
        return ours, frozenset()

    def kill(self) -> None:
        self.killed = True

    def close(self) -> None:
        pass


class FakeVersion:
    """A version whose workers are peers in the test's hand."""

    env: dict[str, str] = {}
    strict = False
    alive = True
    level = Level.NONE
    hooks: frozenset[str] = frozenset()
    metadata = Metadata()

    class manifest:
        version = "1"

    def __init__(self, forker: Forker) -> None:
        self.zygote = forker


class Asker:
    """A request's end of a stream."""

    def __init__(self) -> None:
        self.heads: list[wire.ResponseHead] = []
        self.bodies: list[bytes] = []
        self.credits = 0
        self.errors: list[RequestError] = []
        self.ends = 0

    def head(self, message: wire.ResponseHead) -> None:
        self.heads.append(message)
        self.ends += message.end

    def body(self, message: wire.Body) -> None:
        self.bodies.append(message.data)
        self.ends += message.end

    def credit(self, size: int) -> None:
        self.credits += size

    def failed(self, error: RequestError) -> None:
        self.errors.append(error)
        self.ends += 1


@pytest.fixture(autouse=True)
def no_real_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The greeting comes from the test itself: nothing may be done to *its* process."""
    monkeypatch.setattr(worker_module, "Process", StandIn)


class Rig:
    """A worker that is a peer in the test's hand."""

    def __init__(self) -> None:
        self.gone: list[str] = []
        forker = Forker()
        log = PluginLog(plugin="test")
        version = cast(Version, FakeVersion(forker))
        self.worker = Worker(
            version,
            cast(Zygote, forker),
            Quarters("1", ""),
            Isolation(Settings()),
            log,
            lambda _, reason: self.gone.append(reason),
        )
        (self.peer,) = forker.peers

    @property
    def process(self) -> StandIn:
        return cast(StandIn, self.worker._process)

    async def greeted(self) -> "Rig":
        self.peer.say(HELLO)
        await self.worker.hello
        return self

    async def ready(self) -> "Rig":
        await self.greeted()
        self.worker.start(Installation("acme", "Acme"), serve=True, hook_timeout=1)
        self.peer.say(wire.Ready("", []))
        assert await self.worker.ready(10) == ""
        return self

    def ask(self) -> tuple[int, Asker]:
        asker = Asker()
        id = self.worker.open(asker, lambda id: wire.Request(id, 0, "GET", "/", "", [], [], "", b"", True))
        return id, asker

    async def cut_off(self) -> str:
        """Wait until the worker is ended for what it said; the reason."""
        reason = await self.worker.exit
        await turns(5)
        assert self.gone == [reason]
        assert self.worker.lifecycle.state is WorkerState.ERROR
        assert not self.worker.streams
        assert not self.worker.cancelled
        assert not self.worker._hooks
        if self.worker._process is not None:
            assert self.process.killed
        return reason


@contextlib.asynccontextmanager
async def rig(*, ready: bool = True) -> Any:
    one = Rig()
    yield await one.ready() if ready else one
    one.worker._end("the test is over")
    one.peer.sock.close()


def head(id: int, *, end: bool = False, body: bytes = b"") -> wire.ResponseHead:
    return wire.ResponseHead(id, 200, [], body, end)


@in_loop
async def test_an_honest_worker_is_served() -> None:
    async with rig() as one:
        id, asker = one.ask()
        other_id, other = one.ask()
        one.peer.say(head(id), wire.Body(id, b"a", False), head(other_id, end=True), wire.Body(id, b"b", True))
        await until(lambda: asker.ends and other.ends)
        assert (asker.bodies, asker.errors, other.errors) == ([b"a", b"b"], [], [])
        assert one.worker.idle
        assert one.gone == []


NEVER_OPENED = 77


@pytest.mark.parametrize(
    "said",
    [
        [head(NEVER_OPENED)],
        [head(NEVER_OPENED, end=True)],
        [wire.Body(NEVER_OPENED, b"x", False)],
        [wire.Body(NEVER_OPENED, b"x", True)],
        [wire.Abort(NEVER_OPENED)],
        [wire.Window(NEVER_OPENED, 1)],
        [wire.Pong(0)],
        [head(1), wire.Body(1, b"", False)],
        [head(1, end=True), wire.Window(1, 1)],
        [head(0, end=True)],
        [head(1, end=True), head(1, end=True)],
        [head(1, end=True), wire.Body(1, b"", True)],
        [head(1), wire.Body(1, b"", True), wire.Body(1, b"x", False)],
        [wire.Abort(1), wire.Abort(1)],
        [wire.Abort(1), head(1)],
        [wire.Ready("", [])],
        [HELLO],
        [b"\xff\xff\xff\xff"],
        [frames(wire.Ping(1))],
        [frames(wire.Start("evil", "Evil", b"{}", b"{}", b"{}", True, 1.0, ""))],
    ],
    ids=repr,
)
@in_loop
async def test_a_worker_that_breaks_the_protocol_is_ended_and_its_requests_are_told(said: list[Any]) -> None:
    async with rig() as one:
        id, asker = one.ask()
        assert id == 1
        _, other = one.ask()
        hook = asyncio.ensure_future(one.worker.hook("on_enable", {}, None, 30))
        await turns(2)
        one.peer.say(*said)
        assert (await one.cut_off()).startswith("protocol error: ")
        assert asker.ends == 1
        assert [type(error) for error in other.errors] == [WorkerLostError]
        with pytest.raises(WorkerLostError):
            await hook


@pytest.mark.parametrize("answer", [head(1, end=True), wire.Abort(1)], ids=repr)
@in_loop
async def test_an_end_without_a_beginning_reaches_the_request_once(answer: wire.Message) -> None:
    async with rig() as one:
        _, asker = one.ask()
        one.peer.say(answer)
        await until(lambda: asker.ends)
        assert asker.ends == 1
        assert one.gone == []


@pytest.mark.parametrize(
    "said",
    [
        [wire.Ready("", [])],
        [HELLO],
        [head(1, end=True)],
        [wire.Failed("there is no worker here")],
    ],
    ids=repr,
)
@in_loop
async def test_a_worker_without_an_identity_has_nothing_to_say(said: list[Any]) -> None:
    async with rig(ready=False) as one:
        await one.greeted()
        one.peer.say(*said)
        await one.cut_off()
        with pytest.raises(StartFailedError):
            await one.worker.ready(10)


@in_loop
async def test_a_failed_fork_is_told_with_its_reason() -> None:
    async with rig(ready=False) as one:
        one.peer.say(wire.Failed("cannot fork a worker: no processes left"))
        assert await one.cut_off() == "cannot fork a worker: no processes left"
        with pytest.raises(StartFailedError, match="no processes left"):
            await one.worker.hello


@in_loop
async def test_a_worker_that_ended_before_its_start_gives_nothing_to_the_broker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = SimpleNamespace(plan=SimpleNamespace(layers=frozenset({"seccomp"})), subprocess=())
    monkeypatch.setattr(Forker, "spec", spec)
    monkeypatch.setattr(FakeVersion.manifest, "permissions", SimpleNamespace(network=True), raising=False)
    monkeypatch.setattr(FakeVersion.manifest, "name", "test", raising=False)
    async with rig(ready=False) as one:
        one.peer.sock.close()
        await one.cut_off()
        one.worker.start(Installation("acme", "Acme"), serve=True, hook_timeout=1)
        with pytest.raises(StartFailedError):
            await one.worker.ready(10)
        assert one.worker._isolation.egress._waiting == []


@pytest.mark.parametrize("said", [b"\xff" * 8, frames(wire.Hello(7, [])), frames(wire.Ready("", [])), b""])
@in_loop
async def test_a_worker_that_does_not_greet_fails_its_start(said: bytes) -> None:
    async with rig(ready=False) as one:
        one.peer.say(said)
        one.peer.sock.close()
        await one.cut_off()
        with pytest.raises(StartFailedError):
            await one.worker.hello


@in_loop
async def test_what_nobody_asked_for_changes_nothing() -> None:
    async with rig() as one:
        id, asker = one.ask()
        one.peer.say(
            wire.HookDone(NEVER_OPENED, True, "", 0, 0),
            wire.HookDone(0, True, "", 0, 0),
            wire.McpServers([wire.McpServer("a", "local")]),
            wire.Log("error", "\x1b[31m\nforged", b"\xff not json", "x" * 4096, 2**62),
            wire.Log("info", "deep", b"[" * 20_000, "", 0),
            wire.Log("info", "no UTF-8", b'{"a": "\xff"}', "", 0),
            head(id, end=True),
        )
        await until(lambda: asker.ends)
        assert (asker.errors, one.gone) == ([], [])


@in_loop
async def test_a_cancelled_stream_may_go_on_until_its_end_and_not_longer() -> None:
    async with rig() as one:
        id, asker = one.ask()
        one.worker.cancel(id)
        one.peer.say(head(id), wire.Body(id, b"x", False), wire.Window(id, 1))
        one.peer.say(wire.Body(id, b"y", True))
        await until(lambda: not one.worker.cancelled)
        assert (asker.heads, asker.bodies, asker.ends) == ([], [], 0)
        assert one.worker.idle
        one.peer.say(wire.Body(id, b"z", False))
        await one.cut_off()


@in_loop
async def test_frames_after_the_one_that_ended_it_are_not_looked_at() -> None:
    async with rig() as one:
        id, asker = one.ask()
        one.peer.say(frames(head(id), wire.Body(id, b"a", False), wire.Abort(NEVER_OPENED), wire.Body(id, b"b", True)))
        one.peer.say(frames(wire.Body(id, b"c", False)) * 50)
        await one.cut_off()
        assert asker.bodies == [b"a"]
        assert len(asker.errors) == 1


@in_loop
async def test_a_worker_that_floods_while_it_is_ended_does_not_hold_up_the_front() -> None:
    async with rig() as one:
        id, asker = one.ask()
        with Flood(one.peer.sock, frames(wire.Pong(0)) * 10_000) as flood:
            one.process.exited()  # it is dead, but something of it writes on
            assert flood.goes_on
            await one.cut_off()
        assert [type(error) for error in asker.errors] == [WorkerLostError]
        assert id not in one.worker.streams


@in_loop
async def test_answers_that_were_sent_before_the_death_are_answers() -> None:
    async with rig() as one:
        id, asker = one.ask()
        _, other = one.ask()
        one.peer.say(head(id, end=True, body=b"done"))
        one.process.exited()
        await one.cut_off()
        assert [message.body for message in asker.heads] == [b"done"]
        assert asker.errors == []
        assert len(other.errors) == 1


@in_loop
async def test_a_settings_frame_that_does_not_fit_is_a_failed_start() -> None:
    async with rig(ready=False) as one:
        await one.greeted()
        big = Installation("acme", "Acme", {"key": "x" * wire.MAX_FRAME})
        with pytest.raises(StartFailedError, match="exceeds the limit"):
            one.worker.start(big, serve=True, hook_timeout=1)


@in_loop
async def test_a_hook_of_a_worker_that_is_gone_fails_at_once() -> None:
    async with rig() as one:
        one.peer.sock.close()
        await one.cut_off()
        with pytest.raises(WorkerLostError):
            await one.worker.hook("on_enable", {}, None, 3600)


streams = st.integers(0, 4)
datas = st.binary(max_size=20)
hostile = st.one_of(
    st.builds(wire.ResponseHead, streams, st.sampled_from([200, 204, 599]), st.just([]), datas, st.booleans()),
    st.builds(wire.Body, streams, datas, st.booleans()),
    st.builds(wire.Abort, streams),
    st.builds(wire.Window, streams, st.integers(1, wire.WINDOW)),
    st.builds(wire.HookDone, streams, st.booleans(), st.text(max_size=5), st.just(0), st.just(0)),
    st.builds(wire.Pong, streams),
    st.just(wire.Ready("", [])),
    st.just(HELLO),
    st.builds(wire.Log, st.just("info"), st.text(max_size=5), datas, st.just(""), st.just(0)),
    st.builds(wire.McpServers, st.just([])),
    st.binary(min_size=1, max_size=20),
    st.sampled_from(["ask", "cancel", "hook", "ping", "turn"]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(hostile, max_size=25), st.booleans())
def test_whatever_a_worker_says_every_request_is_told_its_end_once(script: list[Any], start_first: bool) -> None:
    in_loop(play)(script, start_first)


async def play(script: list[Any], start_first: bool) -> None:
    async with rig(ready=False) as one:
        await one.greeted()
        if start_first:
            one.worker.start(Installation("acme", "Acme"), serve=True, hook_timeout=1)
        askers: dict[int, Asker] = {}
        cancelled: set[int] = set()
        hooks: list[asyncio.Future[Any]] = []
        for step in script:
            match step:
                case "ask":
                    id, asker = one.ask()
                    askers[id] = asker
                case "cancel":
                    for id in list(one.worker.streams)[:1]:
                        one.worker.cancel(id)
                        cancelled.add(id)
                case "hook":
                    hooks.append(asyncio.ensure_future(one.worker.hook("on_enable", {}, None, 3600)))
                case "ping":
                    one.worker.ping(0.0)
                case "turn":
                    await turns(2)
                case _:
                    one.peer.say(step)
        one.peer.sock.close()
        await one.worker.exit
        await asyncio.gather(*hooks, return_exceptions=True)
        await turns(3)
        assert len(one.gone) == 1
        for id, asker in askers.items():
            if id in cancelled:
                continue
            asked_after_the_end = id in one.worker.streams
            assert asker.ends == (0 if asked_after_the_end else 1)


# ---- the slot


class FakePlugin:
    """A plugin whose workers are peers in the test's hand."""

    name = "test"

    def __init__(self, forker: Forker) -> None:
        self.current = FakeVersion(forker)
        self.counts = PluginCounts()

    async def ready_version(self) -> "FakeVersion":
        return self.current


class Waiting:
    """A request that wants a worker."""

    trace = None

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.errors: list[RequestError] = []

    def begin(self, worker: Worker) -> None:
        self.workers.append(worker)

    def failed(self, error: RequestError) -> None:
        self.errors.append(error)


@contextlib.asynccontextmanager
async def slots(forked: Callable[[Peer], None], **options: Any) -> Any:
    """``make(org)`` gives slots whose workers ``forked(peer)`` plays."""
    forker = Forker()
    forker.forked = forked
    pool = Pool(Settings(mode="test", spares=0, **options), TestInstalls(), Isolation(Settings()))
    plugin = cast(Any, FakePlugin(forker))
    yield lambda org: pool.slot(plugin, org), pool
    await pool.close()
    for peer in forker.peers:
        if peer.sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(peer.sock)
            peer.sock.close()


def obedient(peer: Peer, then: Callable[[Peer], None] = lambda peer: None) -> None:
    """Greet, and be ready as soon as the identity has come; ``then(peer)`` is what happens at once after that."""
    loop = asyncio.get_running_loop()
    peer.say(HELLO)

    def readable() -> None:
        messages = peer.heard()
        if any(isinstance(message, wire.Start) for message in messages):
            peer.say(wire.Ready("", []))
            then(peer)
        if any(isinstance(message, wire.Stop) for message in messages) or not messages:
            loop.remove_reader(peer.sock)
            peer.sock.close()

    loop.add_reader(peer.sock, readable)


@in_loop
async def test_a_worker_that_dies_the_moment_it_is_ready_never_serves() -> None:
    def die(peer: Peer) -> None:
        asyncio.get_running_loop().remove_reader(peer.sock)
        peer.sock.close()

    async with slots(lambda peer: obedient(peer, die)) as (make, pool):
        slot, request = make("acme"), Waiting()
        slot.submit(request)
        await until(lambda: request.errors or request.workers)
        assert [type(error) for error in request.errors] == [StartFailedError]
        assert slot.worker is None
        assert not pool.workers
        assert slot.breaker.reason


@in_loop
async def test_a_start_that_fails_in_an_unforeseen_way_is_told_to_who_waits() -> None:
    def refuse(peer: Peer) -> None:
        raise OSError(24, "Too many open files")

    async with slots(refuse) as (make, pool):
        slot, request = make("acme"), Waiting()
        slot.submit(request)
        await until(lambda: request.errors)
        assert request.errors[0].status == 503
        assert not pool.workers


@in_loop
async def test_only_as_many_workers_leave_as_are_needed() -> None:
    async with slots(obedient, max_workers=3) as (make, _pool):
        first = [make(org) for org in "abc"]
        for slot in first:
            request = Waiting()
            slot.submit(request)
            await until(lambda: request.workers)  # noqa: B023  # called before the next
        fourth = make("d")
        fourth.submit(Waiting())
        await until(lambda: fourth.worker)
        assert [slot.worker is not None for slot in first] == [False, True, True]


@in_loop
async def test_a_worker_that_nobody_waits_for_any_more_makes_room() -> None:
    async with slots(obedient, max_workers=1) as (make, _pool):
        left, stays = make("left"), make("stays")
        request, other = Waiting(), Waiting()
        left.submit(request)
        stays.submit(other)
        left.forget(request)  # its client has gone meanwhile
        await until(lambda: other.workers or other.errors)
        assert other.workers


@in_loop
async def test_a_worker_is_replaced_also_when_there_is_no_room_for_two() -> None:
    async with slots(obedient, max_workers=1) as (make, _pool):
        slot = make("acme")
        slot.submit(Waiting())
        await until(lambda: slot.worker)
        old = slot.worker
        await slot.replace("new config")
        assert slot.worker is not None
        assert slot.worker is not old
