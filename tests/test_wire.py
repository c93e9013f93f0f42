"""Frames as bytes: what decodes, what is refused, and that nothing else can happen."""

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import wire

UP: list[wire.Message] = [
    wire.Hello(wire.VERSION, [("forked", 1), ("confined", 2)]),
    wire.Failed("no"),
    wire.Ready("", [("on_start", 3)]),
    wire.ResponseHead(1, 200, [("a", "b")], b"body", False),
    wire.Body(1, b"\x00\xff" * 100, True),
    wire.Abort(2),
    wire.Window(3, wire.WINDOW),
    wire.Pong(4),
    wire.Log("error", "\x1b[31m\u2028", b"{}", "request", 5),
    wire.HookDone(6, True, "", 7, 8),
    wire.McpServers([wire.McpServer("a", "local"), wire.McpServer("b", "external", "https://b.example/mcp")]),
    wire.McpNotice("a", b"{}"),
]
DOWN: list[wire.Message] = [
    wire.Start("acme", "Acme", b"{}", b"null", b"{}", True, 30.0, ""),
    wire.Request(1, 0, "GET", "/", "", ["id", "1"], [("a", "b")], "id", b"", True),
    wire.Body(1, b"more", False),
    wire.Admitted(),
    wire.Cancel(1),
    wire.Window(1, 1),
    wire.Ping(9),
    wire.Hook(10, "on_enable", b"{}", b"null"),
    wire.Stop("on_stop"),
]
ZYGOTE: list[wire.Message] = [
    wire.Hello(wire.VERSION, []),
    wire.Loaded(b"{}", ["a warning"], ["on_start"], [("import", 1)]),
    wire.LoadFailed("why", "traceback"),
    wire.Log("info", "m", b"", "", 0),
    wire.ChildExited(123, -9),
]
UNIONS: list[tuple[Any, list[wire.Message]]] = [
    (wire.FromWorker, UP),
    (wire.ToWorker, DOWN),
    (wire.FromZygote, ZYGOTE),
    (wire.ToZygote, [wire.Admitted(), wire.Fork(), wire.Fork(True), wire.Fork(proxy=10_000)]),
    (wire.FromNursery, [wire.Hello(wire.VERSION, []), wire.ChildExited(1, 0), wire.Probed({"uid": "no"}, ["/lib"])]),
    (wire.ToNursery, [wire.SpawnZygote(1, b"pickled"), wire.SpawnZygote(1, b"", True), wire.Probe()]),
    (wire.FromKeeper, [wire.Hello(wire.VERSION, []), wire.ScratchMade("a", ""), wire.ChildExited(1, 0)]),
    (wire.ToKeeper, [wire.MakeScratch("a"), wire.MakeScratch("a", 10_000), wire.DropScratch("a")]),
]
MESSAGES = [message for _, messages in UNIONS for message in messages]


def decoder(messages: Any = wire.FromWorker) -> wire.Decoder[Any]:
    return wire.Decoder(messages)


def raw(content: Any) -> bytes:
    """A well-formed frame of any content."""
    body = msgspec.msgpack.encode(content)
    return len(body).to_bytes(4, "big") + body


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(places)]


@pytest.mark.parametrize(("union", "messages"), UNIONS)
def test_every_message_survives_the_way(union: Any, messages: list[wire.Message]) -> None:
    assert list(decoder(union).feed(b"".join(map(wire.encode, messages)))) == messages


def test_messages_have_numbers_of_their_own() -> None:
    numbers = {type(message): msgspec.msgpack.decode(wire.encode(message)[4:])[0] for message in MESSAGES}
    assert len(set(numbers.values())) == len(numbers)


@given(st.lists(st.sampled_from(UP), max_size=8), st.lists(st.integers(0), max_size=12))
def test_however_the_bytes_are_cut_the_messages_are_the_same(messages: list[wire.Message], cuts: list[int]) -> None:
    decode = decoder()
    got = [message for piece in pieces(b"".join(map(wire.encode, messages)), cuts) for message in decode.feed(piece)]
    assert got == messages
    assert decode.pending == 0


