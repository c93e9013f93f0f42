"""What hangs, dies, floods or leaves costs an MCP endpoint's other clients nothing."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import HostProcess, Serve, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE, hosting, logged
from .mcping import Session, Stream, ask, call, stateless_request, tools
from .test_mcp_endpoint_e2e import at, called, write_tools


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tools(tmp_path, "tools")
    return tmp_path


@pytest.fixture
def host(folder: Path) -> Iterator[HostProcess]:
    with hosting(folder, "--no-reload", "--mcp-timeout", 1) as host:
        yield host


def outcomes(host: HostProcess, tool: str, count: int) -> list[str]:
    """The outcomes of the calls of ``tool``, of which there are ``count``."""
    return [record["outcome"] for record in logged(host, event="mcp tool call", tool=tool, count=count)]


def test_a_tool_has_its_own_time_limit_over_the_host_s(host: HostProcess, folder: Path) -> None:
    for tool, seconds in (("slow", "0.5"), ("wait", "1")):
        error = call(host, at("acme"), tool)["error"]
        assert error["code"] == -32001
        assert f"within {seconds} s" in error["message"]
        assert outcomes(host, tool, 1) == ["timeout"]
    wait_until(lambda: called(folder, "cancelled") == ["acme slow", "acme wait"], "the ends of the handlers")


def test_a_server_that_does_not_answer_is_given_a_rest(host: HostProcess) -> None:
    for _ in range(5):
        assert call(host, at("acme"), "slow")["error"]["code"] == -32001
    began = time.monotonic()
    error = call(host, at("acme"), "whoami")["error"]
    assert time.monotonic() - began < 0.5
    assert error["code"] == -32000
    assert "given a rest" in error["message"]
    assert 1 <= error["data"]["retryAfter"] <= 10
    assert call(host, at("beta"), "whoami")["result"]["structuredContent"]["org"] == "beta"
    assert "whoami" in tools(host, at("acme"))


def test_a_call_is_repeated_only_if_the_tool_is_idempotent(host: HostProcess, folder: Path) -> None:
    assert call(host, at("acme"), "die")["error"]["code"] == -32000
    assert called(folder) == ["acme die"]
    assert outcomes(host, "die", 1) == ["unavailable"]
    assert call(host, at("acme"), "die_once")["result"]["content"][0]["text"] == "survived"
    assert called(folder) == ["acme die", "acme die_once", "acme die_once"]
    assert outcomes(host, "die_once", 1) == ["ok"]


def test_a_client_that_leaves_cancels_its_call(host: HostProcess, folder: Path) -> None:
    body, headers = stateless_request("tools/call", {"name": "wait", "arguments": {}})
    connection = host.connect()
    connection.request("POST", at("acme"), body, headers)
    wait_until(lambda: called(folder) == ["acme wait"], "the call")
    connection.close()
    wait_until(lambda: called(folder, "cancelled") == ["acme wait"], "the end of the handler")
    assert outcomes(host, "wait", 1) == ["cancelled"]


def test_a_session_cancels_a_call_by_its_id(folder: Path, serve: Serve) -> None:
    host = serve(folder)
    session = Session(host, at("acme"))
    body = '{"jsonrpc":"2.0","id":"mine","method":"tools/call","params":{"name":"wait","arguments":{}}}'
    stream = Stream(host, "POST", session.path, body, session.headers)
    wait_until(lambda: called(folder) == ["acme wait"], "the call")
    session.notify("notifications/cancelled", {"requestId": "mine"})
    wait_until(lambda: called(folder, "cancelled") == ["acme wait"], "the end of the handler")
    wait_until(lambda: stream.ended, "the end of the answer")
    assert "result" not in stream.received[-1]
    assert outcomes(host, "wait", 1) == ["cancelled"]
    stream.close()


def test_an_org_has_so_many_requests_at_once_and_others_theirs(folder: Path) -> None:
    options = ("--no-reload", "--mcp-requests", 1, "--mcp-timeout", 3)
    with hosting(folder, *options) as host, ThreadPoolExecutor(8) as pool:
        tools(host, at("acme"))
        running = [pool.submit(call, host, at("acme"), "wait") for _ in range(4)]
        wait_until(lambda: called(folder), "the first call")
        assert call(host, at("beta"), "whoami")["result"]["structuredContent"]["org"] == "beta"
        assert called(folder) == ["acme wait", "beta whoami"]
        assert {future.result()["error"]["code"] for future in running} == {-32001}


def test_more_requests_than_may_wait_are_refused(folder: Path) -> None:
    with hosting(folder, "--no-reload", "--mcp-requests", 1) as host, ThreadPoolExecutor(16) as pool:
        tools(host, at("acme"))
        answers = [future.result() for future in [pool.submit(call, host, at("acme"), "slow") for _ in range(12)]]
        refused = [answer["error"] for answer in answers if answer["error"]["code"] == -32000]
        assert any("under way" in error["message"] for error in refused)


def test_sessions_are_bounded_and_end_when_they_are_idle(folder: Path) -> None:
    with hosting(folder, "--no-reload", "--mcp-sessions", 3, "--mcp-session-timeout", 1) as host:
        sessions = [Session(host, at("acme")) for _ in range(3)]
        assert all(session.opening.status == 200 for session in sessions)
        assert Session(host, at("acme")).opening.status == 503
        assert Session(host, at("beta")).opening.status == 200
        assert tools(host, at("acme"))
        wait_until(lambda: Session(host, at("acme")).opening.status == 200, "room for another session")
        assert sessions[0].post("tools/list").status == 404


def test_opening_a_session_with_something_else_leaves_none_behind(folder: Path) -> None:
    with hosting(folder, "--no-reload", "--mcp-sessions", 2) as host:
        session = Session(host, at("acme"))
        session.headers.pop("Mcp-Session-Id")
        for _ in range(10):
            assert session.post("tools/list").status == 400
        assert Session(host, at("acme")).opening.status == 200


def test_a_client_that_does_not_read_stalls_nobody(folder: Path) -> None:
    with hosting(folder, "--no-reload", "--request-timeout", 2) as host:
        body, headers = stateless_request("tools/call", {"name": "large", "arguments": {"size": 12 << 20}})
        connections = [host.connect() for _ in range(4)]
        for connection in connections:
            connection.request("POST", at("acme"), body, headers)
        wait_until(lambda: called(folder).count("acme large") == 4, "the calls")
        assert call(host, at("acme"), "whoami")["result"]["structuredContent"]["org"] == "acme"
        for connection in connections:
            connection.close()
        assert tools(host, at("acme"))


def test_a_server_that_hangs_is_left_out_of_the_list(tmp_path: Path, serve: Serve) -> None:
    source = """
        import asyncio
        from hayhost.sdk import *
        class Good:
            def list_tools(self):
                return [{"name": "good", "inputSchema": {"type": "object"}}]
            def call_tool(self, name, arguments):
                return name
        class Hanging(Good):
            async def list_tools(self):
                await asyncio.sleep(1000)
        class Broken(Good):
            def list_tools(self):
                raise ValueError("no tools today")
        @define_hay_plugin
        class P:
            name = "mixed"
            async def on_start(self, ctx):
                for kind in (Hanging, Broken, Good):
                    await ctx.mcp.start_local(kind.__name__, lambda mcp, kind=kind: kind())
    """
    write_plugin(tmp_path / "mixed", source, capabilities=("mcp",))
    host = serve(tmp_path)
    assert tools(host, at("acme", "mixed")) == ["good"]
    assert call(host, at("acme", "mixed"), "good")["result"]["content"][0]["text"] == "good"
    health = host.health("mixed", "acme")
    assert health["mcpServers"]["count"] == 3


def test_a_worker_that_does_not_start_is_an_error_and_left_out_of_the_list_of_all(tmp_path: Path, serve: Serve) -> None:
    write_tools(tmp_path, "tools")
    source = "import os\nfrom hayhost.sdk import *\n@define_hay_plugin\nclass P:\n    name = 'bad'\n"
    source += "    def on_start(self, ctx):\n        os._exit(3)\n"
    write_plugin(tmp_path / "bad", source, capabilities=("mcp",))
    host = serve(tmp_path)
    assert all(name.startswith("tools__") for name in tools(host, "/orgs/acme/mcp"))
    assert tools(host, at("acme", "bad")) == []
    assert call(host, at("acme", "bad"), "x")["error"]["code"] == -32000
    assert call(host, "/orgs/acme/mcp", "tools__whoami")["result"]["structuredContent"]["org"] == "acme"


def test_many_clients_at_once(folder: Path) -> None:
    with hosting(folder, "--no-reload") as host, ThreadPoolExecutor(16) as pool:

        def use(number: int) -> str:
            org = f"org{number % 4}"
            if number % 2:
                answer = Session(host, at(org)).call("whoami", number=number)
            else:
                answer = call(host, "/orgs/" + org + "/mcp", "tools__whoami", number=number)
            content = answer["result"]["structuredContent"]
            assert content == {"org": org, "arguments": {"number": number}}
            return org

        assert len(list(pool.map(use, range(64)))) == 64


def test_the_host_answers_while_the_first_request_is_prepared(folder: Path) -> None:
    with hosting(folder, "--no-reload") as host:
        slowest, over = 0.0, threading.Event()

        def probe() -> None:
            nonlocal slowest
            while not over.is_set():
                began = time.monotonic()
                assert host.get("/healthz").status == 200
                slowest = max(slowest, time.monotonic() - began)

        thread = threading.Thread(target=probe)
        thread.start()
        began = time.monotonic()
        assert ask(host, at("acme"), "tools/list")["result"]["tools"]
        took = time.monotonic() - began
        over.set()
        thread.join()
        assert slowest < max(0.25, took / 2), (slowest, took)


def test_a_tool_of_a_worker_that_does_not_start_is_unavailable_and_not_unknown(tmp_path: Path) -> None:
    source = PREAMBLE + PLUGIN + "\n    def on_start(self, ctx):\n        os._exit(7)\n"
    write_plugin(tmp_path / "broken", source)
    with hosting(tmp_path, "--no-reload") as host:
        for _ in range(2):  # a second look comes too soon to be a new one
            error = call(host, "/plugins/broken/acme/mcp", "whoami")["error"]
            assert error["code"] == -32000
            assert "died before it was ready" in error["message"]
            assert error["data"]["retryAfter"] >= 1
