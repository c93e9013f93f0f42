"""The host's log: one line per event whatever is in it, and a plugin's share of it bounded."""

import asyncio
import io
import json
import logging
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hayhost.logs import PluginLog, configure, escape, get_logger
from hayhost.logs import plugin as plugin_log

from .conftest import wait_until

HOSTILE = "a\nb\r\x1b[31mred\x9b31m\x00\x07\x85\u2028\u2029\u202e\u2066\u200f\ufeff\x0b\x0c\x1c end"
HARMLESS = "a\tb ä 漢 😀 \\n ' \""

Configure = Callable[..., io.StringIO]


@pytest.fixture
def log() -> Iterator[Configure]:
    """``log(format, level)``: the stream that the host's log goes to from then on, until the test ends."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def begin(format: str = "json", level: str = "debug", terminal: bool = False) -> io.StringIO:
        stream = io.StringIO()
        stream.isatty = lambda: terminal  # type: ignore[method-assign]
        configure(format, level, stream)
        return stream

    yield begin
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The clock that rates go by; ``now`` is set by the test."""
    clock = types.SimpleNamespace(now=100.0)
    fake = types.SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(plugin_log, "time", fake)
    return clock


def records(stream: io.StringIO) -> list[dict[str, Any]]:
    """The lines as records; every one must be nothing but one line of JSON, in the eyes of whoever splits lines."""
    text = stream.getvalue()
    assert text.endswith("\n")
    assert len(text.splitlines()) == text.count("\n")
    assert escape(text.replace("\n", "")) == text.replace("\n", "")
    return [json.loads(line) for line in text.splitlines()]


def one(stream: io.StringIO) -> dict[str, Any]:
    """The only record, without its time."""
    [record] = records(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    return record


# ---- escaping


def test_what_is_for_reading_stays_as_it_is() -> None:
    assert escape(HARMLESS) == HARMLESS


def test_what_moves_colours_or_turns_text_is_spelt_out() -> None:
    assert escape(HOSTILE) == (
        r"a\nb\r\x1b[31mred\x9b31m\x00\x07\x85\u2028\u2029\u202e\u2066\u200f\ufeff\x0b\x0c\x1c end"
    )


@settings(deadline=None)
@given(st.text())
def test_escaped_text_is_one_line_and_is_escaped_for_good(text: str) -> None:
    escaped = escape(text)
    assert len(escaped.splitlines()) <= 1
    assert escape(escaped) == escaped


# ---- JSON


def test_a_record(log: Configure) -> None:
    stream = log()
    get_logger().info("listening", url="http://127.0.0.1:1", port=1, more={"a": [None, True]})
    assert stream.getvalue().startswith('{"time":"2')
    assert one(stream) == {
        "level": "info",
        "event": "listening",
        "url": "http://127.0.0.1:1",
        "port": 1,
        "more": {"a": [None, True]},
    }


def test_hostile_text_is_one_line_and_read_back_as_it_was(log: Configure) -> None:
    stream = log()
    get_logger().error(HOSTILE, plugin=HOSTILE, meta={HOSTILE: [HOSTILE]}, harmless=HARMLESS)
    record = one(stream)
    assert (record["event"], record["plugin"], record["harmless"]) == (HOSTILE, HOSTILE, HARMLESS)
    assert record["meta"] == {HOSTILE: [HOSTILE]}


def test_what_is_no_json_is_shown_as_text(log: Configure) -> None:
    stream = log()
    get_logger().info("x", path=re.compile("a"), folder="p\udcff", big=10**40)
    record = one(stream)
    assert (record["path"], record["folder"], record["big"]) == ("re.compile('a')", "p\udcff", 10**40)


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_levels(log: Configure, level: str, shown: list[str]) -> None:
    stream = log("json", level)
    for name in ("debug", "info", "warning", "error"):
        getattr(get_logger(), name)("own")
        getattr(logging.getLogger("library"), name)("theirs")
    got = [(record["level"], record["event"]) for record in records(stream)]
    assert got == [(name, event) for name in shown for event in ("own", "theirs")]


def test_records_of_libraries(log: Configure) -> None:
    stream = log()
    logging.getLogger("asyncio").error("%s\nbroke", "it", exc_info=ValueError("why"))
    record = one(stream)
    assert (record["level"], record["event"], record["logger"]) == ("error", "it\nbroke", "asyncio")
    assert record["traceback"].endswith("ValueError: why")


def test_odd_levels_and_broken_records_of_libraries(log: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    stream = log()
    for level in (1, 25, 50):
        logging.getLogger("library").log(level, "level")
    logging.getLogger("library").error("%d", "no number")
    logging.getLogger("library").error("after")
    assert [(r["level"], r["event"]) for r in records(stream)] == [
        ("info", "level"),
        ("error", "level"),
        ("error", "after"),
    ]


def test_malformed_requests_are_nothing_to_tell(log: Configure) -> None:
    stream = log()
    logging.getLogger("tornado.general").info("Malformed HTTP message")
    logging.getLogger("tornado.general").warning("Connect error")
    assert one(stream)["event"] == "Connect error"


def test_an_exception_of_the_hosts_own(log: Configure) -> None:
    stream = log()
    try:
        raise KeyError("bug")
    except KeyError:
        get_logger().exception("an internal error", path="/x")
    record = one(stream)
    assert record.pop("traceback").splitlines()[-1] == "KeyError: 'bug'"
    assert record == {"level": "error", "event": "an internal error", "path": "/x"}


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("closed file")]
)
def test_a_stream_that_fails_fails_nobody(log: Configure, error: Exception) -> None:
    stream = log()

    def fail(_text: str) -> int:
        raise error

    stream.write = fail  # type: ignore[method-assign]
    get_logger().info("lost")
    del stream.write
    get_logger().info("kept")
    assert one(stream)["event"] == "kept"


