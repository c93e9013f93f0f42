"""The MCP servers of a worker, asked without a host: objects, programs and remote servers."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hayhost.sdk import AuthReader, Logger, McpInitContext, OrgConfig, RegistrationError
from sandbox import wire
from sandbox.dispatch import Caller
from sandbox.mcp import MAX_MESSAGE, McpRuntime, NoSuchToolError, ToolFailedError
from sandbox.spec import PluginSpec

from .conftest import LIMIT

PYTHON = sys.executable


class Rig:
    """A runtime, and what it has said."""

    def __init__(self, folder: Path) -> None:
        self.logs: list[str] = []
        self.failures: list[str] = []
        self.reports: list[list[wire.McpServer]] = []
        self.notices: list[dict[str, Any]] = []
        self.call = Caller(asyncio.get_running_loop())
        spec = PluginSpec(str(folder), "plugin.py", None, "p", "1", ("mcp",), (), (PYTHON,), 30.0)

        def log(_level: Any, message: str, _meta: Any = None) -> None:
            self.logs.append(message)

        logger = Logger(log)
        context = McpInitContext(OrgConfig({}, {}, {}, self.logs.append), AuthReader(None), logger)
        self.runtime = McpRuntime(
            spec,
            context,
            self.call,
            lambda call: None,
            self.reports.append,
            lambda notice: self.notices.append({"server": notice.server, **json.loads(notice.notification)}),
            lambda what, error: self.failures.append(f"{what}: {error}"),
        )

    def server(self, id: str) -> wire.McpServer:
        return next(server for server in self.reports[-1] if server.id == id)

    async def ask(self, server: str, method: str, params: Any = None, **more: Any) -> list[dict[str, Any]]:
        return [line async for line in self.lines(server, method, params, **more)]

    async def lines(self, server: str, method: str, params: Any = None, **more: Any) -> AsyncIterator[dict[str, Any]]:
        body = {"server": server, "method": method, **({} if params is None else {"params": params}), **more}
        async for line in self.runtime.answer(json.dumps(body).encode()):
            assert line.endswith(b"\n")
            yield json.loads(line)

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(LIMIT):
            while not condition():  # noqa: ASYNC110  # of many kinds
                await asyncio.sleep(0.01)

    async def program(self, source: str, id: str = "prog", **options: Any) -> None:
        file = Path(self.runtime._spec.folder) / f"{id}.py"
        file.write_text(textwrap.dedent(source))
        await self.runtime.start_local_stdio(
            id,
            PYTHON,
            [str(file)],
            options.get("cwd"),
            options.get("env", {}),
            options.get("timeout", 20.0),
        )


Test = Callable[[Rig], Any]


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Test], None]:
    def run(test: Test) -> None:
        async def main() -> None:
            rig = Rig(tmp_path)
            try:
                await test(rig)
            finally:
                await rig.runtime.stop(LIMIT)
                rig.call.close()

        asyncio.run(main())

    return run


SERVER = """\
import json, os, signal, sys, time

def say(**message):
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\\n")
    sys.stdout.flush()

def answer(message):
    method, params, id = message.get("method"), message.get("params") or {}, message.get("id")
    if method == "initialize":
        say(id=id, result={
            "protocolVersion": "2025-11-25", "capabilities": {"tools": {"listChanged": True}, "x": {"y": 1}},
            "serverInfo": {"name": "prog", "version": "1"}, "instructions": "be nice",
        })
    elif method == "ping":
        say(id=id, result={})
    elif method == "tools/list":
        say(id=id, result={"tools": tools(params)})
    elif method == "tools/call":
        call(id, params["name"], params.get("arguments") or {}, params.get("_meta") or {})
    elif method:
        other(id, method, params)
    else:
        reply(message)

def tools(params): return [{"name": "t"}]
def call(id, name, arguments, meta): say(id=id, result={"content": [], "given": arguments})
def other(id, method, params):
    if id is not None: say(id=id, error={"code": -32601, "message": "Method not found"})
