"""Frames between the front and its children: what they say and how they look as bytes. No I/O here.

A frame is a 4-byte big-endian length and that many bytes of msgpack: an array that begins with the message's number.
Decoding trusts nothing: a frame above the cap, of an unknown number, with a field of the wrong type or with bytes left
over raises ``ProtocolError``, after which the connection is of no further use. What a message *means* where it arrives
(an unknown stream, a window overrun) is for the receiver to judge.
"""

from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Final, Generic, Literal, TypeVar

import msgspec

__all__ = [
    "CHUNK",
    "MAX_FRAME",
    "MAX_MCP_SERVERS",
    "MAX_SPAN_ATTRIBUTES",
    "MAX_SPAN_EVENTS",
    "MAX_STATE",
    "VERSION",
    "WINDOW",
    "Abort",
    "Body",
    "Cancel",
    "ChildExited",
    "Decoder",
    "DumpState",
    "Failed",
    "Fork",
    "FromNursery",
    "FromWorker",
    "FromZygote",
    "Hello",
    "Hook",
    "HookDone",
    "LoadFailed",
    "Loaded",
    "Log",
    "McpNotice",
    "McpServer",
    "McpServers",
    "Message",
    "Ping",
    "Pong",
    "ProtocolError",
    "Ready",
    "Request",
    "ResponseHead",
    "Span",
    "SpanEvent",
    "Spans",
    "SpawnZygote",
    "Stamp",
    "Start",
    "State",
    "Stop",
    "ToNursery",
    "ToWorker",
    "ToZygote",
    "Window",
    "encode",
]

VERSION: Final = 1
"""Of this format. Front and children of one installation always agree; a mismatch means a half-done upgrade."""

MAX_FRAME: Final = 1 << 20
"""Bytes in one frame. The largest honest one is a plugin's metadata; everything long travels in chunks."""

CHUNK: Final = 64 << 10
"""Bytes of body in one frame: large enough to amortise it, small enough that streams of one worker interleave."""

WINDOW: Final = 256 << 10
"""Bytes of body that may be under way on one stream, each way, before the receiver grants more."""

_LENGTH: Final = 4

Text = Annotated[str, msgspec.Meta(max_length=64 << 10)]
ShortText = Annotated[str, msgspec.Meta(max_length=4 << 10)]
StreamId = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
HeaderList = Annotated[list[tuple[ShortText, Text]], msgspec.Meta(max_length=200)]
Stamp = tuple[ShortText, Nanoseconds]
"""A phase's name and the CLOCK_MONOTONIC time at which it ended; the clock is one for all processes of a machine."""
Stamps = Annotated[list[Stamp], msgspec.Meta(max_length=32)]


class ProtocolError(Exception):
    """The peer sent bytes that are not a frame it may send."""


