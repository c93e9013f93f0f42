"""``hayhost logs``, and the log's file."""

import contextlib
import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .commands import Done, environment, run_hayhost
from .conftest import LIMIT, wait_until
from .managing import Manager, managed
from .test_logs_api_e2e import events, say, write_talker


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    folder = tmp_path_factory.mktemp("logs")
    write_talker(folder / "plugins")
    with managed(folder, plugins=folder / "plugins") as manager:
        for org in ("acme", "other"):
            manager.put(org, "talker")
            say(manager, org, "first", count=3)
        say(manager, "acme", "odd", level="warning")
        manager.call("GET", "/plugins/talker/acme/raise")
        yield manager


def url(manager: Manager) -> str:
    return f"http://127.0.0.1:{manager.host.port}"


def logs(manager: Manager, *arguments: object, **options: Any) -> Done:
    return run_hayhost("logs", "--url", url(manager), *arguments, **options)


def test_the_last_lines(manager: Manager) -> None:
    done = logs(manager, "talker", "acme", "-n", 3)
    assert done.code == 0, done.err
    first, second, *rest = done.out.splitlines()
    assert first[9:].startswith("info    talker/acme first ")
    assert second[9:].startswith("warning talker/acme odd ")
    assert "meta={'number': 0}" in second
    assert rest[0][9:].startswith("error   talker/acme GET /raise failed")
    assert rest[-1].strip() == "| RuntimeError: on purpose"
    assert "\x1b" not in done.out


def test_choosing(manager: Manager) -> None:
    everything = [json.loads(line) for line in logs(manager, "--json").out.splitlines()]
    assert "listening" in [one["event"] for one in everything]
    chosen = [json.loads(line) for line in logs(manager, "talker", "--level", "warning", "--json").out.splitlines()]
    assert {one["level"] for one in chosen} == {"warning", "error"}
    [odd] = [one for one in chosen if one["event"] == "odd"]
    assert odd in everything
    assert [one["event"] for one in map(json.loads, logs(manager, "--grep", "ODD", "--json").out.splitlines())] == [
        "odd"
    ]
    assert "odd" in logs(manager, "--request", odd["request"]).out
    assert logs(manager, "--since", "2999-01-01").out == ""
    assert "odd" in logs(manager, "--since", "1h").out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--since", "yesterday"), "neither an age such as 5m"),
        (("no such plugin!",), "plugin"),
        (("--file", __file__, "--follow"), "--follow asks a running host"),
    ],
)
def test_what_is_refused(manager: Manager, arguments: tuple[str, ...], says: str) -> None:
    done = logs(manager, *arguments)
    assert (done.code, done.out) == (1, "")
    assert says in done.err
    assert len(done.err.splitlines()) == 1


def test_where_no_host_answers() -> None:
    done = run_hayhost("logs", "--url", "http://127.0.0.1:1")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("hayhost: no host answers at http://127.0.0.1:1: ")


def test_a_host_with_tokens(tmp_path: Path) -> None:
    write_talker(tmp_path / "plugins")
    with managed(tmp_path, plugins=tmp_path / "plugins") as manager:
        manager.token = manager.new_token()
        done = logs(manager)
        assert (done.code, "HAYHOST_TOKEN" in done.err) == (1, True)
        assert "listening" in logs(manager, env={"HAYHOST_TOKEN": manager.token}).out
        manager.put("acme", "talker")
        say(manager, "acme", "mine")
        theirs = manager.new_token("acme's", "acme")
        assert {line.split()[2] for line in logs(manager, env={"HAYHOST_TOKEN": theirs}).out.splitlines()} == {
            "talker/acme"
        }
        assert logs(manager, "talker", "other", env={"HAYHOST_TOKEN": theirs}).code == 1


class Following:
    """A ``hayhost logs --follow`` that runs."""

    def __init__(self, manager: Manager, folder: Path, *arguments: str) -> None:
        self._out, self._err = folder / "out", folder / "err"
        command = [sys.executable, "-P", "-m", "hayhost", "logs", "--url", url(manager), "--follow", *arguments]
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment(), cwd=folder)

    def wait_for(self, text: str) -> str:
        wait_until(lambda: text in self.out or self.process.poll() is not None, f"{text!r} in {self.out}")
        assert text in self.out, self._err.read_text()
        return self.out

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def test_following_a_host_that_is_started_anew(tmp_path: Path) -> None:
    write_talker(tmp_path / "plugins")
    plugins = tmp_path / "plugins"
    with managed(tmp_path, plugins=plugins) as manager:
        manager.put("acme", "talker")
        say(manager, "acme", "before it was looked at")
        port = manager.host.port
        following = Following(manager, tmp_path, "talker", "acme")
        with contextlib.closing(following):
            following.wait_for("before it was looked at")
            for number in range(5):
                say(manager, "acme", f"live {number};")
            following.wait_for("live 4;")
            assert manager.host.stop() == 0
            wait_until(lambda: "waiting for it" in following.err, "it says that the host is gone")
            with managed(tmp_path, "--port", str(port), plugins=plugins) as again:
                say(again, "acme", "after the restart;")
                out = following.wait_for("after the restart;")
                assert "the host is there again" in following.err
            for text in ("before it", *(f"live {number};" for number in range(5)), "after the restart;"):
                assert out.count(text) == 1
            following.process.send_signal(signal.SIGINT)
            assert following.process.wait(LIMIT) == 130


def test_the_file(tmp_path: Path) -> None:
    write_talker(tmp_path / "plugins")
    plugins, file = tmp_path / "plugins", tmp_path / "hayhost.log"
    with managed(tmp_path, "--log-file", file, plugins=plugins) as manager:
        manager.put("acme", "talker")
        say(manager, "acme", "in the first life")
        assert manager.host.stop() == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with managed(tmp_path, "--log-file", file, "--log-records", "5", plugins=plugins) as manager:
        assert events(manager, q="first life") == ["in the first life"]
        say(manager, "acme", "counted", count=100)
        wait_until(lambda: len(events(manager, q="counted")) == 100, "what is only in the file by now")
        assert events(manager, q="counted", limit=5) == ["counted"] * 5
        page = manager.get("/logs?q=counted&limit=30&after=0")
        assert [item["meta"]["number"] for item in page["items"]] == list(range(30))
        done = run_hayhost("logs", "talker", "--file", file, "-n", 102, "--json")
        assert done.code == 0, done.err
        lines = [json.loads(line) for line in done.out.splitlines()]
        assert [line["meta"]["number"] for line in lines if line["event"] == "counted"] == list(range(100))
        assert run_hayhost("logs", "--file", file, "--grep", "first life").out.count("in the first life") == 1
    assert "reason" not in file.read_text()


def test_a_file_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    write_talker(tmp_path / "plugins")
    file = tmp_path / "not there" / "hayhost.log"
    with managed(tmp_path, "--log-file", file, plugins=tmp_path / "plugins") as manager:
        manager.put("acme", "talker")
        say(manager, "acme", "to nobody", count=50)
        say(manager, "acme", "to nobody", count=50)
        told = manager.host.wait_for_log("the log file cannot be written")
        assert told.count("the log file cannot be written") == 1
        assert events(manager, q="cannot be written") == ["the log file cannot be written; the log goes on without it"]
        file.parent.mkdir()
        say(manager, "acme", "to somebody")
        manager.host.wait_for_log("the log file is written again")
        wait_until(lambda: "to somebody" in file.read_text() or "written again" in file.read_text(), "the file goes on")
