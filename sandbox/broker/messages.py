"""What the broker says and hears: frames of ``sandbox.wire`` to the front, single datagrams to workers.

A worker sends one message per datagram on its descriptor. With each ``Dial`` it passes a socket, on which the one
``Answer`` comes back.
"""

from typing import Annotated, Final

import msgspec

from .. import wire
from .names import MAX_NAME

__all__ = [
    "MAX_DATAGRAM",
    "Answer",
    "Attach",
    "Closed",
    "Configure",
    "Connected",
    "Dial",
    "Done",
    "Dropped",
    "FromBroker",
    "FromWorker",
    "Gone",
    "Greeting",
    "Refused",
    "ToBroker",
]

MAX_DATAGRAM: Final = 1024
"""Bytes in one datagram of a worker."""

Host = Annotated[str, msgspec.Meta(max_length=MAX_NAME + 1)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


# ---- front -> broker


class Configure(wire.Message, tag=31):
    """The first frame. ``allow`` are networks that may be reached though they are special; ``nameserver`` is
    ``address:port``, or empty for the system's; a ``uid`` below 0 is kept as it is."""

    allow: list[str]
    nameserver: str
    uid: int
    gid: int


class Attach(wire.Message, tag=32):
    """One descriptor comes along: the broker's end of a worker's. ``id`` is the front's, never used again.

    With ``secret`` there is a second one: a socket to the keeper of the worker's namespaces (``wire.MakeScratch``), on
    which one that listens for the worker's programs waits already. They make themselves known by the secret.
    """

    id: Number
    plugin: str
    org: str
    network: bool | list[str]
    secret: str = ""


# ---- broker -> front


class Connected(wire.Message, tag=33):
    """Worker ``id`` was given a connection to ``address``."""

    id: Number
    host: str
    port: int
    address: str
    ms: float


class Refused(wire.Message, tag=34):
    """Worker ``id`` was refused a connection, or it failed; ``policy`` tells which. ``host`` is the worker's text."""

    id: Number
    host: str
    port: int
    reason: str
    policy: bool


class Closed(wire.Message, tag=35):
    """Worker ``id`` says that it closed a connection, and how many bytes went through it; or, with ``counted``, the
    broker has counted what one of its programs sent and received."""

    id: Number
    host: str
    port: int
    sent: Number
    received: Number
    counted: bool = False


class Gone(wire.Message, tag=36):
    """Worker ``id`` has closed its descriptor, or was cut off for ``reason``."""

    id: Number
    reason: str


class Dropped(wire.Message, tag=37):
    """``count`` frames were left out, as the front did not read."""

    count: int


# ---- worker -> broker


class Dial(wire.Message, tag=1):
    """Connect. One descriptor comes along: a Unix stream socket for the answer."""

    host: Host
    port: Port


class Done(wire.Message, tag=2):
    """Connection ``number`` is closed."""

    number: Number
    sent: Number
    received: Number


# ---- broker -> worker


class Greeting(wire.Message, tag=3):
    """The only datagram that a worker gets: what it may connect to, so that it can say no by itself."""

    network: bool | list[str]


class Answer(wire.Message, tag=4):
    """The connected descriptor comes along, unless ``error`` is an errno, or, below 0, an error of getaddrinfo."""

    error: int
    text: str
    number: Number


ToBroker = Configure | Attach
FromBroker = wire.Hello | Connected | Refused | Closed | Gone | Dropped
FromWorker = Dial | Done
