"""The log through the API: pages, filters, the stream, and who sees what."""

import contextlib
import http.client
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hayhost.api.logs import moment

from .conftest import LIMIT, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE
from .managing import API, Manager, managed

TALKER = (
    PREAMBLE
    + """
@route("GET", "/say")
async def say(req):
    level = req.query.get("level", ["info"])[0]
    for number in range(int(req.query.get("count", ["1"])[0])):
        getattr(req.ctx.logger, level)(req.query["text"][0], {"number": number})
    return {"request": req.id}

@route("GET", "/other-ways")
def other_ways(req):
    print("printed")
    print("to stderr", file=sys.stderr)
    logging.getLogger("lib").error("by logging")
    os.write(2, b"raw\\n")
    return {}

@route("GET", "/raise")
async def fail(req):
    raise RuntimeError("on purpose")

@route("GET", "/exit")
async def leave(req):
    req.ctx.logger.error("last words")
    os._exit(3)
"""
    + PLUGIN
)


def write_talker(folder: Path, name: str = "talker") -> Path:
    return write_plugin(folder / name, TALKER, name=name)


def say(manager: Manager, org: str, text: str, plugin: str = "talker", **query: Any) -> Any:
    """Have an org's worker log ``text``; who it was."""
    asked = urllib.parse.urlencode({"text": text, **query})
    return manager.ok("GET", f"/plugins/{plugin}/{org}/say?{asked}").json()


def read(manager: Manager, **query: Any) -> Any:
    """The page of the log that ``query`` asks for."""
    return manager.get(f"/logs?{urllib.parse.urlencode(query)}")


def events(manager: Manager, **query: Any) -> list[str]:
    """Only what was said."""
    return [item["event"] for item in read(manager, **query)["items"]]


class Stream:
    """A listener to the log."""

    def __init__(self, manager: Manager, headers: dict[str, str] | None = None, **query: Any) -> None:
        self._connection = manager.host.connect(LIMIT)
        named = {"Authorization": f"Bearer {manager.token}"} if manager.token else {}
        path = f"{API}/logs/stream?{urllib.parse.urlencode(query)}"
        self._connection.request("GET", path, headers={**named, **(headers or {})})
        self.response = self._connection.getresponse()
        if self.response.status == 200:
            assert self.response.readline() == b": hello\n"

    def next(self) -> tuple[str, str, Any]:
        """The next event: its name, id and data. Raises ``EOFError`` at the end of the stream."""
        fields: dict[str, str] = {}
        while True:
            line = self.response.readline()
            if not line:
                raise EOFError
            if line == b"\n" and fields:
                return fields.get("event", ""), fields.get("id", ""), json.loads(fields["data"])
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name:
                fields[name] = value

    def read_on(self) -> None:
        """Read until the stream ends."""
        with contextlib.suppress(EOFError, http.client.HTTPException):
            while True:
                self.next()

    def close(self) -> None:
        self.response.close()
        self._connection.close()


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    folder = tmp_path_factory.mktemp("logs")
    for name in ("talker", "second"):
        write_talker(folder / "plugins", name)
    with managed(folder, plugins=folder / "plugins") as manager:
        manager.token = manager.new_token("admin")
        for org in ("acme", "other"):
            manager.put(org, "talker")
        manager.put("acme", "second")
        yield manager


def test_what_a_record_says(manager: Manager) -> None:
    said = say(manager, "acme", "one record")
    [item] = read(manager, q="one record")["items"]
    assert isinstance(item.pop("id"), int)
    assert item.pop("time").endswith("Z")
    assert item == {
        "level": "info",
        "event": "one record",
        "plugin": "talker",
        "version": "1.2.3",
        "org": "acme",
        "worker": manager.host.health("talker", "acme")["pid"],
        "request": said["request"],
        "source": "plugin",
        "meta": {"number": 0},
    }


def test_what_the_host_says_itself(manager: Manager) -> None:
    [item] = read(manager, q="listening")["items"]
    assert (item["event"], item["source"]) == ("listening", "host")
    assert item["meta"]["url"].endswith(f":{manager.host.port}")
    assert "org" not in item
    assert "plugin" not in item


def test_all_the_ways_that_an_author_logs(manager: Manager) -> None:
    manager.ok("GET", "/plugins/talker/acme/other-ways")
    manager.call("GET", "/plugins/talker/acme/raise")
    found = {item["event"]: item for item in read(manager, org="acme", plugin="talker")["items"]}
    levels = {event: found[event]["level"] for event in ("printed", "to stderr", "by logging", "raw")}
    assert levels == {"printed": "info", "to stderr": "warning", "by logging": "error", "raw": "warning"}
    assert found["by logging"]["meta"] == {"logger": "lib"}
    failed = found["GET /raise failed: RuntimeError: on purpose"]
    assert failed["level"] == "error"
    assert failed["traceback"].rstrip().endswith("RuntimeError: on purpose")
    assert failed["request"]


def test_filters(manager: Manager) -> None:
    one = say(manager, "acme", "filtered one", level="warning")
    say(manager, "acme", "filtered two", "second", level="error")
    say(manager, "other", "FILTERED three", level="debug")
    assert events(manager, q="filtered") == ["filtered one", "filtered two"]  # debug is below the host's own level
    assert events(manager, q="Filtered", org="acme", plugin="second") == ["filtered two"]
    assert events(manager, q="filtered", level="error") == ["filtered two"]
    assert events(manager, worker=manager.host.health("talker", "acme")["pid"], q="filtered") == ["filtered one"]
    assert events(manager, request=one["request"]) == ["filtered one"]
    assert events(manager, q="filtered", since="1h") == ["filtered one", "filtered two"]
    assert events(manager, q="filtered", since="2999-01-01T00:00:00Z") == []
    assert events(manager, q='"number":0', plugin="second") == ["filtered two"]
    assert events(manager, q="no such text") == []


