"""Both ends of a worker's socket as state machines: what may come in which order, on real socket pairs."""

import asyncio
import os
import socket
from collections.abc import Coroutine
from typing import Any
from unittest import mock

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hayhost import worker
from hayhost.channel import socket_pair
from hayhost.states import WorkerState
from sandbox import link, wire
from tests.test_channel import Asker, Rig, StandIn, head, turns

__all__ = ["FrontMachine", "WorkerMachine"]


class _Looping(RuleBasedStateMachine):
    """Has a loop into which no exception may get."""

    def __init__(self) -> None:
        super().__init__()
        self.escaped: list[dict[str, Any]] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda _, context: self.escaped.append(context))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run ``work`` on the loop."""
        return self.loop.run_until_complete(asyncio.wait_for(work, 20))

    @invariant()
    def nothing_escapes(self) -> None:
        assert self.escaped == []

    def teardown(self) -> None:
        self.run(turns(3))
        self.loop.close()
        assert self.escaped == []


class FrontMachine(_Looping):
    """The front's handle on a worker. The model: which streams are open, which are cancelled, whether it is ended."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = mock.patch.object(worker, "Process", StandIn)
        self.patch.start()
        self.open: dict[int, Asker] = {}
        self.cancelled: set[int] = set()
        self.over: list[Asker] = []
        self.ended = False
        self.rig: Rig = self.run(self._ready())

    async def _ready(self) -> Rig:
        return await Rig().ready()

    def _say(self, *what: wire.Message | bytes) -> None:
        self.rig.peer.say(*what)
        self.run(turns(4))

    def _breaks(self) -> None:
        """What was said must have ended it."""
        self.ended = True
        self.over += self.open.values()
        self.open.clear()
        self.cancelled.clear()

    def _finish(self, id: int) -> None:
        self.cancelled.discard(id)
        if id in self.open:
            self.over.append(self.open.pop(id))

    @precondition(lambda self: not self.ended)
    @rule()
    def ask(self) -> None:
        id, asker = self.run(self._ask())
        self.open[id] = asker

    async def _ask(self) -> tuple[int, Asker]:
        return self.rig.ask()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.open)))
        self.rig.worker.cancel(id)
        del self.open[id]
        self.cancelled.add(id)

    @precondition(lambda self: not self.ended)
    @rule(data=st.data(), kind=st.sampled_from(["head", "whole", "piece", "end", "abort", "room", "nothing"]))
    def answer(self, data: st.DataObject, kind: str) -> None:
        known = sorted([*self.open, *self.cancelled])
        id = data.draw(st.sampled_from([*known, 0, 10**6]))
        asker, before = self.open.get(id), len(self.over)
        message: wire.Message = {
            "head": head(id),
            "whole": head(id, end=True),
            "piece": wire.Body(id, b"x", False),
            "end": wire.Body(id, b"", True),
            "abort": wire.Abort(id),
            "room": wire.Window(id, 1),
            "nothing": wire.Body(id, b"", False),
        }[kind]
        self._say(message)
        if id not in known or kind == "nothing":
            self._breaks()
        elif kind in ("whole", "end", "abort"):
            self._finish(id)
            assert asker is None or (asker.ends == 1 and len(self.over) == before + 1)
        elif asker is not None and kind == "room":
            assert asker.credits

    @precondition(lambda self: not self.ended)
    @rule()
    def answer_a_ping(self) -> None:
        self.rig.worker.pinged = None
        self.rig.worker.ping(0.0)
        self._say(wire.Pong(self.rig.worker._ping))

    @precondition(lambda self: not self.ended)
    @rule(
        said=st.sampled_from(
            [wire.encode(wire.Pong(1)), b"\xff" * 8, wire.encode(wire.Ready("", [])), wire.encode(wire.Ping(1))]
        )
    )
    def break_the_protocol(self, said: bytes) -> None:
        self._say(said)
        self._breaks()

    @precondition(lambda self: not self.ended)
    @rule()
    def die(self) -> None:
        self.rig.peer.sock.close()
        self.run(turns(4))
        self._breaks()

    @precondition(lambda self: self.ended)
    @rule()
    def begin_anew(self) -> None:
        self.rig.peer.sock.close()
        self.rig = self.run(self._ready())
        self.over.clear()
        self.ended = False

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        one = self.rig.worker
        assert (one.lifecycle.state is WorkerState.ERROR) == self.ended == bool(self.rig.gone)
        assert len(self.rig.gone) <= 1
        assert set(one.streams) == set(self.open)
        assert set(one.cancelled) == self.cancelled
        assert all(asker.ends == 0 for asker in self.open.values())
        assert all(asker.ends == 1 for asker in self.over)

    def teardown(self) -> None:
        self.rig.worker._end("the run is over")
        self.rig.peer.sock.close()
        self.patch.stop()
        super().teardown()


class WorkerMachine(_Looping):
    """The worker's end: all that is sent arrives whole and in order, however slowly the front reads."""

    def __init__(self) -> None:
        super().__init__()
        ours, theirs = socket_pair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.front, self.worker = ours, theirs
        self.link = link.Link(theirs, self.loop)
        self.heard: list[Any] = []
        self.link.listen(self.heard.append)
        self.sent: list[wire.Message] = []
        self.arrived: list[Any] = []
        self.told: list[wire.Message] = []
        self.decoder: wire.Decoder[Any] = wire.Decoder(wire.FromWorker)

    @rule(size=st.sampled_from([0, 1, 1000, wire.CHUNK]), count=st.integers(1, 5), now=st.booleans())
    def send(self, size: int, count: int, now: bool) -> None:
        for _ in range(count):
            message = wire.Body(len(self.sent), b"x" * size, False)
            self.link.send(message, now=now)
            self.sent.append(message)

    @rule()
    def log(self) -> None:
        message = wire.Log("info", "x" * 100, b"", "", len(self.sent))
        if self.link._waiting <= link._LOG_BACKLOG:  # beyond it, it may be lost
            self.sent.append(message)
        self.link.send_now(message)

    @rule()
    def turn(self) -> None:
        self.run(turns(3))

    @rule(size=st.sampled_from([1, 3, 100, 5000, 1 << 20]))
    def read(self, size: int) -> None:
        try:
            self.arrived += self.decoder.feed(self.front.recv(size))
        except BlockingIOError:
            pass

    @rule(id=st.integers(0, 2**62), cut=st.integers(1, 8))
    def say(self, id: int, cut: int) -> None:
        frame = wire.encode(wire.Ping(id))
        for piece in (frame[:cut], frame[cut:]):
            self.front.send(piece)
            self.run(turns(2))
        self.told.append(wire.Ping(id))
        assert self.heard == self.told

    @invariant()
    def what_has_arrived_was_sent(self) -> None:
        assert self.arrived == self.sent[: len(self.arrived)]

    def teardown(self) -> None:
        while len(self.arrived) < len(self.sent):
            self.run(turns(2))
            self.read(1 << 20)
        assert self.arrived == self.sent
        self.loop.remove_reader(self.worker)
        with mock.patch.object(os, "_exit"):
            self.front.close()
            self.worker.close()
        super().teardown()
