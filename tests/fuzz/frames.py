"""Damaged frames for every decoder, and for the front's handles on children of which each byte is a stranger's."""

import asyncio
import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import msgspec

from hayhost import processes, worker
from hayhost.channel import socket_pair
from hayhost.errors import PluginLoadError
from hayhost.logs import PluginLog
from hayhost.processes import Nursery, Zygote
from sandbox import wire
from sandbox.confinement import UNCONFINED
from tests.test_channel import HELLO, Peer, Rig, StandIn, turns
from tests.test_wire import UNIONS

__all__ = ["Frames", "Run", "decode", "quiet_loop", "workers", "zygotes"]

Run = Callable[[int, int], int]
"""Sends so many frames from a seed; how many of something there were."""

_EDGES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    77,
    127,
    128,
    255,
    256,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**63),
    0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x1b[31m\n",
    "x" * 5000,
    b"",
    b"{}",
    b"\xff",
    b'{"a": "\xff"}',
    b"x" * 20_000,
    [],
    {},
    [[]],
)


class Frames:
    """Frames that begin as good ones of a union, and mostly do not stay so."""

    def __init__(self, messages: list[wire.Message], chance: random.Random) -> None:
        self._frames = [wire.encode(message) for message in messages]
        self._fields = [msgspec.msgpack.decode(frame[4:]) for frame in self._frames]
        self._chance = chance

    def good(self) -> bytes:
        """One as it should be."""
        return self._chance.choice(self._frames)

    def next(self) -> bytes:
        """One that may be damaged, in what it says or in its bytes."""
        chance = self._chance
        match chance.randrange(6):
            case 0:
                return self.good()
            case 1 | 2 | 3:
                return self._other_fields()
            case 4:
                body = bytearray(self.good()[4:])
                for _ in range(chance.randrange(1, 4)):
                    at = chance.randrange(len(body))
                    body[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
                    body = body or bytearray(b"\xc0")
                return _framed(bytes(body))
            case _:
                frame = bytearray(self.good())
                frame[chance.randrange(4)] = chance.randrange(256)
                return bytes(frame)

    def _other_fields(self) -> bytes:
        """Well-formed msgpack with fields exchanged, added or left out, or with another message's number."""
        chance = self._chance
        fields = list(chance.choice(self._fields))
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(fields) + 1)
            match chance.randrange(4):
                case 0:
                    fields[at:at] = [chance.choice(_EDGES)]
                case 1:
                    del fields[at : at + 1]
                case 2:
                    fields[:1] = [chance.randrange(-1, 33)]
                case _:
                    fields[at : at + 1] = [chance.choice(_EDGES)]
        return _framed(msgspec.msgpack.encode(fields))


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def decode(count: int, seed: int) -> int:
    """Feed ``count`` frames to the decoders of all unions, in pieces; how many were messages.

    What comes out is a message of the union or a ``ProtocolError``, and nothing more is held than one frame.
    """
    chance = random.Random(seed)
    sources = [(union, Frames(messages, chance)) for union, messages in UNIONS]
    fed = accepted = 0
    while fed < count:
        union, frames = chance.choice(sources)
        decoder: wire.Decoder[Any] = wire.Decoder(union)
        batch = [*(frames.good() for _ in range(chance.randrange(3))), frames.next()]  # nothing follows a bad one
        fed += len(batch)
        data = b"".join(batch)
        try:
            while data:
                size = chance.randrange(1, len(data) + 1) if chance.random() < 0.5 else len(data)
                for message in decoder.feed(data[:size]):
                    assert isinstance(message, union)
                    accepted += 1
                data = data[size:]
                assert decoder.pending <= 4 + wire.MAX_FRAME
        except wire.ProtocolError:
            try:
                list(decoder.feed(b""))
            except wire.ProtocolError:
                continue
            raise AssertionError("a decoder goes on after it failed") from None
    return accepted