def test_pages(manager: Manager) -> None:
    say(manager, "acme", "paged", count=25)
    latest = read(manager, q="paged", limit=10)
    assert [item["meta"]["number"] for item in latest["items"]] == list(range(15, 25))
    assert latest["next"] is None
    seen: list[int] = []
    after: str | None = "0"
    while after is not None:
        page = read(manager, q="paged", limit=10, after=after)
        seen += [item["meta"]["number"] for item in page["items"]]
        after = page["next"]
    assert seen == list(range(25))


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("since=yesterday", "since"),
        ("since=2026-99-99T00:00:00Z", "since"),
        ("level=loud", "level"),
        ("after=x", "after"),
        ("limit=0", "limit"),
        ("worker=x", "worker"),
        ("worker=0", "worker"),
        ("worker=null", "worker"),
        ("q=", "q"),
        ("other=1", "other"),
    ],
)
@pytest.mark.parametrize("path", ["/logs", "/logs/stream"])
def test_malformed_queries(manager: Manager, path: str, query: str, field: str) -> None:
    answer = manager.call("GET", f"{path}?{query}")
    assert answer.status == 422, answer
    assert [error["field"] for error in answer.json()["errors"]] == [field]


def test_an_org_sees_what_is_of_it(manager: Manager) -> None:
    say(manager, "acme", "whose is it")
    say(manager, "other", "whose is it")
    theirs = Manager(manager.host, manager.new_token("acme's", "acme"))
    assert {item["org"] for item in read(theirs, limit=1000)["items"]} == {"acme"}
    assert events(theirs, q="whose is it") == ["whose is it"]
    assert theirs.call("GET", "/logs?org=other").status == 403
    assert theirs.call("GET", "/logs/stream?org=other").status == 403
    assert Manager(manager.host).call("GET", "/logs").status == 401
    with contextlib.closing(Stream(theirs, q="whispered")) as stream:
        say(manager, "other", "whispered to other")
        say(manager, "acme", "whispered to acme")
        assert stream.next()[2]["event"] == "whispered to acme"


def test_the_stream_goes_on_where_it_was_broken_off(manager: Manager) -> None:
    with contextlib.closing(Stream(manager, q="streamed", org="acme")) as stream:
        assert stream.response.getheader("Content-Type") == "text/event-stream"
        say(manager, "acme", "streamed 1")
        kind, first, data = stream.next()
        assert (kind, data["event"], str(data["id"])) == ("log", "streamed 1", first)
    say(manager, "acme", "streamed 2", count=700)
    with contextlib.closing(Stream(manager, {"Last-Event-ID": first}, q="streamed", org="acme")) as stream:
        assert [stream.next()[2]["meta"]["number"] for _ in range(700)] == list(range(700))
        say(manager, "acme", "streamed 3")
        assert stream.next()[2]["event"] == "streamed 3"
    with contextlib.closing(Stream(manager, q="streamed", limit=2)) as stream:
        assert [stream.next()[2]["event"] for _ in range(2)] == ["streamed 2", "streamed 3"]
    with contextlib.closing(Stream(manager, q="streamed", since="1h")) as stream:
        assert stream.next()[2]["event"] == "streamed 1"


def test_the_stream_ends_with_its_token(manager: Manager) -> None:
    made = manager.ok("POST", "/tokens", {"name": "short"}).json()
    other = Manager(manager.host, made["secret"])
    with contextlib.closing(Stream(other, q="until then")) as stream:
        manager.ok("DELETE", f"/tokens/{made['token']['id']}")
        reader = threading.Thread(target=stream.read_on)
        reader.start()
        wait_until(lambda: say(manager, "acme", "until then") and not reader.is_alive(), "the end of the stream")


def test_the_last_words_of_a_worker_that_died(manager: Manager) -> None:
    assert manager.call("GET", "/plugins/talker/other/exit").status == 502
    assert "last words" in events(manager, org="other", plugin="talker")


def test_the_host_ends_streams_when_it_stops(tmp_path: Path) -> None:
    write_talker(tmp_path / "plugins")
    with managed(tmp_path, plugins=tmp_path / "plugins") as manager, contextlib.closing(Stream(manager)) as stream:
        manager.host.process.terminate()
        stream.read_on()
        assert manager.host.process.wait(LIMIT) == 0


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("5m", 999_700),
        ("100ms", 999_999.9),
        ("999999999w", 0),
        ("1970-01-01T00:01:00Z", 60),
        ("1970-01-01T01:01:00+01:00", 60),
        ("1970-01-02", 86_400),
        ("1970-01-02 00:00", 86_400),
        ("1970-02-31", 61 * 86_400),
        ("1960-01-01", 0),
    ],
)
def test_moments(text: str, at: float) -> None:
    assert moment(text, 1_000_000) == round(at * 1_000_000)


@pytest.mark.parametrize("text", ["", "5", "m", "5y", "now", "2026", "2026-13-01", "2026-01-01T25:00", "5m\n", "-5m"])
def test_no_moments(text: str) -> None:
    with pytest.raises(ValueError, match="neither an age"):
        moment(text, 0)