class Message(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of all messages."""


# ---- front -> nursery, nursery -> front


class SpawnZygote(Message, tag=1):
    """Start a plugin zygote. ``spec`` is a dill-pickled ``sandbox.spec.PluginSpec``; three descriptors come along: the
    zygote's control socket, the pipe for its raw stdout and stderr, and the socket of the keeper of its namespaces.

    With ``execute`` it is a program of its own, with addresses and hashes of its own, and not a fork of the nursery.
    """

    id: StreamId
    spec: bytes
    execute: bool = False


class Probe(Message, tag=24):
    """Find out which layers of confinement this machine gives."""


class Probed(Message, tag=25):
    """By layer, why it cannot be had, empty if it can; and what must be readable for the interpreter to work."""

    problems: dict[str, str]
    interpreter: list[str]


class ChildExited(Message, tag=2):
    """A child of the sender is gone. ``status`` is an exit code, or minus a signal number."""

    pid: int
    status: int


# ---- zygote <-> front


class Fork(Message, tag=3):
    """Fork a worker with the scratch folder ``scratch``; its socket and the pipe for its raw stdout and stderr come
    along and, with ``network``, its socket to the broker. With ``become`` the zygote itself turns into the worker: that
    is how each worker of a plugin that must not be forked gets a process of its own. ``proxy`` is the port of its
    programs' proxy, or 0."""

    become: bool = False
    scratch: str = ""
    network: bool = False
    proxy: int = 0


class Loaded(Message, tag=4):
    """The plugin is imported and initialised. ``metadata`` is untrusted JSON, for the front to validate."""

    metadata: bytes
    warnings: Annotated[list[Text], msgspec.Meta(max_length=1_000)]
    hooks: Annotated[list[ShortText], msgspec.Meta(max_length=16)]
    stamps: Stamps


class LoadFailed(Message, tag=5):
    """The plugin did not load. ``error`` is for its author; ``traceback`` has the author's frames."""

    error: Text
    traceback: Text


# ---- front <-> keeper


class MakeScratch(Message, tag=26):
    """Make the scratch folder ``name``; ``ScratchMade`` is the answer.

    With ``port`` a Unix stream socket comes along, whose other end is for the broker. On it one byte is sent with a
    socket that listens on that port of the namespaces' 127.0.0.1; then, for each byte that comes, one with two TCP
    sockets of that network which are connected to each other.
    """

    name: str
    port: int = 0


class DropScratch(Message, tag=27):
    """The process that had the scratch folder ``name`` is gone."""

    name: str


class ScratchMade(Message, tag=28):
    """There is a scratch folder ``name``, unless ``error`` says why there is none."""

    name: ShortText
    error: Text


# ---- worker -> front


class Hello(Message, tag=6):
    """The first frame of every child. The kernel attaches the sender's credentials."""

    version: int
    stamps: Stamps


class Failed(Message, tag=22):
    """There is no worker at the other end of this socket; ``error`` says why."""

    error: Text


class Ready(Message, tag=7):
    """``on_start`` has run; ``error`` says why the worker is degraded, empty if it is not."""

    error: Text
    stamps: Stamps


class ResponseHead(Message, tag=8):
    """Begin (and, with ``end``, finish) the answer on stream ``id``."""

    id: StreamId
    status: Annotated[int, msgspec.Meta(ge=200, le=599)]
    headers: HeaderList
    body: bytes
    end: bool


class Body(Message, tag=9):
    """More of a body, either way."""

    id: StreamId
    data: bytes
    end: bool


class Abort(Message, tag=10):
    """The answer on stream ``id`` cannot be finished (or, before its head, be begun)."""

    id: StreamId


class Window(Message, tag=11):
    """The receiver of stream ``id`` has room for ``size`` more bytes."""

    id: StreamId
    size: Annotated[int, msgspec.Meta(ge=1, le=WINDOW)]


class Pong(Message, tag=12):
    """The answer to a ping."""

    id: StreamId


class Log(Message, tag=13):
    """A record of the plugin's log. ``meta`` is a JSON object or empty; ``dropped`` counts records lost before it."""

    level: Literal["debug", "info", "warning", "error"]
    message: Text
    meta: Annotated[bytes, msgspec.Meta(max_length=64 << 10)]
    request: ShortText
    dropped: Annotated[int, msgspec.Meta(ge=0)]


class HookDone(Message, tag=14):
    """A hook ended. ``value`` is what ``on_validate_auth`` said and true for the others; ``error`` is empty if it
    returned."""

    id: StreamId
    value: bool
    error: Text
    started: Nanoseconds
    ended: Nanoseconds


class McpServer(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """One MCP server of a worker. ``info`` is untrusted JSON, empty until it is known: an object with
    ``protocolVersions``, ``capabilities``, ``serverInfo`` and perhaps ``instructions``. ``changes`` grows whenever one
    of its lists is another."""

    id: Annotated[str, msgspec.Meta(max_length=128)]
    kind: Literal["local", "stdio", "external"]
    url: Annotated[str, msgspec.Meta(max_length=1_000)] = ""
    state: Literal["starting", "running", "restarting", "failed"] = "running"
    error: Annotated[str, msgspec.Meta(max_length=500)] = ""
    info: Annotated[bytes, msgspec.Meta(max_length=16 << 10)] = b""
    changes: StreamId = 0


MAX_SPAN_ATTRIBUTES: Final = 32
MAX_SPAN_EVENTS: Final = 16
_SpanName = Annotated[str, msgspec.Meta(max_length=200)]
_SpanText = Annotated[str, msgspec.Meta(max_length=1_000)]
_Attribute = tuple[_SpanName, _SpanText | bool | Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | float]
_Attributes = Annotated[list[_Attribute], msgspec.Meta(max_length=MAX_SPAN_ATTRIBUTES)]
_SpanId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]


class SpanEvent(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """Something that happened in a span. Times of spans are in nanoseconds since 1970."""

    name: _SpanName
    at: Nanoseconds
    attributes: _Attributes = []


class Span(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """A span that has ended. ``kind`` is that of OpenTelemetry's API, from 0 for internal."""

    trace_id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    span_id: _SpanId
    parent_id: _SpanId
    name: _SpanName
    kind: Annotated[int, msgspec.Meta(ge=0, le=4)]
    started: Nanoseconds
    ended: Nanoseconds
    failed: bool
    error: _SpanText = ""
    attributes: _Attributes = []
    events: Annotated[list[SpanEvent], msgspec.Meta(max_length=MAX_SPAN_EVENTS)] = []


class Spans(Message, tag=60):
    """Spans of requests that the worker was given; of others, they are dropped."""

    spans: Annotated[list[Span], msgspec.Meta(max_length=64)]


MAX_MCP_SERVERS: Final = 32
"""In one worker: all of them fit into one frame."""


class McpServers(Message, tag=15):
    """The MCP servers that there are now."""

    servers: Annotated[list[McpServer], msgspec.Meta(max_length=MAX_MCP_SERVERS)]


class McpNotice(Message, tag=30):
    """What an MCP server says to its clients apart from any request: a JSON-RPC notification, as untrusted JSON."""

    server: Annotated[str, msgspec.Meta(max_length=128)]
    notification: Annotated[bytes, msgspec.Meta(max_length=64 << 10)]


# ---- front -> worker


class Admitted(Message, tag=29):
    """The front has looked at the worker, or put the zygote into its cgroup, and takes it. Until then a worker opens
    nothing that was not there to be seen, and a zygote imports nothing."""


class Start(Message, tag=16):
    """The worker's identity. ``config``, ``auth`` and ``env`` are JSON objects; ``auth`` may be ``null``.

    With ``serve`` false the worker is a throwaway: it runs the hooks it is told to, without ``on_start``. ``proxy`` is
    the URL of its programs' proxy with the credentials for it; empty if there is none.
    """

    org_id: str
    org_name: str
    config: bytes
    auth: bytes
    env: bytes
    serve: bool
    hook_timeout: float
    degraded: str
    proxy: str = ""


class Request(Message, tag=17):
    """Begin (and, with ``end``, complete) a request. ``route`` is an index into the registered routes, or negative
    for the runtime's own: see ``LIST_TOOLS``, ``CALL_TOOL`` and ``MCP``."""

    id: StreamId
    route: int
    method: str
    path: str
    query: str
    params: list[str]
    headers: list[tuple[str, str]]
    request_id: str
    body: bytes
    end: bool


LIST_TOOLS: Final = -1
"""A request for the tools of all MCP servers. Its body is empty or, in JSON, ``[prefix, allow, deny]``: those tools are
listed whose name, with ``prefix`` before it, matches the first regular expression and not the second."""
CALL_TOOL: Final = -2
MCP: Final = -3
"""A request to one MCP server. Its body is the JSON object ``{"server": id, "method", "params", "progressToken"?}``.
The answer is streamed, a JSON object per line: notifications and requests of the server, the latter with an ``id``, and
at the end one ``{"result": {...}}`` or ``{"error": {"code", "message", "data"?}}``. A server's request is answered by
another request of this kind, ``{"server": id, "reply": id, "result" or "error"}``."""


class Cancel(Message, tag=18):
    """Nobody waits for the answer on stream ``id`` any more."""

    id: StreamId


class Ping(Message, tag=19):
    """Answer with a ``Pong`` of the same id."""

    id: StreamId


class Hook(Message, tag=20):
    """Run a hook. ``config`` (a JSON object or null) replaces the org's, for this call and all that follow."""

    id: StreamId
    name: str
    config: bytes
    auth: bytes


class Stop(Message, tag=21):
    """Run ``hook`` (``on_stop``, ``on_disable``, or empty for none), stop the MCP servers and exit."""

    hook: str


class DumpState(Message, tag=23):
    """Send your ``state``."""


class State(Message, tag=24):
    """A piece of a worker's state, pickled and unpickled in workers only; empty if there is none."""

    data: bytes
    end: bool


MAX_STATE: Final = 16 << 20
"""Bytes of pickled state that move from a worker to the next. It is memory of the front's while it moves."""

ToNursery = SpawnZygote | Probe
FromNursery = Hello | ChildExited | Probed
ToKeeper = MakeScratch | DropScratch
FromKeeper = Hello | ScratchMade | ChildExited
ToZygote = Fork | Admitted
FromZygote = Hello | Loaded | LoadFailed | Log | ChildExited
FromWorker = (
    Hello
    | Failed
    | Ready
    | ResponseHead
    | Body
    | Abort
    | Window
    | Pong
    | Log
    | HookDone
    | McpServers
    | McpNotice
    | State
    | Spans
)
ToWorker = Admitted | Start | Request | Body | Cancel | Window | Ping | Hook | Stop | DumpState | State

M = TypeVar("M", bound=Message)

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """The frame of ``message``. Raises ``ProtocolError`` if it exceeds ``MAX_FRAME``."""
    frame = bytearray(_LENGTH)
    _encoder.encode_into(message, frame, _LENGTH)
    size = len(frame) - _LENGTH
    if size > MAX_FRAME:
        raise ProtocolError(f"a {type(message).__name__} frame of {size} bytes exceeds the limit of {MAX_FRAME}")
    frame[:_LENGTH] = size.to_bytes(_LENGTH, "big")
    return bytes(frame)


@cache
def _decoder(messages: Any) -> "msgspec.msgpack.Decoder[Any]":
    """One for each union: a forked process uses the one that is there, and writes no pages to make its own."""
    return msgspec.msgpack.Decoder(messages)


class Decoder(Generic[M]):
    """Turns bytes into messages of the given union. Holds at most one incomplete frame."""

    def __init__(self, messages: Any) -> None:
        self._decode = _decoder(messages).decode
        self._buffer = bytearray()
        self._failed = False

    def feed(self, data: bytes) -> Iterator[M]:
        """Yield the messages that ``data`` completes. Raises ``ProtocolError``, and again on every later call."""
        if self._failed:
            raise ProtocolError("the connection failed before")
        rest = self._buffer
        buffer: bytes | bytearray = data  # mostly whole frames, which are decoded where they are
        if rest:
            rest += data
            buffer = rest
        start, have = 0, len(buffer)
        view = memoryview(buffer)
        try:
            while have - start >= _LENGTH:
                body = start + _LENGTH
                size = int.from_bytes(buffer[start:body], "big")
                if size > MAX_FRAME:
                    raise ProtocolError(f"a frame of {size} bytes exceeds the limit of {MAX_FRAME}")
                if have - body < size:
                    break
                start = body + size
                try:
                    message = self._decode(view[body:start])
                except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                    raise ProtocolError(f"not a valid frame: {error}") from None
                yield message
        except ProtocolError:
            self._failed = True
            raise
        finally:
            view.release()
            if buffer is rest:
                del rest[:start]
            else:
                rest += data[start:]

    @property
    def pending(self) -> int:
        """Bytes held of an incomplete frame."""
        return len(self._buffer)