# ---- console


def test_for_people(log: Configure) -> None:
    stream = log("console")
    get_logger().warning("odd", plugin="crm", org="acme", port=1, meta={"a": 1})
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning crm/acme odd port=1 meta=\{'a': 1\}\n", stream.getvalue())


def test_hostile_text_for_people(log: Configure) -> None:
    stream = log("console")
    get_logger().error(HOSTILE, plugin=HOSTILE, org=HOSTILE, reason=HOSTILE, meta={HOSTILE: HOSTILE})
    get_logger().error("x", traceback="Traceback:\n  File\x1b[2J\n12:00:00 error forged")
    text = stream.getvalue()
    assert escape(text.replace("\n", "")) == text.replace("\n", "")
    first, *more = text.splitlines()
    assert first.count(escape(HOSTILE)) == 6
    assert [line[9:] for line in more[:1]] == ["error   x"]
    assert more[1:] == ["    | Traceback:", r"    |   File\x1b[2J", "    | 12:00:00 error forged"]


@pytest.mark.parametrize(
    ("format", "terminal", "console"),
    [("auto", True, True), ("auto", False, False), ("json", True, False), ("console", False, True)],
)
def test_the_form_follows_the_terminal(log: Configure, format: str, terminal: bool, console: bool) -> None:
    stream = log(format, terminal=terminal)
    get_logger().info("x", plugin="p")
    assert stream.getvalue().startswith("{") is not console
    assert ("\x1b[36mp\x1b[0m" in stream.getvalue()) is (console and terminal)


# ---- a plugin's share


def test_every_line_of_a_plugin_says_where_it_is_from(log: Configure) -> None:
    stream = log()
    plugin = PluginLog(plugin="crm", version="1.2")
    plugin.record("debug", "loading")
    plugin.bind(org="acme", worker=7)
    plugin.record("warning", "odd", b'{"n": 1}', "request-1")
    first, second = records(stream)
    del first["time"], second["time"]
    where = {"plugin": "crm", "version": "1.2", "source": "plugin"}
    assert first == {"level": "debug", "event": "loading", **where}
    more = {"org": "acme", "worker": 7, "request": "request-1", "meta": {"n": 1}}
    assert second == {"level": "warning", "event": "odd", **where, **more}


def test_a_burst_is_let_through_and_what_is_over_it_is_counted(log: Configure, clock: types.SimpleNamespace) -> None:
    stream = log()
    plugin = PluginLog(plugin="loud")
    for number in range(1_500):
        plugin.record("info", str(number))
    got = records(stream)
    assert [record["event"] for record in got] == [str(number) for number in range(1_000)]
    assert not [record for record in got if "dropped" in record]
    clock.now += 0.5  # room for 100 more
    for number in range(1_500, 2_000):
        plugin.record("info", str(number))
    later = records(stream)[1_000:]
    assert [record["event"] for record in later] == [str(number) for number in range(1_500, 1_600)]
    assert [record["dropped"] for record in later if "dropped" in record] == [later[0]["dropped"]] == [500]
    clock.now += 1_000  # but never more than a burst, however long it was silent
    for number in range(1_100):
        plugin.record("info", str(number))
    last = records(stream)[1_100:]
    assert len(last) == 1_000
    assert last[0]["dropped"] == 400


def test_lines_that_the_sender_dropped_are_counted_in(log: Configure, clock: types.SimpleNamespace) -> None:
    stream = log()
    plugin = PluginLog(plugin="loud")
    plugin.record("info", "a", dropped=7)
    for _ in range(1_001):
        plugin.record("info", "b", dropped=1)
    clock.now += 1
    plugin.record("info", "c", dropped=2)
    got = records(stream)
    assert got[0]["dropped"] == 7
    assert sum(record.get("dropped", 0) for record in got) == 7 + 1_001 + 2 + 2  # two were dropped here
    assert got[-1]["event"] == "c"


def test_one_plugin_has_no_part_in_anothers_rate(log: Configure, clock: types.SimpleNamespace) -> None:
    stream = log()
    loud, quiet = PluginLog(plugin="loud"), PluginLog(plugin="quiet")
    for _ in range(1_200):
        loud.record("info", "x")
    quiet.record("info", "heard")
    assert records(stream)[-1]["plugin"] == "quiet"
    assert clock.now == 100.0


