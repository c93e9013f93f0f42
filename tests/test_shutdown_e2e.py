"""Signals, taken ports and left-over stores in every phase of a host: exit codes, hooks, and nothing that stays."""

import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import LIMIT, HostProcess, all_gone, wait_until, write_plugin

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
    """What hosts may leave behind: folders for temporary files and cgroups."""

    def __init__(self) -> None:
        self.before = self._all()

    @staticmethod
    def _all() -> set[str]:
        folders = {str(path) for path in Path(tempfile.gettempdir()).glob("*hayhost-scratch-*")}
        groups = {str(path) for path in Path("/sys/fs/cgroup").glob("*/**/hayhost-*") if path.is_dir()}
        return folders | groups

    def of(self, pid: int) -> list[str]:
        """Those of the host ``pid`` alone: others run, too."""
        return [path for path in self._all() - self.before if f"hayhost-{pid}-" in path]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("source", [ASYNC, SYNC], ids=["async", "sync"])
def test_a_worker_that_is_in_on_start_is_told_that_the_host_stops(
    start: Start, tmp_path: Path, source: str, number: int
) -> None:
    write_plugin(tmp_path / "p", source)
    traces = Traces()
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
    assert traces.of(host.pid) == []


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