def reply(message): pass
def main():
    for line in sys.stdin:
        answer(json.loads(line))
"""
"""A server that knows nothing of any package; tests replace its functions. It ends with ``main()``."""


def program(changes: str = "") -> str:
    return SERVER + textwrap.dedent(changes) + "\nmain()\n"


class Plain:
    def __init__(self) -> None:
        self.tools: Any = [{"name": "add", "inputSchema": {"type": "object"}}]

    def list_tools(self) -> Any:
        return self.tools

    def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Any:
        results: dict[str, Callable[[], Any]] = {
            "add": lambda: {"sum": arguments["a"] + arguments["b"]},
            "text": lambda: "hello",
            "list": lambda: [1, None],
            "mcp": lambda: {"content": [{"type": "text", "text": "as it is"}], "x-more": 1},
            "huge": lambda: "x" * (MAX_MESSAGE + 1),
            "raise": lambda: int("no number"),
            "exit": lambda: sys.exit(3),
        }
        return results[name]()


def test_a_plain_object_speaks_the_protocol(run: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        plain = Plain()
        plain.tools = [{"name": name} for name in ("add", "text", "list", "mcp", "huge", "raise", "exit")]
        await rig.runtime.start_local("calc", lambda context: plain)
        described = rig.server("calc")
        assert (described.kind, described.state, described.changes) == ("local", "running", 0)
        assert json.loads(described.info)["capabilities"] == {"tools": {"listChanged": True}}
        assert await rig.ask("calc", "tools/list") == [{"result": {"tools": plain.tools}}]

        async def call(name: str, arguments: Any = None) -> dict[str, Any]:
            [line] = await rig.ask("calc", "tools/call", {"name": name, "arguments": arguments or {}})
            return line

        assert (await call("add", {"a": 1, "b": 2}))["result"] == {
            "content": [{"type": "text", "text": '{"sum":3}'}],
            "structuredContent": {"sum": 3},
        }
        assert (await call("text"))["result"] == {"content": [{"type": "text", "text": "hello"}]}
        assert (await call("list"))["result"] == {"content": [{"type": "text", "text": "[1,null]"}]}
        assert (await call("mcp"))["result"] == {"content": [{"type": "text", "text": "as it is"}], "x-more": 1}
        failed = (await call("raise"))["result"]
        assert failed["isError"] is True
        assert "no number" in failed["content"][0]["text"]
        assert (await call("exit"))["result"]["isError"] is True
        assert (await call("huge"))["error"]["message"].endswith(f"at most {MAX_MESSAGE} are allowed")
        assert (await call("none"))["error"] == {"code": -32602, "message": "Unknown tool: none"}
        assert await rig.ask("calc", "ping") == [{"result": {}}]
        [refused] = await rig.ask("calc", "resources/list")
        assert refused["error"]["code"] == -32601

    run(test)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32600),
        (b"[]", -32600),
        (b'{"server": "calc"}', -32600),
        (b'{"server": "calc", "method": "ping", "params": []}', -32600),
        (b'{"server": "nobody", "method": "ping"}', -32602),
        (b'{"server": 7, "method": "ping"}', -32602),
        (b'{"server": "calc", "reply": 1, "result": {}}', -32602),
        (b'{"server": "calc", "reply": true}', -32602),
        (b'{"server": "calc", "reply": []}', -32602),
        (b'{"server": "calc", "method": "tools/call", "params": {"name": 1}}', -32602),
        (b'{"server": "calc", "method": "tools/call", "params": {"name": "add", "arguments": []}}', -32602),
    ],
)
def test_what_is_no_request_is_an_error(run: Callable[[Test], None], body: bytes, code: int) -> None:
    async def test(rig: Rig) -> None:
        await rig.runtime.start_local("calc", lambda context: Plain())
        [line] = [json.loads(line) async for line in rig.runtime.answer(body)]
        assert line["error"]["code"] == code

    run(test)


def test_tools_that_are_odd_or_too_many_cost_the_others_nothing(run: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        cyclic: dict[str, Any] = {"name": "cyclic"}
        cyclic["inputSchema"] = {"properties": {"self": cyclic}}
        plain = Plain()
        plain.tools = [cyclic, {"name": "odd", "inputSchema": 7}, {"name": 3}, "text", None, {"name": "none"}]
        await rig.runtime.start_local("calc", lambda context: plain)
        assert [tool["name"] for tool in await rig.runtime.list_tools()] == ["odd", "none"]
        assert len(rig.failures) == 4
        plain.tools = ({"name": f"t{number}", "description": "x" * 100} for number in range(1_000_000))
        rig.failures.clear()
        assert len(await rig.runtime.list_tools()) == 10_000
        assert "only its first 10000 tools are offered" in rig.failures[0]
        plain.tools = [{"name": f"t{number}", "description": "x" * 1_000_000} for number in range(30)]
        assert len(await rig.runtime.list_tools()) == 15

    run(test)


def test_a_changed_list_is_told(run: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        plain, contexts = Plain(), []

        def initialize(context: McpInitContext) -> Plain:
            contexts.append(context)
            return plain

        await rig.runtime.start_local("calc", initialize)
        await rig.runtime.list_tools()
        await rig.runtime.list_tools()
        assert rig.server("calc").changes == 0
        plain.tools = [{"name": "other"}]
        await rig.runtime.list_tools()
        await rig.until(lambda: rig.server("calc").changes == 1)
        await asyncio.to_thread(contexts[0].tools_changed)
        await rig.until(lambda: rig.server("calc").changes == 2)

    run(test)


def test_a_server_object_of_the_package(run: Callable[[Test], None]) -> None:
    from mcp.server.mcpserver import Context, MCPServer

    async def test(rig: Rig) -> None:
        started, stopped = asyncio.Event(), asyncio.Event()

        @contextlib.asynccontextmanager
        async def lifespan(_: Any) -> AsyncIterator[str]:
            started.set()
            yield "state"
            stopped.set()

        server: MCPServer[str] = MCPServer("calc", instructions="add up", lifespan=lifespan)

        @server.tool()
        async def add(a: int, b: int, ctx: Context[str]) -> dict[str, int]:
            """Adds"""
            await ctx.report_progress(1, 2, "half")
            return {"sum": a + b}

        @server.tool()
        async def elicits(ctx: Context[str]) -> str:
            answer = await ctx.session.elicit_form("Your name?", {"type": "object", "properties": {}})
            return f"{answer.action}"

        @server.tool()
        async def grows(ctx: Context[str]) -> str:
            server.add_tool(lambda: "x", name="new")
            await ctx.session.send_tool_list_changed()
            return "ok"

        @server.resource("file:///x")
        def resource() -> str:
            return "content"

        @server.prompt()
        def prompt(who: str) -> str:
            return f"Hello {who}"

        await rig.runtime.start_local("calc", lambda context: server)
        assert started.is_set()
        info = json.loads(rig.server("calc").info)
        assert info["protocolVersions"] == ["2025-11-25", "2026-07-28"]
        assert (info["serverInfo"]["name"], info["instructions"]) == ("calc", "add up")
        [line] = await rig.ask("calc", "tools/list")
        assert [tool["name"] for tool in line["result"]["tools"]] == ["add", "elicits", "grows"]
        lines = await rig.ask(
            "calc", "tools/call", {"name": "add", "arguments": {"a": 1, "b": 2}}, progressToken="mine"
        )
        assert lines[0] == {
            "method": "notifications/progress",
            "params": {"progressToken": "mine", "progress": 1.0, "total": 2.0, "message": "half"},
        }
        assert lines[1]["result"]["structuredContent"] == {"sum": 3}
        assert (await rig.runtime.call_tool("add", {"a": 1, "b": 2}))["structuredContent"] == {"sum": 3}
        asked = rig.lines("calc", "tools/call", {"name": "elicits"})
        question = await anext(asked)
        assert (question["method"], question["params"]["message"]) == ("elicitation/create", "Your name?")
        reply = {"reply": question["id"], "result": {"action": "decline"}}
        assert await rig.ask("calc", "", None, **reply) == [{"result": {}}]
        assert (await anext(asked))["result"]["content"][0]["text"] == "decline"
        before = rig.server("calc").changes
        await rig.ask("calc", "tools/call", {"name": "grows"})
        await rig.until(lambda: rig.server("calc").changes > before)
        assert len(await rig.runtime.list_tools()) == 4
        [read] = await rig.ask("calc", "resources/read", {"uri": "file:///x"})
        assert read["result"]["contents"][0]["text"] == "content"
        [got] = await rig.ask("calc", "prompts/get", {"name": "prompt", "arguments": {"who": "you"}})
        assert got["result"]["messages"][0]["content"]["text"] == "Hello you"
        envelope = {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": {"name": "c", "version": "1"},
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        params = {"name": "add", "arguments": {"a": 1, "b": 2}, "_meta": envelope}
        [modern] = await rig.ask("calc", "tools/call", params)
        assert modern["result"]["resultType"] == "complete"
        [unknown] = await rig.ask("calc", "no/such")
        assert unknown["error"]["code"] == -32601
        await rig.runtime.stop(5)
        assert stopped.is_set()
        assert not rig.failures

    run(test)


def test_a_program_is_initialized_and_passed_on_raw(run: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        await rig.program(
            program("""
                def tools(params):
                    odd = {"name": "u", "inputSchema": {"type": "nonsense"}}
                    return [{"name": "t", "inputSchema": None, "x": [1]}, odd]
            """)
        )
        described = rig.server("prog")
        assert (described.kind, described.state) == ("stdio", "running")
        assert json.loads(described.info) == {
            "protocolVersions": ["2025-11-25"],
            "capabilities": {"tools": {"listChanged": True}, "x": {"y": 1}},
            "serverInfo": {"name": "prog", "version": "1"},
            "instructions": "be nice",
            "timeout": 20.0,
        }
        assert await rig.runtime.list_tools() == [
            {"name": "t", "inputSchema": None, "x": [1], "serverId": "prog"},
            {"name": "u", "inputSchema": {"type": "nonsense"}, "serverId": "prog"},
        ]
        [line] = await rig.ask("prog", "tools/call", {"name": "t", "arguments": {"a": 1}})
        assert line == {"result": {"content": [], "given": {"a": 1}}}
        with pytest.raises(NoSuchToolError):
            await rig.runtime.call_tool("none", {})
        [line] = await rig.ask("prog", "no/such")
        assert line == {"error": {"code": -32601, "message": "Method not found"}}

    run(test)


def test_lists_are_kept_until_they_change(run: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        await rig.program(
            program("""
                asked = 0
                def tools(params):
                    global asked
                    asked += 1
                    return [{"name": f"t{asked}"}]
                def call(id, name, arguments, meta):
                    say(method="notifications/tools/list_changed")
                    say(id=id, result={})
            """)
        )
        for _ in range(3):
            assert [tool["name"] for tool in await rig.runtime.list_tools()] == ["t1"]
        before = rig.server("prog").changes
        await rig.runtime.call_tool("t1", {})
        assert [tool["name"] for tool in await rig.runtime.list_tools()] == ["t2"]
        await rig.until(lambda: rig.server("prog").changes == before + 1)

    run(test)


def test_progress_questions_and_cancelling(run: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        await rig.program(
            program("""
                waiting = {}
                def call(id, name, arguments, meta):
                    if "progressToken" in meta:
                        progress = {"progressToken": meta["progressToken"], "progress": 1}
                        say(method="notifications/progress", params=progress)
                    if name == "asks":
                        waiting["asks"] = id
                        say(id="q1", method="sampling/createMessage", params={"messages": [], "maxTokens": 1})
                    elif name == "never":
                        say(method="notifications/message", params={"level": "info", "data": "hello"})
                    else:
                        say(id=id, result={"cancelled": waiting.get("cancelled")})
                def reply(message):
                    say(id=waiting.pop("asks"), result={"reply": message.get("result") or message.get("error")})
                def other(id, method, params):
                    if method == "notifications/cancelled":
                        waiting["cancelled"] = params["requestId"]
            """)
        )
        lines = await rig.ask("prog", "tools/call", {"name": "t", "_meta": {"progressToken": "bad"}}, progressToken=7)
        assert lines[0] == {"method": "notifications/progress", "params": {"progressToken": 7, "progress": 1}}
        assert len(await rig.ask("prog", "tools/call", {"name": "t", "_meta": {"progressToken": "no"}})) == 1
        asked = rig.lines("prog", "tools/call", {"name": "asks"})
        question = await anext(asked)
        assert question["method"] == "sampling/createMessage"
        error = {"reply": question["id"], "error": {"code": -1, "message": "no"}}
        assert await rig.ask("prog", "", None, **error) == [{"result": {}}]
        assert (await anext(asked))["result"]["reply"] == {"code": -1, "message": "no"}
        never = asyncio.ensure_future(rig.ask("prog", "tools/call", {"name": "never"}))
        await rig.until(lambda: rig.runtime._servers["prog"]._calls)  # type: ignore[attr-defined]
        never.cancel()
        await asyncio.wait({never})
        [line] = await rig.ask("prog", "tools/call", {"name": "t"})
        assert isinstance(line["result"]["cancelled"], int)
        [line] = [one for one in await rig.ask("prog", "tools/call", {"name": "never"}, timeout=0.3) if "error" in one]
        assert line["error"]["code"] == -32001
        assert rig.server("prog").state == "running"  # it answers pings

    run(test)


def test_a_program_that_dies_is_started_anew(run: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        await rig.program(
            program("""
                def call(id, name, arguments, meta):
                    if name == "die": os._exit(3)
                    say(id=id, result={"pid": os.getpid()})
            """)
        )
        first = (await rig.runtime.call_tool("t", {}))["pid"]
        before = rig.server("prog").changes
        [line] = await rig.ask("prog", "tools/call", {"name": "die"})
        assert line["error"]["message"] == "Connection closed"
        await rig.until(lambda: any(server.state == "restarting" for report in rig.reports for server in report))
        second = (await rig.runtime.call_tool("t", {}))["pid"]  # waits for it
        assert second != first
        assert rig.server("prog").changes > before
        assert any("it exited with code 3" in failure for failure in rig.failures)
        os.kill(second, signal.SIGKILL)
        await rig.until(lambda: "it was killed by signal 9" in rig.failures[-1])

    run(test)


def test_a_program_that_is_stopped_is_given_up(run: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.mcp.remote._PING_TIMEOUT", 0.3)

    async def test(rig: Rig) -> None:
        await rig.program(program("def call(id, name, arguments, meta): say(id=id, result={'pid': os.getpid()})"))
        await rig.runtime.start_local("calc", lambda context: Plain())
        first = (await rig.runtime.call_tool("t", {}))["pid"]
        os.kill(first, signal.SIGSTOP)
        [line] = await rig.ask("prog", "tools/call", {"name": "t"}, timeout=0.3)
        assert line["error"]["code"] == -32001
        assert (await rig.runtime.call_tool("add", {"a": 1, "b": 1})) == {"sum": 2}
        await rig.until(lambda: rig.failures and "it does not answer" in rig.failures[-1])
        assert (await rig.runtime.call_tool("t", {}))["pid"] != first
        await rig.until(lambda: not Path(f"/proc/{first}").exists())

    run(test)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import time; time.sleep(600)", "did not initialize within 0.5 s"),
        ("import sys; sys.exit(7)", "it exited with code 7"),
        ("print('hello'); import time; time.sleep(600)", "did not initialize within 0.5 s"),
        ("print('x\\n' * 100_000)\nimport time; time.sleep(600)", "lines that are no MCP messages"),
        (program("def answer(message): say(id=message['id'], error={'code': -1, 'message': 'no way'})"), "no way"),
        (program("def answer(message): say(id=message['id'], result={'protocolVersion': '1'})"), "unknown protocol"),
        (program("def answer(message): say(id=message['id'], result={})"), "unknown protocol"),
    ],
)
def test_a_program_that_does_not_start(run: Callable[[Test], None], source: str, reason: str) -> None:
    async def test(rig: Rig) -> None:
        seconds = 0.5 if "0.5" in reason else 20.0
        with pytest.raises(Exception, match=reason):
            await rig.program(source, timeout=seconds)
        server = rig.server("prog")
        assert server.state == "failed"
        assert reason in server.error
        assert await rig.runtime.list_tools() == []
        await rig.program(program())  # the id is free again
        assert len(await rig.runtime.list_tools()) == 1

    run(test)


def test_garbage_floods_and_giants_are_bounded(run: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        await rig.program(
            program("""
                def call(id, name, arguments, meta):
                    if name == "garbage":
                        sys.stdout.write("this is no JSON\\n{\\n")
                    if name == "giant":
                        head = '{"jsonrpc": "2.0", "id": %d, "result": {"x": "' % id
                        sys.stdout.write(head + "x" * 100_000_000 + '"}}\\n')
                        return
                    if name == "giant-last":
                        tail = '"}, "jsonrpc": "2.0", "id": %d}\\n' % id
                        sys.stdout.write('{"result": {"x": "' + "x" * 20_000_000 + tail)
                        return
                    if name == "flood":
                        for number in range(20_000):
                            progress = {"progressToken": meta["progressToken"], "progress": 1}
                            say(method="notifications/progress", params=progress)
                    if name == "noise":
                        sys.stderr.write("noise\\n" * 1000 + "x" * 100_000 + "\\n")
                    say(id=id, result={"ok": name})
            """)
        )
        [line] = await rig.ask("prog", "tools/call", {"name": "garbage"})
        assert line == {"result": {"ok": "garbage"}}
        assert any("no MCP message" in log for log in rig.logs)
        for name in ("giant", "giant-last"):
            [line] = await rig.ask("prog", "tools/call", {"name": name})
            assert "larger than" in line["error"]["message"]
            rig.runtime._owners[name] = "prog"
            with pytest.raises(ToolFailedError, match="larger than"):
                await rig.runtime.call_tool(name, {})
        lines = await rig.ask("prog", "tools/call", {"name": "flood"}, progressToken=1)
        assert lines[-1] == {"result": {"ok": "flood"}}
        assert await rig.ask("prog", "tools/call", {"name": "noise"}) == [{"result": {"ok": "noise"}}]
        await rig.until(lambda: any(log.startswith("prog: xxx") for log in rig.logs))
        assert max(map(len, rig.logs)) < 10_000
        assert rig.server("prog").state == "running"

    run(test)


def test_a_list_of_many_pages_and_one_without_end(run: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        pages = """
            def answer(message, before=answer):
                if message.get("method") != "tools/list":
                    return before(message)
                number = int((message.get("params") or {}).get("cursor", 0))
                more = {"nextCursor": str(number + 1)} if number < LAST else {}
                say(id=message["id"], result={"tools": [{"name": f"t{number}-{i}"} for i in range(100)], **more})
        """
        await rig.program(program(pages.replace("LAST", "19")))
        await rig.program(program(pages.replace("LAST", "10 ** 9")), "endless")
        [line] = await rig.ask("prog", "tools/list")
        assert len(line["result"]["tools"]) == 2_000
        [line] = await rig.ask("endless", "tools/list")
        assert len(line["result"]["tools"]) == 10_000

    run(test)


def test_what_a_program_is_given(run: Callable[[Test], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_HOST", "x")

    async def test(rig: Rig) -> None:
        (tmp_path / "inner").mkdir()
        (tmp_path / "out").symlink_to("/")
        await rig.program(
            program("""
                def call(id, name, arguments, meta):
                    say(id=id, result={
                        "cwd": os.getcwd(), "env": dict(os.environ), "group": os.getpgid(0) == os.getpid(),
                        "descriptors": sorted(os.listdir("/proc/self/fd")),
                    })
            """),
            cwd="inner",
            env={"MINE": "1", "HOME": "/h"},
        )
        given = await rig.runtime.call_tool("t", {})
        assert given["cwd"] == str(tmp_path / "inner")
        assert given["group"] is True
        assert len(given["descriptors"]) == 4  # and the one of the listing
        assert set(given["env"]) - {"LC_CTYPE"} == {"PATH", "LANG", "HOME", "USER", "LOGNAME", "TMPDIR", "MINE"}
        assert (given["env"]["MINE"], given["env"]["HOME"]) == ("1", "/h")
        for cwd, reason in (("..", "not in the plugin's folder"), ("out", "not in the"), ("none", "is no folder")):
            with pytest.raises(RegistrationError, match=reason):
                await rig.program(program(), "other", cwd=cwd)
        for command in ("sh", "/bin/sh", "no-such-command"):
            with pytest.raises(RegistrationError, match=r"permissions\.subprocess"):
                await rig.runtime.start_local_stdio("sh", command, [], None, {}, None)
        for options in ({"env": {"A=B": "x"}}, {"env": {"A": "\0"}}, {"timeout": 0}, {"timeout": float("nan")}):
            with pytest.raises(RegistrationError):
                await rig.program(program(), "other", **options)

    run(test)


def test_programs_end_with_all_that_they_have_started(run: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        await rig.program(
            program("""
                import subprocess
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                child = subprocess.Popen(["sleep", "600"])
                def call(id, name, arguments, meta): say(id=id, result={"pids": [os.getpid(), child.pid]})
                def main(before=main):
                    before()
                    time.sleep(600)
            """)
        )
        pids = (await rig.runtime.call_tool("t", {}))["pids"]
        await rig.runtime.stop(LIMIT)
        await rig.until(lambda: not any(running(pid) for pid in pids))

    run(test)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_only_one_call_under_way_can_be_asked(run: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        await rig.program(
            program("""
                calls = []
                def call(id, name, arguments, meta):
                    calls.append(id)
                    if len(calls) == 2:
                        say(id="q", method="elicitation/create", params={"message": "?"})
                def reply(message):
                    for id in calls: say(id=id, result={"reply": message["error"]["message"]})
            """)
        )
        answers = await asyncio.gather(*(rig.ask("prog", "tools/call", {"name": "t"}) for _ in range(2)))
        for [line] in answers:
            assert "2 requests are under way" in line["result"]["reply"]

    run(test)


def test_notices_are_passed_on_but_not_too_many(run: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        await rig.program(
            program("""
                def call(id, name, arguments, meta):
                    say(id=id, result={})
                    for number in range(1000):
                        say(method="notifications/resources/updated", params={"uri": f"file:///{number}"})
            """)
        )
        await rig.runtime.call_tool("t", {})
        await rig.until(lambda: rig.notices)
        assert rig.notices[0] == {
            "server": "prog",
            "method": "notifications/resources/updated",
            "params": {"uri": "file:///0"},
        }
        await rig.ask("prog", "ping")
        assert len(rig.notices) < 200

    run(test)