def test_lines_are_cut(log: Configure) -> None:
    stream = log()
    PluginLog(plugin="p").record("info", "x" * 100_000, request="r" * 1_000)
    record = one(stream)
    assert (len(record["event"]), len(record["request"])) == (8 << 10, 64)


@pytest.mark.parametrize(
    "meta",
    [b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b'{"a": NaN}', b"{} {}", b'{"a":' + b"[" * 50_000, b"\x00"],
)
def test_malformed_meta(log: Configure, meta: bytes) -> None:
    stream = log()
    PluginLog(plugin="p").record("info", "x", meta)
    assert one(stream)["meta"] == {"meta": "malformed"}


def test_meta_can_say_nothing_in_the_hosts_name(log: Configure) -> None:
    stream = log()
    forged = {"level": "error", "event": "forged", "time": "then", "plugin": "other", "org": "b", "source": "host"}
    PluginLog(plugin="p", org="a").record("info", "x", json.dumps(forged).encode())
    assert one(stream) == {"level": "info", "event": "x", "plugin": "p", "org": "a", "source": "plugin", "meta": forged}


def test_a_traceback_in_meta(log: Configure) -> None:
    stream = log()
    plugin = PluginLog(plugin="p")
    plugin.record("error", "x", b'{"traceback": "Traceback\\n  File", "n": 1}')
    plugin.record("error", "x", b'{"traceback": "Traceback"}')
    plugin.record("error", "x", b'{"traceback": 3}')
    first, second, third = records(stream)
    assert (first["traceback"], first["meta"]) == ("Traceback\n  File", {"n": 1})
    assert (second["traceback"], "meta" in second) == ("Traceback", False)
    assert ("traceback" in third, third["meta"]) == (False, {"traceback": 3})


def test_numbers_in_meta_that_no_machine_word_holds(log: Configure) -> None:
    stream = log()
    PluginLog(plugin="p").record("info", "x", b'{"n": 1' + b"0" * 40 + b', "f": 1e308}')
    assert one(stream)["meta"] == {"n": 10**40, "f": 1e308}


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(message=st.text(), meta=st.binary() | _json.map(lambda value: json.dumps(value).encode()), format=st.booleans())
def test_whatever_a_plugin_sends_is_one_line_of_its_own(
    log: Configure, message: str, meta: bytes, format: bool
) -> None:
    stream = log("json" if format else "console")
    PluginLog(plugin="p", org="a").record("warning", message, meta)
    text = stream.getvalue()
    assert escape(text.replace("\n", "")) == text.replace("\n", "")
    if format:
        record = one(stream)
        assert (record["level"], record["plugin"], record["org"]) == ("warning", "p", "a")
        assert record["source"] == "plugin"
    else:
        first, *others = text.splitlines()
        assert first[9:].startswith("warning p/a ")
        assert all(line.startswith("    | ") for line in others)


def test_the_plugins_of_an_org_share_its_rate(log: Configure, clock: types.SimpleNamespace) -> None:
    stream = log()
    one, two, other = (
        PluginLog(plugin="one", org="a"),
        PluginLog(plugin="two", org="a"),
        PluginLog(plugin="one", org="b"),
    )
    for _ in range(800):
        one.record("info", "x")
        two.record("info", "x")
    other.record("info", "x")
    got = [(record["plugin"], record["org"]) for record in records(stream)]
    assert (got.count(("one", "a")) + got.count(("two", "a")), got.count(("one", "b"))) == (1_000, 1)


def test_large_records_are_rated_by_their_size(log: Configure, clock: types.SimpleNamespace) -> None:
    stream = log()
    plugin = PluginLog(plugin="large", org="a")
    meta = json.dumps({"x": "y" * 60_000}).encode()
    for _ in range(200):
        plugin.record("info", "x", meta)
    assert len(records(stream)) == (4 << 20) // (len(meta) + 1)
    clock.now += 1
    plugin.record("info", "small")
    assert records(stream)[-1]["dropped"] == 200 - (4 << 20) // (len(meta) + 1)


def test_what_nobody_reads_costs_nothing_of_the_rate(log: Configure, clock: types.SimpleNamespace) -> None:
    stream = log(level="info")
    plugin = PluginLog(plugin="chatty")
    for _ in range(2_000):
        plugin.record("debug", "x", dropped=1)
    plugin.record("info", "y")
    assert one(stream)["dropped"] == 2_000


def test_what_was_left_out_is_told_when_nothing_follows(log: Configure) -> None:
    stream = log()

    async def flood() -> None:
        plugin = PluginLog(plugin="loud", org="a")
        while not plugin.left_out:
            plugin.record("info", "x")
        await asyncio.to_thread(wait_until, lambda: not plugin.left_out, "it is told")

    asyncio.run(flood())
    last = records(stream)[-1]
    assert (last["level"], last["dropped"], last["plugin"], last["org"]) == ("warning", 1, "loud", "a")
