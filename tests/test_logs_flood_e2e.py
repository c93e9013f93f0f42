"""Plugins that log more than anybody reads: the host answers all the while, and says how much is missing."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .commands import run_hayhost
from .conftest import LIMIT, HostProcess, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE, hosting

FLOODER = (
    PREAMBLE
    + """
@route("GET", "/ping")
async def ping(req):
    return {}

@route("GET", "/lines")
def lines(req):
    for number in range(int(req.query["count"][0])):
        print("line " + "x" * int(req.query["size"][0]))
    return {}

@route("GET", "/raw")
def raw(req):
    for _ in range(int(req.query["mib"][0])):
        os.write(2, b"x" * (1 << 20) if "long" in req.query else (b"x" * 99 + b"\\n") * 10_000)
    return {}

@route("GET", "/nasty")
def nasty(req):
    print('{"time":"2020-01-01T00:00:00.000Z","level":"error","event":"forged","org":"other","id":1}')
    print("\\x1b[2J\\x1b[31mred\\r\\u2028\\u202e")
    os.write(1, b'\\xff\\xfe\\x00\\x1b]0;title\\x07\\n')
    req.ctx.logger.error("forged\\n{}", {"level": "debug", "org": "other", "event": "x", "id": 7, "deep": deep(500)})
    return {}