@contextlib.contextmanager
def quiet_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop into which no exception may get, and no real process: what greets is the fuzzer itself."""
    escaped: list[dict[str, Any]] = []
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: escaped.append(context))
    try:
        with mock.patch.object(worker, "Process", StandIn), mock.patch.object(processes, "Process", StandIn):
            yield loop
            loop.run_until_complete(turns(5))
    finally:
        loop.close()
    assert escaped == []


def _each(count: int, seed: int, run: Callable[[random.Random, asyncio.AbstractEventLoop], Any]) -> int:
    """``await run(chance, loop)`` until it has sent ``count`` frames, each time from a seed of its own."""
    sent = number = 0
    before = len(os.listdir("/proc/self/fd"))
    with quiet_loop() as loop:
        inside = len(os.listdir("/proc/self/fd"))
        while sent < count:
            number += 1
            try:
                sent += loop.run_until_complete(asyncio.wait_for(run(random.Random(f"{seed}/{number}"), loop), 20))
            except BaseException as error:
                error.add_note(f"in run {number} of seed {seed}")
                raise
        loop.run_until_complete(turns(5))
        assert len(os.listdir("/proc/self/fd")) <= inside, "descriptors are left"
    assert len(os.listdir("/proc/self/fd")) <= before
    return number


def workers(count: int, seed: int) -> int:
    """Send ``count`` frames to handles of workers with requests, hooks and dumps under way; how many handles.

    Every request is told once how it ended, whatever came; the handle is ended once.
    """
    messages = UNIONS[0][1]

    async def run(chance: random.Random, _loop: asyncio.AbstractEventLoop) -> int:
        frames = Frames([message for message in messages if chance.random() < 0.9] or messages, chance)
        one = Rig()
        askers = []
        pending: list[asyncio.Future[Any]] = []
        if chance.random() < 0.95:
            if chance.random() < 0.95:
                await one.ready()
            else:
                await one.greeted()
        if one.worker._identified:
            for _ in range(chance.randrange(4)):
                id, asker = one.ask()
                askers.append(asker)
                if chance.random() < 0.3:
                    one.worker.cancel(id)
                    askers.remove(asker)
            if chance.random() < 0.3:
                pending.append(asyncio.ensure_future(one.worker.hook("on_enable", {}, None, 1)))
            if chance.random() < 0.3:
                pending.append(asyncio.ensure_future(one.worker.dump_state()))
            if chance.random() < 0.2:
                one.worker.ping(0)
        sent = 0
        while not one.gone and sent < 12:
            one.peer.say(frames.next() if chance.random() < 0.5 else frames.good())
            sent += 1
            await turns(2)
        if chance.random() < 0.5:
            one.peer.sock.close()
            await turns(3)
        one.worker._end("the run is over")
        one.peer.sock.close()
        await asyncio.gather(*pending, return_exceptions=True)
        for asker in askers:
            assert asker.ends == 1, asker.__dict__
        assert len(one.gone) == 1
        assert not one.worker.streams
        assert not one.worker.cancelled
        one.worker.phases()
        return sent

    return _each(count, seed, run)


class _Nobody:
    """A nursery and an output that do nothing."""

    pid = 1
    exits: dict[int, int] = {}

    async def contain(self, _name: str, _pid: int, _plan: Any) -> str:
        return ""

    def left(self, _name: str) -> None:
        pass

    def close(self) -> None:
        pass


def zygotes(count: int, seed: int) -> int:
    """Send ``count`` frames to handles of zygotes; how many handles. Each has loaded, or has failed with a reason."""
    messages = next(messages for union, messages in UNIONS if union == wire.FromZygote)
    spec = SimpleNamespace(plan=UNCONFINED, subprocess=(), hook_timeout=1.0, name="p", folder=Path("/"))

    async def run(chance: random.Random, _loop: asyncio.AbstractEventLoop) -> int:
        frames = Frames(messages, chance)
        ours, theirs = socket_pair()
        keeper, its = socket_pair()
        nobody = cast(Any, _Nobody())
        zygote = Zygote(cast(Any, spec), ours, keeper, nobody, PluginLog(plugin="p"), cast(Nursery, nobody))
        its.close()
        peer = Peer(theirs)
        if chance.random() < 0.9:
            peer.say(HELLO)
            await turns(3)
        sent = 0
        while zygote.alive and sent < 8:
            peer.say(frames.next() if chance.random() < 0.5 else frames.good())
            sent += 1
            await turns(2)
        peer.sock.close()
        await turns(5)
        assert not zygote.alive
        try:
            await zygote.loaded
        except PluginLoadError as error:
            if not str(error):
                raise AssertionError("no reason is told") from None
        return sent

    with mock.patch.object(processes, "_REPORTED", 0.0), mock.patch.object(processes, "_LEAVE", 0.0):
        return _each(count, seed, run)
