"""Signals, taken ports and left-over stores in every phase of a host: exit codes, hooks, and nothing that stays."""

import fcntl
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import LIMIT, HostProcess, all_gone, seen_of, wait_until, write_plugin
from .managing import Manager, write_recorder

Start = Callable[..., HostProcess]

STARTING = """
from hayhost.sdk import *
import asyncio, time

@define_hay_plugin
class Plugin:
    name = "starting"

    {kind} on_start(self, ctx):
        ctx.logger.info("starting")
        try:
            {body}
        finally:
            ctx.logger.info("start ended")

    def on_stop(self, ctx):
        ctx.logger.info("on_stop of " + ctx.org.id)

    def on_disable(self, ctx):
        ctx.logger.info("on_disable of " + ctx.org.id)

    def on_initialize(self, ctx):
        ctx.register.route("GET", "/hello", lambda req: "hello")
"""
ASYNC = STARTING.format(kind="async def", body="await asyncio.Event().wait()")
SYNC = STARTING.format(kind="def", body="time.sleep(3600)")


def events(host: HostProcess) -> list[str]:
    return [record["event"] for record in host.records() if record.get("source") == "plugin"]


def problems(host: HostProcess) -> list[str]:
    return [record["event"] for record in host.records() if record["level"] in ("warning", "error")]


class Traces:
    """What hosts may leave behind."""

    @staticmethod
    def of(pid: int) -> list[str]:
        """The cgroups of the host ``pid``: others run, too."""
        named = f"hayhost-{pid}-"
        return [name for _, folders, _ in os.walk("/sys/fs/cgroup") for name in folders if name.startswith(named)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("source", [ASYNC, SYNC], ids=["async", "sync"])
def test_a_worker_that_is_in_on_start_is_told_that_the_host_stops(
    start: Start, tmp_path: Path, source: str, number: int
) -> None:
    write_plugin(tmp_path / "p", source)
    host = start("serve", tmp_path, "--mode", "test", "--port", "0", "--log-format", "json").wait_ready()
    waiting = threading.Thread(target=lambda: _ignore(lambda: host.get("/plugins/p/acme/hello")))
    waiting.start()
    host.wait_for_log('"starting"')
    pids = host.pids()
    host.process.send_signal(number)
    assert host.process.wait(20) == 0  # and not after the 30 s that the hook may take
    waiting.join(LIMIT)
    expected = ["starting", "start ended", "on_stop of acme"] if source is ASYNC else ["starting", "on_stop of acme"]
    assert events(host) == expected
    assert [problem for problem in problems(host) if "broken off" not in problem] == []
    wait_until(lambda: all_gone(pids), "all processes are gone", limit=2)
    assert Traces.of(host.pid) == []


@pytest.mark.parametrize("source", [ASYNC, SYNC], ids=["async", "sync"])
def test_in_run_that_hook_is_on_disable(start: Start, tmp_path: Path, source: str) -> None:
    folder = write_plugin(tmp_path / "p", source)
    host = start("run", f"--plugin-path={folder}", "--org-id=acme", "--port=0", "--mode=test")
    host.wait_for_log('"starting"')
    host.process.send_signal(signal.SIGTERM)
    assert host.process.wait(20) == 0
    assert events(host)[-1] == "on_disable of acme"
    assert host.log.count("on_disable of") == 1
    assert problems(host) == []


def _ignore(call: Callable[[], object]) -> None:
    try:
        call()
    except OSError:
        pass


def store_arguments(tmp_path: Path, *options: object) -> list[str]:
    """``serve`` on the plugins in ``tmp_path`` with a store there."""
    plugins = tmp_path / "plugins"
    if not plugins.exists():
        write_recorder(plugins)
    store = ("--store", tmp_path / "hayhost.db", "--port", "0", "--log-format", "json")
    return [str(argument) for argument in ("serve", plugins, *store, *options)]


def assert_it_ends(host: HostProcess, pids: list[int], within: float = 20) -> None:
    """A host that was told to stop does so: exit code 0, without a word of trouble, a process or a folder left."""
    assert host.process.wait(within) == 0
    wait_until(lambda: all_gone(pids), "all processes are gone", limit=2)
    assert Traces.of(host.pid) == []
    assert "Traceback" not in host.log
    assert [problem for problem in problems(host) if "ignored: already stopping" not in problem] == []


def test_a_signal_while_another_host_prepares_the_store(start: Start, tmp_path: Path) -> None:
    arguments = store_arguments(tmp_path)
    with open(tmp_path / "hayhost.db.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        host = start(*arguments)
        wait_until(lambda: (tmp_path / "hayhost.db").exists())
        host.process.send_signal(signal.SIGTERM)
        assert_it_ends(host, [])
    assert start(*arguments).wait_ready().stop() == 0


@pytest.mark.parametrize("pause", [0.0, 0.1, 0.2, 0.3, 0.5, 0.8])
def test_a_signal_at_any_moment_of_a_first_start_leaves_a_store_that_serves(
    start: Start, tmp_path: Path, pause: float
) -> None:
    """How far it is by then, with the store's tables and its key, is another place on each machine."""
    arguments = store_arguments(tmp_path)
    host = start(*arguments)
    threading.Event().wait(pause)
    pids = host.pids()
    host.process.send_signal(signal.SIGTERM)
    # Before the host has its handlers, in Python's own start, a signal has the effect that it has on any program.
    assert host.process.wait(LIMIT) in (0, -signal.SIGTERM)
    wait_until(lambda: all_gone(pids), limit=5)
    assert "Traceback" not in host.log
    again = start(*arguments).wait_ready()
    assert Manager(again).put("acme", config={"value": "x"})["config"]["value"] == "x"
    assert again.stop() == 0


def test_a_signal_while_the_nursery_does_not_start(start: Start, tmp_path: Path) -> None:
    host = start(*store_arguments(tmp_path))
    [nursery] = wait_until(lambda: children_of(host, "sandbox.nursery"), "the nursery is there")
    os.kill(nursery, signal.SIGSTOP)
    threading.Event().wait(0.5)
    host.process.send_signal(signal.SIGTERM)
    assert_it_ends(host, [nursery])  # and not after the minute that it is waited for


def children_of(host: HostProcess, module: str) -> list[int]:
    """The processes below the host that were executed to run ``module``."""
    return [pid for pid in host.pids() if module.encode() in seen_of(pid, "cmdline")]


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]])
def test_signals_while_plugins_load(start: Start, tmp_path: Path, numbers: list[int]) -> None:
    endless = "import time\nprint('begun', flush=True)\nwhile True: time.sleep(0.01)\n"
    for name in ("a", "b", "c"):
        write_plugin(tmp_path / "plugins" / name, endless)
    host = start(*store_arguments(tmp_path, "--isolation", "confined"))
    host.wait_for_log('"begun"')
    pids = host.pids()
    for number in numbers:
        host.process.send_signal(number)
    assert host.process.wait(20) == 0
    wait_until(lambda: all_gone(pids), limit=2)
    assert "Traceback" not in host.log
    assert Traces.of(host.pid) == []