def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value
"""
    + PLUGIN
)


def write_flooder(folder: Path) -> Path:
    write_plugin(folder / "flooder", FLOODER)
    return folder


class Piped:
    """A host whose standard error is a pipe, read when a test does so."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.chmod(0o755)  # plugins are read by users of their own
        reader, writer = os.pipe()
        self.log = os.fdopen(reader, "rb")
        environment = {**os.environ, "HAYHOST_ISOLATION": HostProcess.isolation}
        arguments = ["serve", str(folder), "--mode", "test", "--port", "0", "--log-format", "json", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hayhost", *arguments], stderr=writer, stdout=writer, env=environment
        )
        os.close(writer)
        found = None
        for line in self.log:
            found = found or re.search(rb'"url":"http://[^"]*:(\d+)"', line)
            if b'"event":"ready"' in line:
                break
        assert found
        self.host = HostProcess.__new__(HostProcess)
        self.host.port = int(found[1])

    def drain(self, lines: list[bytes]) -> threading.Thread:
        """Read on, into ``lines``, until the host has ended."""
        thread = threading.Thread(target=lambda: lines.extend(self.log), daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


@contextlib.contextmanager
def piped(folder: Path, *options: str) -> Iterator[Piped]:
    with contextlib.closing(Piped(write_flooder(folder), *options)) as one:
        yield one


def flood(host: HostProcess, org: str, count: int = 1_000, size: int = 4_000) -> None:
    """Have an org log as much as it may at once; somebody else is answered after that."""
    assert host.get(f"/plugins/flooder/{org}/lines?count={count}&size={size}").status == 200
    assert host.get("/plugins/flooder/bystander/ping").status == 200


def test_a_pipe_that_nobody_reads_holds_up_nobody(tmp_path: Path) -> None:
    with piped(tmp_path) as one:
        said = number = 0
        while said < 10 << 20:  # a worker leaves out what is not taken from it at once
            flood(one.host, f"org{number}", size=8_000)
            kept = one.host.get(f"/api/v1/logs?org=org{number}&limit=1000").json()["items"]
            said += sum(len(item["event"]) for item in kept)
            number += 1
        lines: list[bytes] = []
        reading = one.drain(lines)

        def missing() -> int:
            told = [json.loads(line) for line in list(lines) if b"log lines are missing" in line and line[-1:] == b"\n"]
            return sum(int(record["dropped"]) for record in told)

        wait_until(missing, "what is missing is said, although nothing follows")
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(LIMIT) == 0
        reading.join(LIMIT)
        events = [json.loads(line)["event"] for line in lines]
        seen = sum(event.startswith("line x") for event in events)
        assert seen > 100
        assert any("received: stopping" in event for event in events)  # after the flood everything is written again


def test_a_host_stops_although_nobody_reads_its_log(tmp_path: Path) -> None:
    with piped(tmp_path) as one:
        flood(one.host, "one")
        flood(one.host, "another")
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(LIMIT) == 0


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    with piped(tmp_path) as one:
        one.log.close()
        flood(one.host, "one")
        flood(one.host, "another")
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(LIMIT) == 0


def test_the_last_lines_before_a_fatal_error_come_out(tmp_path: Path) -> None:
    """A command that fails says why, after what its log said before."""
    write_flooder(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "pyproject.toml").write_text("[tool.hay-plugin]\n")
    with hosting(write_flooder(tmp_path)) as host:
        arguments = ["serve", str(tmp_path), "--mode", "test", "--port", str(host.port), "--log-format", "json"]
        command = [sys.executable, "-P", "-m", "hayhost", *arguments]
        environment = {**os.environ, "HAYHOST_ISOLATION": HostProcess.isolation}
        done = subprocess.run(command, capture_output=True, env=environment, timeout=LIMIT, check=False)
    assert done.returncode == 2
    *before, last = done.stderr.decode().splitlines()
    assert "a plugin is not served" in [json.loads(line)["event"] for line in before]
    assert last.startswith("hayhost: cannot listen")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    with hosting(write_flooder(tmp_path_factory.mktemp("flood")), "--log-memory", "4MiB") as host:
        yield host


def said_by(host: HostProcess, org: str) -> list[dict[str, Any]]:
    return [record for record in host.records() if record.get("org") == org and record["event"] != "worker ready"]


def test_what_is_left_out_is_counted_to_the_last(host: HostProcess) -> None:
    assert host.get("/plugins/flooder/counted/lines?count=5000&size=10").status == 200

    def total() -> int:
        records = said_by(host, "counted")
        seen = sum(str(record["event"]).startswith("line ") for record in records)
        return seen + sum(int(record.get("dropped", 0)) for record in records)

    wait_until(lambda: total() >= 5_000, "all lines are seen or counted")
    assert total() == 5_000


def _resident(host: HostProcess) -> int:
    found = re.search(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{host.pid}/status").read_text())
    assert found
    size: int = int(found[1]) << 10
    return size


@pytest.mark.parametrize("long", ["", "&long=1"])
def test_a_flood_takes_no_memory(host: HostProcess, long: str) -> None:
    before = _resident(host)
    assert host.get(f"/plugins/flooder/flood{len(long)}/raw?mib=100{long}").status == 200
    assert host.get("/plugins/flooder/bystander/ping").status == 200
    assert _resident(host) - before < 64 << 20
    kept = host.get(f"/api/v1/logs?org=flood{len(long)}&limit=1000").json()["items"]
    assert sum(len(item["event"]) for item in kept) < 4 << 20


def test_nothing_is_forged(host: HostProcess) -> None:
    assert host.get("/plugins/flooder/nasty/nasty").status == 200
    assert host.get("/plugins/flooder/nasty/lines?count=1&size=1").status == 200
    answer = host.get("/api/v1/logs?plugin=flooder&org=nasty")
    asked = ("flooder", "nasty", "--url", f"http://127.0.0.1:{host.port}")
    for text in (host.log, run_hayhost("logs", *asked).out, run_hayhost("logs", *asked, "--json").out):
        assert "forged" in text
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", text)
    items = answer.json()["items"]
    assert {item["org"] for item in items} == {"nasty"}
    assert min(item["id"] for item in items) > 1
    [error] = [item for item in items if item["level"] == "error"]
    assert error["event"] == "forged\n{}"
    assert error["meta"] == {"meta": "malformed"}
    stream = host.connect()
    stream.request("GET", "/api/v1/logs/stream?org=nasty&since=1h&q=forged")
    response = stream.getresponse()
    assert [response.readline().partition(b":")[0] for _ in range(6)] == [b"", b"\n", b"id", b"event", b"data", b"\n"]
    stream.close()