def test_byte_by_byte() -> None:
    decode = decoder()
    data = b"".join(map(wire.encode, UP))
    assert [message for at in range(len(data)) for message in decode.feed(data[at : at + 1])] == UP


@given(st.sampled_from(UP), st.integers(1))
def test_a_truncated_frame_is_waited_for(message: wire.Message, cut: int) -> None:
    frame, decode = wire.encode(message), decoder()
    length = cut % len(frame)
    assert list(decode.feed(frame[:length])) == []
    assert decode.pending == length
    assert list(decode.feed(frame[length:])) == [message]


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_garbage_is_a_message_or_a_protocol_error(chunks: list[bytes]) -> None:
    decode, failed = decoder(), False
    for chunk in chunks:
        try:
            for message in decode.feed(chunk):
                assert isinstance(message, wire.Message)
                assert not failed
        except wire.ProtocolError:
            failed = True
        assert decode.pending <= 4 + wire.MAX_FRAME


@given(st.sampled_from(MESSAGES), st.integers(0), st.binary(min_size=1, max_size=4), st.sampled_from(UNIONS))
def test_a_damaged_frame_is_a_message_or_a_protocol_error(
    message: wire.Message, at: int, bytes_there: bytes, union: tuple[Any, list[wire.Message]]
) -> None:
    body = bytearray(wire.encode(message)[4:])
    at %= len(body)
    body[at : at + len(bytes_there)] = bytes_there
    frame = len(body).to_bytes(4, "big") + bytes(body)
    decode = decoder(union[0])
    try:
        (got,) = decode.feed(frame)
    except wire.ProtocolError:
        with pytest.raises(wire.ProtocolError):
            list(decode.feed(b""))
    else:
        assert isinstance(got, union[0])
        assert decode.pending == 0


recursive = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(st.integers(-2, 40), st.lists(recursive, max_size=10))
def test_any_msgpack_is_a_message_of_the_union_or_a_protocol_error(number: int, fields: list[Any]) -> None:
    try:
        (got,) = decoder().feed(raw([number, *fields]))
    except wire.ProtocolError:
        return
    assert isinstance(got, wire.FromWorker)


@pytest.mark.parametrize("length", [wire.MAX_FRAME + 1, (1 << 32) - 1])
def test_a_giant_frame_is_refused_before_it_has_come(length: int) -> None:
    with pytest.raises(wire.ProtocolError, match="exceeds the limit"):
        list(decoder().feed(length.to_bytes(4, "big")))


def test_a_frame_of_the_largest_size_passes_and_one_more_byte_does_not() -> None:
    spare = len(wire.encode(wire.Body(1, b"x" * 70_000, False))) - 4 - 70_000
    largest = wire.encode(wire.Body(1, b"x" * (wire.MAX_FRAME - spare), False))
    assert len(largest) == 4 + wire.MAX_FRAME
    assert len(list(decoder().feed(largest))) == 1
    with pytest.raises(wire.ProtocolError, match="exceeds the limit"):
        wire.encode(wire.Body(1, b"x" * (wire.MAX_FRAME - spare + 1), False))


def test_what_follows_a_bad_frame_is_never_looked_at() -> None:
    decode = decoder()
    feed = decode.feed(wire.encode(wire.Pong(1)) + raw("nonsense") + wire.encode(wire.Pong(2)))
    assert next(feed) == wire.Pong(1)
    with pytest.raises(wire.ProtocolError):
        next(feed)
    for _ in range(2):
        with pytest.raises(wire.ProtocolError, match="failed before"):
            list(decode.feed(wire.encode(wire.Pong(3))))


def test_a_reader_that_stops_in_between_loses_nothing() -> None:
    decode = decoder()
    feed = decode.feed(wire.encode(wire.Pong(1)) + wire.encode(wire.Pong(2)))
    assert next(feed) == wire.Pong(1)
    feed.close()  # type: ignore[attr-defined]  # a generator
    assert list(decode.feed(wire.encode(wire.Pong(3)))) == [wire.Pong(2), wire.Pong(3)]