def test_a_signal_in_the_middle_of_a_reload(start: Start, tmp_path: Path) -> None:
    folder = write_recorder(tmp_path / "plugins")
    host = start(*store_arguments(tmp_path, "--mode", "test")).wait_ready()
    assert host.get("/plugins/recorder/acme/value").status == 200
    source = (folder / "plugin.py").read_text()
    (folder / "plugin.py").write_text(source + "\nimport time\nprint('again', flush=True)\ntime.sleep(3600)\n")
    host.wait_for_log('"again"')
    pids = host.pids()
    host.process.send_signal(signal.SIGTERM)
    assert_it_ends(host, pids)
    assert host.log.count("hook on_stop") == 1


def test_a_port_that_another_host_still_holds(start: Start, tmp_path: Path) -> None:
    first = start(*store_arguments(tmp_path)).wait_ready()
    second = start(*store_arguments(tmp_path, "--port", first.port))
    assert second.process.wait(LIMIT) == 2
    line = f"hayhost: cannot listen on 127.0.0.1:{first.port}: Address already in use"
    assert [text for text in second.log.splitlines() if not text.startswith("{")] == [line]
    assert Traces.of(second.pid) == []
    assert first.get("/readyz").status == 200
    assert first.stop() == 0


def test_a_store_that_a_killed_host_left(start: Start, tmp_path: Path) -> None:
    host = start(*store_arguments(tmp_path)).wait_ready()
    manager = Manager(host)
    for number in range(20):
        manager.put(f"org-{number}", config={"value": str(number)})
    pids = host.pids()
    host.process.kill()
    host.process.wait()
    wait_until(lambda: all_gone(pids), limit=2)
    assert (tmp_path / "hayhost.db-wal").stat().st_size > 0
    again = start(*store_arguments(tmp_path)).wait_ready()
    for number in range(20):
        assert again.get(f"/plugins/recorder/org-{number}/value").json()["value"] == str(number)
    assert Traces.of(host.pid) == []  # the next host has removed what that one left
    assert again.stop() == 0


def test_two_hosts_on_one_store_follow_each_other_and_stop_alone(start: Start, tmp_path: Path) -> None:
    first, second = (start(*store_arguments(tmp_path)) for _ in range(2))  # both make it
    for host in (first, second):
        host.wait_ready()
    Manager(first).put("acme", config={"value": "one"})
    wait_until(lambda: second.get("/plugins/recorder/acme/value").status == 200)
    assert first.stop() == 0
    Manager(second).put("acme", config={"value": "two"})
    assert second.get("/plugins/recorder/acme/value").json()["value"] == "two"
    assert second.stop() == 0
