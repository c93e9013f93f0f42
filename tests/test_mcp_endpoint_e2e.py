"""MCP endpoints of the real host: both revisions, aggregation, what is cached, and who may use what."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mcp.client.client import Client

from hayhost.store import Keyring, Store

from . import mcping
from .conftest import LIMIT, HostProcess, Serve, wait_until, write_plugin
from .hosting import hosting, logged, stored
from .mcping import Session, ask, call, listen, messages, news, tools

TOOLS = """
    import asyncio, os, time
    from pathlib import Path
    from hayhost.sdk import *

    def tool(name, **more):
        return {"name": name, "description": name, "inputSchema": {"type": "object"}, **more}

    class Tools:
        def __init__(self, org, folder):
            self.org, self.notes = org, folder

        def list_tools(self):
            return [
                tool("whoami"),
                tool("fail"),
                tool("slow", _meta={"hayhost/timeout": 0.5}),
                tool("wait"),
                tool("die"),
                tool("die_once", annotations={"idempotentHint": True}),
                tool("large"),
                {"name": "odd"},
                {"name": "odder", "inputSchema": {"type": "string"}, "annotations": 5},
                {"name": 5},
                MARK,
            ]

        async def call_tool(self, name, arguments):
            with open(self.notes + "calls", "a") as file:
                file.write(f"{self.org} {name}\\n")
            match name:
                case "whoami":
                    return {"org": self.org, "arguments": arguments}
                case "fail":
                    raise ValueError("it went wrong")
                case "slow" | "wait":
                    try:
                        await asyncio.sleep(1000)
                    except asyncio.CancelledError:
                        with open(self.notes + "cancelled", "a") as file:
                            file.write(f"{self.org} {name}\\n")
                        raise
                case "die":
                    os._exit(1)
                case "die_once":
                    if Path(self.notes + "calls").read_text().count("die_once") == 1:
                        os._exit(1)
                    return "survived"
                case "large":
                    return "x" * arguments["size"]
            return name

    @define_hay_plugin
    class Plugin:
        name = "Tools"

        def on_initialize(self, ctx):
            pass

        async def on_start(self, ctx):
            org = ctx.org.id
            await ctx.mcp.start_local("tools", lambda mcp: Tools(org, FOLDER))
