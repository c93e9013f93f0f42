"""Protocol: a worker that speaks to the host itself. Frames are built by hand, so that they can be wrong."""

import array
import asyncio
import os
import pickle
import socket
import struct
from typing import Any

from .harness import Victims, attack
from .network import find_link

_HEAD, _BODY, _WINDOW, _PONG, _LOG, _HOOK_DONE, _READY, _LOADED, _CHILD_EXITED, _STATE = (
    8,
    9,
    11,
    12,
    13,
    14,
    7,
    4,
    2,
    24,
)


def _pack(value: Any) -> bytes:
    """msgpack, as much of it as is needed."""
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return b"\xd3" + struct.pack(">q", value)
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, str):
        return b"\xdb" + struct.pack(">I", len(value.encode())) + value.encode()
    return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(_pack, value))


def _frame(*fields: Any) -> bytes:
    body = _pack(list(fields))
    return struct.pack(">I", len(body)) + body


def _forged(v: Victims, stream: int) -> bytes:
    return _frame(_HEAD, stream, 200, [["x-forged", v.token]], f"forged {v.token}".encode(), True)


async def _say(data: bytes) -> str:
    link = find_link()
    os.set_blocking(link, False)
    loop = asyncio.get_running_loop()
    view = memoryview(data)
    for _ in range(2_000):
        try:
            view = view[os.write(link, view) :]
        except BlockingIOError:
            await asyncio.sleep(0.002)
        if not view:
            break
    assert loop
    await asyncio.sleep(0.2)
    return "said it"


def _add(name: str, about: str, make: Any, harm: str = "forged") -> None:
    async def run(v: Victims) -> str:
        return await _say(make(v))

    run.__name__ = f"frames_{name}"
    attack(about, harm=harm, host=True, ends=True)(run)


_add("garbage", "Sends bytes that are no frames", lambda v: b"\xff" * 1000)
_add("truncated", "Sends half a frame and then other frames", lambda v: _forged(v, 1)[:10] + _forged(v, 1))
_add("giant", "Announces a frame of 4 GiB", lambda v: b"\xff\xff\xff\xff" + bytes(1 << 20))
_add("large", "Sends a frame just above the cap", lambda v: _frame(_BODY, 1, bytes(1 << 20), False))
_add("deep", "Sends arrays within arrays, 100,000 deep", lambda v: struct.pack(">I", 100_000) + b"\x91" * 100_000)
_add("long-array", "Announces an array of 4 billion items", lambda v: struct.pack(">I", 5) + b"\xdd\xff\xff\xff\xff")
_add(
    "long-text", "Announces a text longer than its frame", lambda v: struct.pack(">I", 6) + b"\x91\xdb\xff\xff\xff\xff"
)
_add("unknown", "Sends a frame of an unknown kind", lambda v: _frame(250, 1, 2, 3))
_add("wrong-types", "Sends a frame with fields of wrong types", lambda v: _frame(_HEAD, "1", "200", 5, "x", 1))
_add("zygote", "Speaks as a zygote that has loaded another plugin", lambda v: _frame(_LOADED, b"{}", [], [], [], 1))
_add("nursery", "Speaks as the nursery: the host's children are gone", lambda v: _frame(_CHILD_EXITED, v.host_pid, 0))
_add("ready-again", "Is ready a second time", lambda v: _frame(_READY, "", []))
_add(
    "other-streams", "Answers requests that it was not given", lambda v: b"".join(_forged(v, n) for n in range(50, 90))
)
_add("answers-twice", "Answers its request twice", lambda v: b"".join(_forged(v, n) for n in (1, 1, 1)), harm="")
_add("window", "Grants more room than there is", lambda v: _frame(_WINDOW, 1, 1 << 40))
_add("hook", "Says that a hook ended that was never begun", lambda v: _frame(_HOOK_DONE, 77, True, "", 0, 0))
_add("pong", "Answers pings that were never sent", lambda v: b"".join(_frame(_PONG, n) for n in range(1000)))
_add("state", "Sends state that nobody asked for, pickled", lambda v: _frame(_STATE, pickle.dumps(_Bomb(v)), True))
_add("flood", "Sends 50 MB of frames", lambda v: _frame(_BODY, 1, bytes(60_000), False) * 800)
_add(
    "log-forged",
    "Sends a record of the log with another org's name in it",
    lambda v: _frame(_LOG, "error", f'"}}\n{{"event":"forged {v.token}"}}', b'{"org":"other","plugin":"other"}', "", 0),
    harm="forged-log",
)
_add("negative", "Sends numbers below zero", lambda v: _frame(_HEAD, -1, -200, [], b"", True))
_add(
    "pickle",
    "Sends a pickle in place of a frame",
    lambda v: struct.pack(">I", len(pickle.dumps(_Bomb(v)))) + pickle.dumps(_Bomb(v)),
    harm="file",
)


class _Bomb:
    """Whoever unpickles this makes a file."""

    def __init__(self, v: Victims) -> None:
        self.path = f"{v.directory}/unpickled"

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@attack("Passes 250 descriptors to the host with its frames", harm="front-descriptors", host=True, ends=True)
async def descriptors_passed(v: Victims) -> str:
    sock = socket.socket(fileno=os.dup(find_link()))
    nothing, _writing = os.pipe()
    for number in range(10):
        frame = _frame(_LOG, "info", f"passing {number}", b"", "", 0)
        try:
            sock.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [nothing] * 250))])
        except BlockingIOError:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    return "sent 2,500"


@attack("Stops sending on its socket to the host but goes on", harm="forged", host=True, ends=True)
async def half_close(v: Victims) -> str:
    socket.socket(fileno=os.dup(find_link())).shutdown(socket.SHUT_WR)
    await asyncio.sleep(0.5)
    return "closed"


@attack("Reads nothing more from the host but stays", harm="forged", host=True, ends=True)
async def deaf(v: Victims) -> str:
    loop: Any = asyncio.get_running_loop()
    link = find_link()
    reader = loop._selector.get_key(link).data[0]
    loop.remove_reader(link)
    assert reader
    loop.call_later(3, os._exit, 0)  # it shall not outlive the test by much
    await asyncio.sleep(0.5)
    return "deaf"


@attack("Sends a frame byte by byte", harm="forged", host=True, ends=True)
async def frames_slow(v: Victims) -> str:
    link = find_link()
    for byte in _forged(v, 99):
        os.write(link, bytes([byte]))
        await asyncio.sleep(0.001)
    return "sent"


@attack("Claims to be another process with the credentials it sends", harm="forged", host=True, root=False)
async def credentials_forged(v: Victims) -> str:
    sock = socket.socket(fileno=os.dup(find_link()))
    claim = struct.pack("iii", v.peer_pid, os.getuid(), os.getgid())
    sock.sendmsg([_frame(_LOG, "info", "forging", b"", "", 0)], [(socket.SOL_SOCKET, 2, claim)])
    return "sent"
