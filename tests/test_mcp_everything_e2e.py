"""More than tools through an org's endpoint: prompts, resources and their news, completion, progress, log messages."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import HostProcess, wait_until, write_plugin
from .hosting import hosting
from .mcping import Session, Stream, ask, call, listen, messages, news, stateless_request

AT = "/orgs/acme/mcp"
WATCHED = "test://watched-resource"
UPDATED = "notifications/resources/updated"


@pytest.fixture(scope="module")
def host() -> Iterator[HostProcess]:
    with hosting(Path(__file__).parent / "conformance", "--no-reload", writable=False) as host:
        yield host


@pytest.fixture(params=["sessions", "stateless"])
def asking(request: pytest.FixtureRequest, host: HostProcess) -> Any:
    """``asking(method, params)``: the answer in one of the two revisions."""
    if request.param == "sessions":
        return Session(host, AT).ask
    return lambda method, params=None: ask(host, AT, method, params)


def test_prompts(asking: Any) -> None:
    names = [prompt["name"] for prompt in asking("prompts/list")["result"]["prompts"]]
    assert "everything__test_simple_prompt" in names
    given = {"name": "everything__test_prompt_with_arguments", "arguments": {"arg1": "a", "arg2": "b"}}
    assert "arg1='a', arg2='b'" in asking("prompts/get", given)["result"]["messages"][0]["content"]["text"]
    assert asking("prompts/get", {"name": "test_simple_prompt"})["error"]["code"] == -32602


def test_resources(asking: Any) -> None:
    listed = asking("resources/list")["result"]["resources"]
    assert "test://static-text" in [resource["uri"] for resource in listed]
    assert all(resource["_meta"]["hayhost/plugin"] == "everything" for resource in listed)
    (template,) = asking("resources/templates/list")["result"]["resourceTemplates"]
    assert template["uriTemplate"] == "test://template/{id}/data"
    for uri, text in (("test://static-text", "content of the static"), ("test://template/7/data", '"id": "7"')):
        assert text in asking("resources/read", {"uri": uri})["result"]["contents"][0]["text"]
    assert asking("resources/read", {"uri": "test://nothing"})["error"]["data"] == {"uri": "test://nothing"}


def test_completion(asking: Any) -> None:
    argument = {"name": "arg1", "value": "par"}
    for ref in (
        {"type": "ref/prompt", "name": "everything__test_prompt_with_arguments"},
        {"type": "ref/resource", "uri": "test://template/{id}/data"},
    ):
        result = asking("completion/complete", {"ref": ref, "argument": argument})["result"]
        assert result["completion"]["values"] == ["paris", "park", "party"]
    unknown = {"type": "ref/prompt", "name": "test_prompt_with_arguments"}
    assert asking("completion/complete", {"ref": unknown, "argument": argument})["error"]["code"] == -32602


def test_news_of_resources_reach_who_wants_them(host: HostProcess) -> None:
    sessions = [Session(host, AT), Session(host, AT), Session(host, "/orgs/beta/mcp")]
    for session in (sessions[0], sessions[2]):
        assert session.ask("resources/subscribe", {"uri": WATCHED})["result"] == {}
    streams = [*map(news, sessions), listen(host, AT, resourceSubscriptions=[WATCHED]), listen(host, AT)]
    wait_until(lambda: all(stream.received for stream in streams[3:]), "the acknowledgements")
    assert "result" in sessions[1].call("everything__touch")
    wait_until(lambda: UPDATED in streams[0].methods() and UPDATED in streams[3].methods(), "the news")
    assert all(UPDATED not in streams[number].methods() for number in (1, 2, 4))
    assert sessions[0].ask("resources/unsubscribe", {"uri": WATCHED})["result"] == {}
    before = streams[0].methods().count(UPDATED)
    assert "result" in sessions[1].call("everything__touch")
    wait_until(lambda: streams[3].methods().count(UPDATED) >= 2, "the news after that")
    assert streams[0].methods().count(UPDATED) == before
    for stream in streams:
        stream.close()


def test_progress_has_the_client_s_own_token(host: HostProcess) -> None:
    for token in ("mine", 7):
        params = {"name": "everything__test_tool_with_progress", "arguments": {}, "_meta": {"progressToken": token}}
        body, headers = stateless_request("tools/call", params)
        told = messages(host.post(AT, body, headers=headers))
        progress = [message["params"] for message in told if message.get("method") == "notifications/progress"]
        assert [(one["progressToken"], one["progress"], one["total"]) for one in progress] == [
            (token, value, 100) for value in (0, 50, 100)
        ]
        assert "result" in told[-1]


def test_log_messages_are_those_that_the_client_wants(host: HostProcess) -> None:
    def logged(told: list[dict[str, Any]]) -> list[str]:
        return [message["params"]["data"] for message in told if message.get("method") == "notifications/message"]

    session, params = Session(host, AT), {"name": "everything__test_tool_with_logging", "arguments": {}}
    assert len(logged(messages(session.post("tools/call", params)))) == 3
    session.ask("logging/setLevel", {"level": "error"})
    assert logged(messages(session.post("tools/call", params))) == []
    for level, count in ((None, 0), ("info", 3), ("warning", 0)):
        meta = {"_meta": {"io.modelcontextprotocol/logLevel": level}} if level else {}
        body, headers = stateless_request("tools/call", {**params, **meta})
        assert len(logged(messages(host.post(AT, body, headers=headers)))) == count


def test_a_server_cannot_ask_a_client_that_cannot_answer(host: HostProcess) -> None:
    params = {"name": "everything__test_elicitation", "arguments": {"message": "?"}}
    answer = Session(host, AT).ask("tools/call", params)
    assert "error" in answer or answer["result"]["isError"]
    assert "result" in call(host, AT, "everything__test_simple_text")


def test_news_on_the_bus_of_a_server_object_reach_who_subscribed(tmp_path: Path) -> None:
    source = """
        from hayhost.sdk import *
        from mcp.server.mcpserver import Context, MCPServer

        server = MCPServer("bus")

        @server.resource("note://a")
        def a() -> str:
            return "a"

        @server.resource("note://b")
        def b() -> str:
            return "b"

        @server.tool()
        async def touch(uri: str, ctx: Context) -> str:
            await ctx.notify_resource_updated(uri)
            return uri

        @define_hay_plugin
        class P:
            name = "bus"

            async def on_start(self, ctx):
                await ctx.mcp.start_local("bus", lambda mcp: server)
    """
    write_plugin(tmp_path / "bus", source, capabilities=("mcp",))
    with hosting(tmp_path) as host:
        path = "/plugins/bus/acme/mcp"
        session = Session(host, path)
        assert session.ask("resources/subscribe", {"uri": "note://a"})["result"] == {}
        streams = [news(session), listen(host, path, resourceSubscriptions=["note://b"])]
        wait_until(lambda: streams[1].received, "the acknowledgement")

        def touch(*uris: str) -> None:
            for uri in uris:
                assert session.call("touch", uri=uri)["result"]["content"][0]["text"] == uri

        def heard(stream: Stream) -> list[str]:
            return [message["params"]["uri"] for message in stream.received if message.get("method") == UPDATED]

        touch("note://a", "note://b", "note://c")
        wait_until(lambda: all(map(heard, streams)), "the news")
        assert session.ask("resources/unsubscribe", {"uri": "note://a"})["result"] == {}
        touch("note://a", "note://b")
        wait_until(lambda: len(heard(streams[1])) == 2, "more news")
        assert [heard(stream) for stream in streams] == [["note://a"], ["note://b", "note://b"]]
        os.kill(host.health("bus", "acme")["pid"], signal.SIGKILL)
        wait_until(
            lambda: session.call("touch", uri="note://b") and len(heard(streams[1])) > 2, "another worker's news"
        )
        for stream in streams:
            stream.close()