"""


def write_tools(folder: Path, name: str, mark: str = "extra", capabilities: tuple[str, ...] = ("mcp",)) -> Path:
    source = TOOLS.replace("FOLDER", repr(str(folder / f"{name}."))).replace("MARK", f"tool({mark!r})")
    return write_plugin(folder / name, source, capabilities=capabilities)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mcp")
    for name in ("tools", "others"):
        write_tools(folder, name)
    write_plugin(
        folder / "plain",
        "from hayhost.sdk import *\n@define_hay_plugin\nclass P:\n    name = 'plain'\n",
        capabilities=(),
    )
    return folder


@pytest.fixture(scope="module")
def host(folder: Path) -> Iterator[HostProcess]:
    with hosting(folder, "--no-reload") as host:
        yield host


def at(org: str, plugin: str = "tools") -> str:
    return f"/plugins/{plugin}/{org}/mcp"


def called(folder: Path, file: str = "calls") -> list[str]:
    path = folder / f"tools.{file}"
    return path.read_text().splitlines() if path.exists() else []


# ---- the official client, both revisions, two orgs


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_the_official_client_sees_its_own_org_only(host: HostProcess, mode: Any) -> None:
    async def use(org: str, path: str, tool: str) -> None:
        async with Client(f"http://127.0.0.1:{host.port}{path}", mode=mode) as client:
            assert client.protocol_version == (mcping.SESSIONS if mode == "legacy" else mcping.STATELESS)
            listed = await client.list_tools()
            assert tool in [entry.name for entry in listed.tools]
            for number in range(10):
                result = await client.call_tool(tool, {"number": number})
                assert result.structured_content == {"org": org, "arguments": {"number": number}}
                assert not result.is_error

    async def both() -> None:
        await asyncio.gather(
            *(use(org, at(org), "whoami") for org in ("acme", "beta")),
            *(use(org, f"/orgs/{org}/mcp", "others__whoami") for org in ("acme", "beta")),
        )

    asyncio.run(both())


def test_a_session_opens_and_ends(host: HostProcess) -> None:
    session = Session(host, at("acme"))
    assert session.server["protocolVersion"] == mcping.SESSIONS
    assert session.server["serverInfo"]["name"] == "tools"
    assert session.server["capabilities"] == {"tools": {"listChanged": True}}
    assert session.call("whoami")["result"]["structuredContent"]["org"] == "acme"
    assert session.end().status == 200
    assert session.post("tools/list").status == 404


def test_a_session_is_of_one_endpoint(host: HostProcess) -> None:
    session = Session(host, at("acme"))
    session.path = at("beta")
    assert session.post("tools/list").status == 404
    session.path = "/orgs/acme/mcp"
    assert session.post("tools/list").status == 404


def test_discovery_without_a_session(host: HostProcess) -> None:
    result = ask(host, "/orgs/acme/mcp", "server/discover")["result"]
    assert mcping.STATELESS in result["supportedVersions"]
    assert set(result["capabilities"]) >= {"tools", "prompts", "resources", "completions"}


# ---- lists


def test_tools_of_all_plugins_have_their_plugin_s_name(host: HostProcess) -> None:
    listed = ask(host, "/orgs/acme/mcp", "tools/list")["result"]["tools"]
    assert {tool["name"] for tool in listed} >= {"tools__whoami", "others__whoami"}
    whoami = next(tool for tool in listed if tool["name"] == "others__whoami")
    meta = {"hayhost/plugin": "others", "hayhost/server": "tools", "hayhost/name": "whoami"}
    assert whoami["_meta"] == meta
    assert call(host, "/orgs/acme/mcp", "others__whoami")["result"]["structuredContent"]["org"] == "acme"


def test_an_odd_tool_costs_itself_at_most(host: HostProcess) -> None:
    listed = {tool["name"]: tool for tool in ask(host, at("acme"), "tools/list")["result"]["tools"]}
    assert {"whoami", "odd", "odder"} <= listed.keys()
    assert listed["odd"]["inputSchema"] == listed["odder"]["inputSchema"] == {"type": "object"}


def test_a_tool_that_there_is_not(host: HostProcess) -> None:
    assert call(host, at("acme"), "nothing")["error"]["code"] == -32602
    assert call(host, "/orgs/acme/mcp", "whoami")["error"]["code"] == -32602
    (record,) = logged(host, event="mcp tool call", tool="nothing")
    assert (record["outcome"], record["org"]) == ("denied", "acme")


def test_methods_without_a_server_for_them(host: HostProcess) -> None:
    for method, key in (("prompts/list", "prompts"), ("resources/list", "resources")):
        assert ask(host, at("acme"), method)["result"][key] == []
    assert ask(host, at("acme"), "resources/read", {"uri": "x://y"})["error"]["code"] == -32602
    assert Session(host, at("acme")).ask("resources/read", {"uri": "x://y"})["error"]["code"] == -32002
    assert ask(host, at("acme"), "no/such")["error"]["code"] == -32601


def test_a_tool_that_fails_says_so_to_the_model(host: HostProcess) -> None:
    result = call(host, at("acme"), "fail")["result"]
    assert result["isError"] is True
    assert "it went wrong" in result["content"][0]["text"]
    assert logged(host, event="mcp tool call", tool="fail")[0]["outcome"] == "tool error"


def test_every_call_is_audited_without_its_arguments(host: HostProcess) -> None:
    assert "result" in call(host, at("audited"), "whoami", secret="hunter2")
    (record,) = logged(host, event="mcp tool call", org="audited")
    told = {key: record[key] for key in ("plugin", "server", "tool", "outcome", "actor")}
    assert told == {"plugin": "tools", "server": "tools", "tool": "whoami", "outcome": "ok", "actor": "local"}
    assert record["ms"] > 0
    assert "hunter2" not in host.log


def test_thousands_of_tools_come_in_pages(tmp_path: Path, serve: Serve) -> None:
    source = """
        from hayhost.sdk import *
        class Tools:
            def list_tools(self):
                return [{"name": f"tool{n}", "inputSchema": {"type": "object"}} for n in range(7000)]
            def call_tool(self, name, arguments):
                return name
        @define_hay_plugin
        class P:
            name = "many"
            async def on_start(self, ctx):
                await ctx.mcp.start_local("many", lambda mcp: Tools())
    """
    write_plugin(tmp_path / "many", source, capabilities=("mcp",))
    host = serve(tmp_path)
    assert tools(host, at("acme", "many")) == [f"tool{n}" for n in range(5000)]
    assert call(host, at("acme", "many"), "tool4999")["result"]["content"][0]["text"] == "tool4999"
    assert logged(host, event="tools/list has entries that cannot be used")[0]["entries"] == 2000
    for cursor in ("5", "x-500", "-1", "zz"):
        assert ask(host, at("acme", "many"), "tools/list", {"cursor": cursor})["error"]["code"] == -32602


# ---- idle workers, changes


def test_lists_wake_no_worker_and_calls_do(tmp_path: Path, serve: Serve) -> None:
    write_tools(tmp_path, "tools")
    host = serve(tmp_path, "--idle-timeout", 0.2)
    listed = tools(host, at("acme"))
    wait_until(lambda: host.health("tools", "acme")["state"] == "stopped", "the worker to leave")
    assert tools(host, at("acme")) == listed
    assert tools(host, "/orgs/acme/mcp") == [f"tools__{name}" for name in listed]
    assert Session(host, at("acme")).server["capabilities"]["tools"]
    assert host.health("tools", "acme")["state"] == "stopped"
    assert call(host, at("acme"), "whoami")["result"]["structuredContent"]["org"] == "acme"


def test_clients_hear_of_lists_that_change_and_of_no_others(tmp_path: Path, serve: Serve) -> None:
    write_tools(tmp_path, "tools")
    host = serve(tmp_path)
    session = Session(host, at("acme"))
    streams = [news(session), listen(host, "/orgs/acme/mcp", toolsListChanged=True, promptsListChanged=True)]
    assert "extra" in tools(host, at("acme"))
    (tmp_path / "tools" / "more.txt").write_text("nothing that any tool knows of")
    host.wait_for_log('"event":"reloaded"')
    write_tools(tmp_path, "tools", mark="another")
    host.wait_for_log('"event":"reloaded"', 2)
    changed = "notifications/tools/list_changed"
    wait_until(lambda: all(changed in stream.methods() for stream in streams), "the news")
    assert "another" in tools(host, at("acme"))
    write_tools(tmp_path, "more")  # a plugin more, in the list of all
    wait_until(lambda: streams[1].methods().count(changed) == 2, "news of the plugin")
    assert "more__whoami" in tools(host, "/orgs/acme/mcp")
    assert streams[0].methods() == [changed]
    acknowledged = "notifications/subscriptions/acknowledged"
    assert streams[1].methods() == [acknowledged, *[changed] * 2]
    for stream in streams:
        stream.close()


def test_streams_end_when_the_host_stops(tmp_path: Path, serve: Serve) -> None:
    write_tools(tmp_path, "tools")
    host = serve(tmp_path)
    streams = [news(Session(host, at("acme"))), listen(host, at("acme"), toolsListChanged=True)]
    wait_until(lambda: streams[1].received, "the acknowledgement")
    host.process.send_signal(signal.SIGTERM)
    assert host.process.wait(LIMIT) == 0
    assert "requests are broken off" not in host.log
    wait_until(lambda: all(stream.ended for stream in streams), "the streams' end")
    for stream in streams:
        stream.close()


# ---- who may use what


def test_tools_that_an_org_may_not_use_are_not_there(tmp_path: Path) -> None:
    write_tools(tmp_path, "tools")
    write_tools(tmp_path, "others")
    lines = [f"[orgs.{org}.plugins.{plugin}]" for org in ("acme", "free", "one") for plugin in ("tools", "others")]
    lines += ["[orgs.acme.tools]", 'deny = ["tools__whoami", "*__di*"]']
    lines += ["[orgs.one.tools]", 'allow = ["others__whoami"]']
    orgs = tmp_path / "orgs.toml"
    orgs.write_text("\n".join(lines))
    orgs.chmod(0o600)
    with hosting(tmp_path, "--store", tmp_path / "store.db", "--orgs", orgs) as host:
        assert {"tools__whoami", "tools__die"} <= set(tools(host, "/orgs/free/mcp"))
        denied = set(tools(host, "/orgs/free/mcp")) - set(tools(host, "/orgs/acme/mcp"))
        assert denied == {
            "tools__whoami",
            *(f"{name}__{tool}" for name in ("tools", "others") for tool in ("die", "die_once")),
        }
        assert tools(host, "/orgs/one/mcp") == ["others__whoami"]
        assert tools(host, at("one")) == []
        for path, tool in ((at("acme"), "whoami"), ("/orgs/acme/mcp", "tools__whoami")):
            assert call(host, path, tool)["error"]["message"] == f"Unknown tool: {tool}"
        assert called(tmp_path) == []
        assert call(host, at("acme", "others"), "whoami")["result"]["structuredContent"]["org"] == "acme"
        for path in ("/orgs/nobody/mcp", at("nobody"), "/orgs/a%63me/mcp", "/orgs/acme/mcp/", "/orgs/acme"):
            assert host.post(path, "{}").status == 404


def test_tokens(tmp_path: Path) -> None:
    write_tools(tmp_path, "tools")
    file = stored(tmp_path / "store.db", {org: {"tools": {}} for org in ("acme", "beta")})

    async def create() -> list[str]:
        async with Store(str(file), Keyring.load(file.with_suffix(".key"), {})) as store:
            made = [await store.tokens.create("t", actor="test", org=org) for org in ("acme", "acme", "beta", None)]
            return [secret for _, secret in made]

    ours, second, theirs, admin = (f"Bearer {secret}" for secret in asyncio.run(create()))
    with hosting(tmp_path, "--store", file) as host:
        body, headers = mcping.stateless_request("tools/list")
        for path in (at("acme"), "/orgs/acme/mcp"):
            answer = host.post(path, body, headers=headers)
            metadata = f"http://127.0.0.1:{host.port}/.well-known/oauth-protected-resource{path}"
            assert answer.status == 401
            assert answer.headers["WWW-Authenticate"] == f'Bearer resource_metadata="{metadata}"'
            assert host.get(metadata.partition(str(host.port))[2]).json()["resource"].endswith(path)
            wrong = host.post(path, body, headers={**headers, "Authorization": "Bearer hay_no"})
            assert wrong.status == 401
            assert 'error="invalid_token", resource_metadata=' in wrong.headers["WWW-Authenticate"]
            assert host.post(path, body, headers={**headers, "Authorization": theirs}).status == 403
            for good in (ours, admin):
                assert host.post(path, body, headers={**headers, "Authorization": good}).status == 200
        session = Session(host, at("acme"), Authorization=ours)
        assert session.call("whoami")["result"]["structuredContent"]["org"] == "acme"
        for other, status in ((second, 404), (admin, 404), (theirs, 403)):  # a session is of one credential
            session.headers["Authorization"] = other
            assert session.post("tools/list").status == status
            assert session.end().status == status
        session.headers["Authorization"] = ours
        assert session.post("tools/list").status == 200
        headers = {"Authorization": admin}
        path = "/api/v1/audit?action=mcp.call&org=acme"
        (entry,) = wait_until(lambda: host.get(path, headers=headers).json()["items"], "the call in the audit log")
        assert entry["actor"] == f"token:{ours.split('_')[1]}"
        assert ours.split("_", 2)[2] not in host.log


def test_a_plugin_without_servers_has_no_endpoint(host: HostProcess) -> None:
    body, headers = mcping.stateless_request("tools/list")
    assert host.post(at("acme", "plain"), body, headers=headers).status == 404


# ---- HTTP


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"MCP-Protocol-Version": "1999-01-01"}, 400),
        ({"MCP-Protocol-Version": mcping.SESSIONS}, 400),
        ({"Accept": "text/html"}, 406),
        ({"Content-Type": "text/plain"}, 400),
        ({"Mcp-Name": "another"}, 400),
        ({}, 200),
    ],
)
def test_headers_are_checked(host: HostProcess, headers: dict[str, str], status: int) -> None:
    body, own = mcping.stateless_request("tools/call", {"name": "whoami", "arguments": {}})
    assert host.post(at("acme"), body, headers={**own, **headers}).status == status


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 100_000, b'"\xff"', b"1" * 10_000, b'{"jsonrpc":"2.0"}'])
@pytest.mark.parametrize("version", [mcping.SESSIONS, mcping.STATELESS])
def test_malformed_bodies(host: HostProcess, body: bytes, version: str) -> None:
    _, headers = mcping.stateless_request("tools/list")
    answer = host.post(at("acme"), body, headers={**headers, "MCP-Protocol-Version": version})
    assert answer.status in (400, 202)
    assert tools(host, at("acme"))


def test_bodies_and_methods(host: HostProcess) -> None:
    assert host.post(at("acme"), b"x" * (11 << 20)).status == 413
    assert host.request("PUT", at("acme")).status == 405
    assert host.request("OPTIONS", "/orgs/acme/mcp").headers["Allow"] == "DELETE, GET, OPTIONS, POST"
    assert host.get("/orgs/acme/mcp", headers={"Accept": "text/event-stream"}).status == 400


def test_a_request_of_many_megabytes_arrives_whole(host: HostProcess) -> None:
    long = "y" * (3 << 20)
    result = call(host, at("acme"), "whoami", text=long)["result"]
    assert result["structuredContent"]["arguments"]["text"] == long


def test_an_endpoint_says_how_it_is_protected(host: HostProcess) -> None:
    for path in (at("acme"), "/orgs/acme/mcp"):
        answer = host.get(f"/.well-known/oauth-protected-resource{path}")
        assert answer.status == 200
        assert answer.json()["resource"] == f"http://127.0.0.1:{host.port}{path}"
        assert answer.json()["bearer_methods_supported"] == ["header"]
    assert host.get("/.well-known/oauth-protected-resource/plugins/tools/acme/metadata").status == 404


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look into the front")
def test_the_package_is_imported_with_the_first_request(tmp_path: Path, serve: Serve) -> None:
    write_tools(tmp_path, "tools")
    host = serve(tmp_path)
    assert host.get("/plugins/tools/acme/mcp/list-tools").status == 200

    def mapped() -> bool:
        return "pydantic_core" in Path(f"/proc/{host.pid}/maps").read_text()

    assert not mapped()
    assert tools(host, at("acme"))
    assert mapped()


def test_an_answer_too_large_is_an_error_and_costs_nobody_else(host: HostProcess) -> None:
    assert call(host, at("acme"), "large", size=17 << 20)["error"]["code"] == -32000
    text = call(host, at("acme"), "large", size=15 << 20)["result"]["content"][0]["text"]
    assert len(text) == 15 << 20
    assert call(host, at("beta"), "whoami")["result"]["structuredContent"]["org"] == "beta"


def test_json_of_a_session_s_answer(host: HostProcess) -> None:
    answer = Session(host, at("acme")).post("tools/call", {"name": "whoami", "arguments": {}})
    assert answer.headers.get_content_type() == "text/event-stream"
    assert json.loads(messages(answer)[-1]["result"]["content"][0]["text"])["org"] == "acme"