def test_nothing_is_kept_of_what_was_decoded() -> None:
    decode = decoder()
    for _ in range(100):
        for _ in decode.feed(wire.encode(wire.Body(1, b"x" * wire.CHUNK, False)) * 4):
            pass
        assert decode.pending == 0


@pytest.mark.parametrize(
    "content",
    [
        [],
        [99],
        ["8"],
        [None, 1],
        {},
        None,
        8,
        [8],
        [12],  # Pong without its id
        [12, 1, 2],  # with more than its id
        [12, "1"],
        [12, 1.5],
        [12, True],
        [12, -1],
        [12, 1 << 63],
        [11, 1, 0],
        [11, 1, wire.WINDOW + 1],
        [11, 1, -1],
        [9, 1, "text", False],
        [9, 1, b"", 0],
        [9, 1, [], False],
        [8, 1, 199, [], b"", True],
        [8, 1, 600, [], b"", True],
        [8, 1, 101, [], b"", False],
        [8, 1, 200, [["a", "b"]] * 201, b"", True],
        [8, 1, 200, [["a" * 4097, "b"]], b"", True],
        [8, 1, 200, [["a", "b" * 65537]], b"", True],
        [8, 1, 200, [["a", "b", "c"]], b"", True],
        [8, 1, 200, [["a"]], b"", True],
        [8, 1, 200, [["a", b"b"]], b"", True],
        [8, 1, 200, {"a": "b"}, b"", True],
        [13, "fatal", "m", b"", "", 0],
        [13, "error\n", "m", b"", "", 0],
        [13, "info", "m" * 65537, b"", "", 0],
        [13, "info", "m", b"x" * 65537, "", 0],
        [13, "info", "m", b"", "r" * 4097, 0],
        [13, "info", "m", b"", "", -1],
        [15, ["id"] * 101],
        [15, ["i" * 4097]],
        [7, "", [["phase", 1]] * 33],
        [7, "", [["phase", -1]]],
        [14, 1, None, "", 0, 0],
        [19, 1],  # Ping: the other direction
        [16, "org", "Org", b"{}", b"null", b"{}", True, 1.0, ""],  # Start
        [1, 1, b"spec"],  # SpawnZygote
        [3, True],  # Fork
        [4, b"{}", [], [], [], 1],  # Loaded: a zygote's
    ],
    ids=repr,
)
def test_what_a_worker_may_not_send(content: Any) -> None:
    with pytest.raises(wire.ProtocolError, match="not a valid frame"):
        list(decoder().feed(raw(content)))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",  # never used by msgpack
        wire.encode(wire.Pong(1))[4:] + b"\x00",  # bytes left over
        wire.encode(wire.Pong(1))[4:-1],
        b"\x91" * 100_000,  # nested deeper than any stack
        b"\x92\x0c" * 100_000,
        b"\xdd\xff\xff\xff\xff",  # an array of 4 billion
        b"\x92\x0c\xc6\xff\xff\xff\xff",  # bytes that are not there
        b"\x92\x16\xa2\xff\xff",  # Failed, with a text that is not UTF-8
        b"\x92\x16\xa3\xed\xa0\x80",  # a surrogate
    ],
    ids=lambda body: body[:8].hex(),
)
def test_bytes_that_are_no_message(body: bytes) -> None:
    with pytest.raises(wire.ProtocolError, match="not a valid frame"):
        list(decoder().feed(len(body).to_bytes(4, "big") + body))


@pytest.mark.parametrize(("union", "messages"), UNIONS)
def test_each_direction_takes_its_own_messages_only(union: Any, messages: list[wire.Message]) -> None:
    mine = {type(message) for message in messages}
    for message in MESSAGES:
        if type(message) not in mine:
            with pytest.raises(wire.ProtocolError):
                list(decoder(union).feed(wire.encode(message)))
