"""The author's test kit, on plugins made for each test."""

import asyncio
import json
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hayhost.sdk import CapabilityError, ConfigError, DefinitionError, PluginError, TypeCheckError
from sandbox.confinement import MINIMAL_ENVIRONMENT
from sandbox.testing import LogRecord, NoSuchToolError, PluginHarness

from .conftest import write_plugin

Make = Callable[..., Path]
HEAD = "from hayhost.sdk import *\nimport asyncio, os, sys, time, threading\n"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a plugin: the body of its class, or with ``source`` its whole entry module."""

    def write(body: str = "", *, name: str = "one", source: str = "", manifest: str = "", **files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        manifest = manifest or (
            f'[project]\nname = "{name}"\nversion = "1"\n[tool.hay-plugin]\nentry = "./plugin.py"\n'
            'capabilities = ["routes", "mcp", "auth", "config", "ui"]\nenv = ["ALLOWED"]\n'
        )
        (folder / "pyproject.toml").write_text(manifest)
        source = source or "@define_hay_plugin\nclass P:\n    name = 'P'\n" + textwrap.indent(
            textwrap.dedent(body), "    "
        )
        (folder / "plugin.py").write_text(HEAD + source)
        for file, text in files.items():
            (folder / f"{file}.py").write_text(textwrap.dedent(text))
        return folder

    return write


def world() -> tuple[list[str], set[str], dict[str, str], str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    return list(sys.path), set(sys.modules), environment, os.getcwd()


LIFE = """
calls = []
def on_initialize(self, ctx):
    self.calls.append("initialize")
async def on_start(self, ctx):
    self.calls.append(("start", ctx.config.get("x"), ctx.org.id, ctx.org.name))
    ctx.state["n"] = 1
    class S:
        def list_tools(self): return [{"name": "t", "annotations": {"a": 1}}]
        async def call_tool(self, name, arguments):
            if arguments.get("boom"):
                raise KeyError("boom") from ValueError("inner")
            return arguments.get("unfit") and object() or {"got": arguments}
        def stop(s): self.calls.append("server stopped")
    await ctx.mcp.start_local("s", lambda mcp: S())
def on_config_update(self, ctx): self.calls.append(("update", ctx.config.get("x")))
async def on_disable(self, ctx): self.calls.append("disable")
def on_stop(self, ctx): self.calls.append("stop")
def on_enable(self, ctx): self.calls.append(("enable", ctx.config.get("x")))
"""


def test_life(make: Make) -> None:
    with PluginHarness(make(LIFE), config={"x": 1}, org_id="acme") as plugin:
        calls = plugin.module.P.wrapped.calls
        plugin.enable()
        assert plugin.metadata()["mcp"]["local"] == []
        plugin.start()
        assert plugin.metadata()["mcp"] == {"local": [{"id": "s"}], "external": []}
        plugin.state["n"] = 2
        plugin.update_config({"x": 2})
        assert plugin.state == {"n": 1}
        plugin.disable()
        plugin.disable()
        plugin.stop()
        with pytest.raises(RuntimeError, match="start"):
            plugin.state  # noqa: B018
        assert plugin.list_tools() == [{"name": "t", "annotations": {"a": 1}, "serverId": "s"}]
        with pytest.raises(RuntimeError, match="runs already"):
            plugin.start()
    assert calls == [
        "initialize",
        ("enable", 1),
        ("start", 1, "acme", "Test Org acme"),
        ("update", 2),
        "stop",
        "server stopped",
        ("start", 2, "acme", "Test Org acme"),
        "disable",
        "server stopped",
        "disable",
        ("start", 2, "acme", "Test Org acme"),
        "stop",
        "server stopped",
    ]


def test_tools(make: Make) -> None:
    with PluginHarness(make(LIFE), config={"x": 1}) as plugin:
        assert plugin.call_tool("t", {"a": (1, 2)}) == {"got": {"a": [1, 2]}}
        assert plugin.call_tool("t") == {"got": {}}
        with pytest.raises(KeyError, match="boom") as caught:
            plugin.call_tool("t", {"boom": True})
        assert isinstance(caught.value.__cause__, ValueError)
        with pytest.raises(NoSuchToolError):
            plugin.call_tool("u")
        with pytest.raises(TypeError):
            plugin.call_tool("t", {"unfit": True})


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize(
    "error", ["ValueError('mine')", "SystemExit(3)", "TimeoutError('mine')", "asyncio.CancelledError('mine')"]
)
def test_hook_errors_are_raised(make: Make, kind: str, error: str) -> None:
    names = ("start", "validate_auth", "config_update", "disable", "stop", "enable")
    folder = make("".join(f"{kind} on_{name}(self, ctx): raise {error}\n" for name in names))
    with PluginHarness(folder) as plugin:
        for call in (
            plugin.start,
            lambda: plugin.validate_auth({"methodId": "m", "credentials": {}}),
            lambda: plugin.update_config({"a": 1}),
            plugin.stop,
            plugin.enable,
            plugin.disable,
        ):
            with pytest.raises(BaseException, match=r"mine|3"):
                call()


def test_leaving_raises_what_on_stop_raises_unless_the_test_failed(make: Make) -> None:
    folder = make("def on_stop(self, ctx): raise ValueError('mine')")
    before = world()
    with pytest.raises(ValueError, match="mine"), PluginHarness(folder) as plugin:
        plugin.start()
    with pytest.raises(ZeroDivisionError), PluginHarness(folder) as plugin:  # noqa: PT012  # the test itself fails here
        plugin.start()
        raise ZeroDivisionError
    assert plugin.logs[0].level == "error"
    assert "plugin.py" in str(plugin.logs[0].meta)
    assert world() == before


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("x = 1 / 0", ZeroDivisionError),
        ("x = 1", DefinitionError),
        (
            "@define_hay_plugin\nclass P:\n  name='P'\n  def on_initialize(self, ctx): raise ZeroDivisionError",
            ZeroDivisionError,
        ),
        ("@define_hay_plugin\nclass P:\n  name='P'\n  async def on_initialize(self, ctx): sys.exit(2)", SystemExit),
        (
            "@define_hay_plugin\nclass P:\n  name='P'\n"
            "  def on_initialize(self, ctx): ctx.register.route('GET', 1, print)",
            TypeCheckError,
        ),
        ("import helper\nsys.exit(1)", SystemExit),
    ],
)
def test_load_errors_are_raised_and_leave_nothing(make: Make, source: str, error: type[BaseException]) -> None:
    folder = make(source=source, helper="")
    before, threads = world(), threading.active_count()
    with pytest.raises(error), PluginHarness(folder):
        pass
    assert world() == before
    assert threading.active_count() <= threads


def test_capabilities_are_those_of_the_manifest(make: Make) -> None:
    manifest = '[project]\nname="A"\n[tool.hay-plugin]\nentry="./plugin.py"\ncapabilities=["routes"]\n'
    folder = make("def on_initialize(self, ctx): ctx.register.config({})", manifest=manifest)
    with pytest.raises(CapabilityError, match="config"), PluginHarness(folder):
        pass
    folder = make("async def on_start(self, ctx): await ctx.mcp.start_local('a', print)", name="two", manifest=manifest)
    with PluginHarness(folder) as plugin, pytest.raises(CapabilityError, match="mcp"):
        plugin.start()


def test_late_registration_is_refused(make: Make) -> None:
    folder = make(
        """
        def on_initialize(self, ctx): self.register = ctx.register
        def on_start(self, ctx): self.register.config({})
        """
    )
    with PluginHarness(folder) as plugin, pytest.raises(PluginError, match="only possible in on_initialize"):
        plugin.start()


# Routes

ROUTES = """
def on_initialize(self, ctx):
    r = ctx.register.route
    r("GET", "/items/{id}", self.item)
    r("GET", "/items/special", lambda req: "special")
    r("PUT", "/items/{id}", self.item)
    r("POST", "/items/special", lambda req: "post")
    r("GET", "/{a}/b", lambda req: "ab")
    for name in "none text raw astream stream lists empty late early bad fail gone json".split():
        r("POST", "/" + name, getattr(self, name))
    r("POST", "/health", self.none)
async def item(self, req):
    extra = dict(query=req.query, method=req.method, org=req.ctx.org.id, path=req.path, id_=req.id)
    return {**req.params, **extra}
def none(self, req): return None
async def text(self, req): return req.text() + req.headers.get("X-Y", "")
def raw(self, req): return Response(req.body, 201, {"X-Z": "z"})
async def astream(self, req):
    for n in range(3):
        await asyncio.sleep(0)
        yield f"{n}é"
def stream(self, req):
    yield b"a"
    yield b"b"
def lists(self, req): return iter(["x", "y"])
def empty(self, req): return iter(())
async def late(self, req):
    yield "a"
    raise HTTPError(418, "late")
async def early(self, req):
    raise HTTPError(418, "early")
    yield
def bad(self, req): return iter([1])
def fail(self, req): raise ValueError("mine")
def gone(self, req): raise HTTPError(410, "gone")
def json(self, req): return {"ct": req.headers["content-type"], "json": req.json()}
"""


def test_routes(make: Make) -> None:
    with PluginHarness(make(ROUTES)) as plugin:
        assert [(log.level, "/health" in log.message) for log in plugin.logs] == [("warning", True)]
        item = plugin.request("GET", "/items/a%2Fb?q=1&q=2")
        assert item.json() == {
            "id": "a/b", "query": {"q": ["1", "2"]}, "method": "GET", "org": "test",
            "path": "/items/a%2Fb", "id_": "test-1",
        }  # fmt: skip
        assert item.headers["Content-Type"] == "application/json"
        assert plugin.request("GET", "/items/special").text == "special"
        assert plugin.request("PUT", "/items/special").json()["id"] == "special"
        assert plugin.request("GET", "/items/b").json()["id"] == "b"  # the first literal decides
        head = plugin.request("HEAD", "/items/a")
        assert (head.status, head.body) == (200, b"")
        for method, path, status, allow in (
            ("GET", "/nothing", 404, None),
            ("GET", "/items/", 404, None),
            ("PATCH", "/items/special", 405, "GET, HEAD, OPTIONS, POST, PUT"),
            ("DELETE", "/none", 405, "OPTIONS, POST"),
            ("OPTIONS", "/none", 204, "OPTIONS, POST"),
        ):
            response = plugin.request(method, path)
            assert (response.status, response.headers.get("allow")) == (status, allow)
        with pytest.raises(ValueError, match="answered by the host"):
            plugin.request("POST", "/health")
        with pytest.raises(ValueError, match="starts with"):
            plugin.request("POST", "x")


def test_answers(make: Make) -> None:
    with PluginHarness(make(ROUTES)) as plugin:

        def post(name: str, **options: Any) -> Any:
            return plugin.request("POST", f"/{name}", **options)

        assert (post("none").status, post("none").body) == (204, b"")
        assert post("text", body="é", headers={"x-y": "y"}).text == "éy"
        raw = post("raw", body=b"\xff\x00")
        assert (raw.status, raw.body, raw.headers["x-z"]) == (201, b"\xff\x00", "z")
        assert post("astream").chunks == ("0é".encode(), "1é".encode(), "2é".encode())
        assert post("astream").headers["content-type"].startswith("text/plain")
        assert post("stream").headers["content-type"] == "application/octet-stream"
        assert post("lists").text == "xy"
        assert post("empty").body == b""
        assert (post("early").status, post("early").json()) == (418, {"error": "early"})
        assert (post("gone").status, post("gone").json()) == (410, {"error": "gone"})
        assert post("json", json=None).json() == {"ct": "application/json", "json": None}
        assert post("json", body="{", headers={"content-type": "x"}).status == 400
        for name, error in (("late", Exception), ("bad", TypeError), ("fail", ValueError)):
            with pytest.raises(error):
                post(name)


def test_a_degraded_worker_still_answers(make: Make) -> None:
    folder = make(
        """
        def on_initialize(self, ctx):
            ctx.register.config({"a": {"type": "string", "required": True, "env": "ALLOWED"}})
            ctx.register.route("GET", "/", lambda req: "up")
        def on_start(self, ctx): ctx.config.get("a")
        """
    )
    with PluginHarness(folder) as plugin:
        with pytest.raises(ConfigError):
            plugin.request("GET", "/")
        assert plugin.request("GET", "/").text == "up"
    with PluginHarness(folder, env={"ALLOWED": "x", "OTHER": "y"}) as plugin:
        assert plugin.request("GET", "/").text == "up"


# Config and credentials


def test_validation_sees_the_overlaid_config(make: Make) -> None:
    folder = make(
        """
        async def on_validate_auth(self, ctx):
            self.seen.append(([ctx.config.get(k) for k in "abc"], ctx.auth.get()))
            return self.answer
        seen, answer = [], True
        """
    )
    with PluginHarness(folder, config={"a": 1, "b": 1, "c": 1}) as plugin:
        assert plugin.validate_auth({"methodId": "m", "credentials": {"c": 3}}, {"b": 2, "c": 2}) is True
        values, state = plugin.module.P.wrapped.seen[0]
        assert values == [1, 2, 3]
        assert (state.method_id, state.credentials) == ("m", {"c": 3})
        plugin.module.P.wrapped.answer = 1
        with pytest.raises(TypeCheckError, match="on_validate_auth"):
            plugin.validate_auth({"methodId": "m", "credentials": {}})
        for malformed in ({}, {"methodId": 1, "credentials": {}}, {"methodId": "m", "credentials": []}):
            with pytest.raises(TypeError, match="methodId"):
                plugin.validate_auth(malformed)
    with PluginHarness(make(name="two")) as plugin:
        assert plugin.validate_auth({"methodId": "m", "credentials": {}}) is True


def test_logs(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = make("def on_start(self, ctx): ctx.logger.warn('careful', {'a': 1}); ctx.config.get('nothing')")
    with PluginHarness(folder) as plugin:
        plugin.start()
        assert plugin.logs[0] == LogRecord("warning", "careful", {"a": 1})
        assert "'nothing'" in plugin.logs[1].message
    assert "careful {'a': 1}" in caplog.text


# The world around


def test_plugins_do_not_mix(make: Make) -> None:
    body = """
    def on_initialize(self, ctx): ctx.register.route("GET", "/", self.get)
    def get(self, req):
        import helper, lazy
        return [helper.name, lazy.name, os.path.basename(os.getcwd()), self.__module__]
    """
    source = "import helper\n@define_hay_plugin\nclass P:\n    name = 'P'\n" + textwrap.indent(
        textwrap.dedent(body), "    "
    )
    folders = [
        make(name=name, source=source, helper=f"name = {name!r}", lazy=f"name = {name!r}") for name in ("one", "two")
    ]
    before = world()
    with PluginHarness(folders[0]) as one:
        with PluginHarness(folders[1]) as two:
            assert one.request("GET", "/").json() == ["one", "one", "one", "plugin"]
            assert two.request("GET", "/").json() == ["two", "two", "two", "plugin"]
            assert one.request("GET", "/").json() == ["one", "one", "one", "plugin"]
        assert one.request("GET", "/").json() == ["one", "one", "one", "plugin"]
    assert world() == before
    one, two = PluginHarness(folders[0]), PluginHarness(folders[1])
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)  # not in reverse order
    assert two.request("GET", "/").json() == ["two", "two", "two", "plugin"]
    two.__exit__(None, None, None)
    assert world() == before


def test_each_harness_has_fresh_modules(make: Make) -> None:
    folder = make(
        source="import helper\nhelper.n.append(1)\n@define_hay_plugin\nclass P:\n    name = 'P'\n", helper="n = []"
    )
    for _ in range(2):
        with PluginHarness(folder) as plugin:
            assert plugin.module.helper.n == [1]


def test_environment_is_the_minimal_one(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_HOST", "x")
    with PluginHarness(make()):
        assert dict(os.environ) == MINIMAL_ENVIRONMENT
    assert os.environ["SECRET_OF_THE_HOST"] == "x"


@pytest.mark.parametrize(
    ("entry", "file"),
    [
        ("./plugin.py:B", "plugin.py"),
        ("pkg.mod:B", "pkg/mod.py"),
        ("./pkg/mod.py:B", "pkg/mod.py"),
        ("./src/json.py:B", "src/json.py"),
    ],
)
@pytest.mark.parametrize("kind", ["pyproject.toml", "package.json"])
def test_entries_and_manifests(tmp_path: Path, entry: str, file: str, kind: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    if path.parent.name == "pkg":
        (path.parent / "__init__.py").touch()
    source = HEAD + "".join(f"@define_hay_plugin\nclass {name}:\n    name = '{name}'\n" for name in "AB")
    path.write_text(source)
    if kind == "pyproject.toml":
        (tmp_path / kind).write_text(f'[project]\nname = "Name"\n[tool.hay-plugin]\nentry = "{entry}"')
    else:
        (tmp_path / "pyproject.toml").write_text("[tool.ruff]")
        (tmp_path / kind).write_text(json.dumps({"name": "Name", "hay-plugin": {"entry": entry}}))
    with PluginHarness(tmp_path) as plugin:
        assert plugin.spec.name == "name"


def test_missing_manifests(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="hay-plugin"):
        PluginHarness(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.hay-plugin]")
    with pytest.raises(PluginError, match="entry"):
        PluginHarness(tmp_path)


# Time and threads


@pytest.mark.parametrize(
    "body", ["async def on_start(self, ctx): await asyncio.sleep(60)", "def on_start(self, ctx): time.sleep(3)"]
)
def test_time_limit(make: Make, body: str) -> None:
    with (
        PluginHarness(make(body), timeout=0.5) as plugin,
        pytest.raises(TimeoutError, match="on_start did not finish"),
    ):
        plugin.start()


def test_concurrent_requests_and_background_tasks(make: Make) -> None:
    folder = make(
        """
        def on_initialize(self, ctx):
            ctx.register.route("GET", "/", self.get)
            ctx.register.route("GET", "/sync", self.sync)
        async def on_start(self, ctx):
            self.all, self.n, self.barrier = asyncio.Event(), 0, threading.Barrier(8)
            self.task = asyncio.create_task(asyncio.sleep(60))
            asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        async def get(self, req):
            self.n += 1
            if self.n == 8:
                self.all.set()
            await self.all.wait()
            return "ok"
        def sync(self, req):
            self.barrier.wait(10)
            return "ok"
        """
    )
    with PluginHarness(folder, timeout=10) as plugin:
        plugin.start()
        with ThreadPoolExecutor(8) as pool:
            for path in ("/", "/sync"):
                assert [r.text for r in pool.map(lambda p: plugin.request("GET", p), [path] * 8)] == ["ok"] * 8
        assert "ZeroDivisionError" in plugin.logs[0].message


def test_async_use(make: Make) -> None:
    folder = make(
        """
        async def on_initialize(self, ctx): ctx.register.route("GET", "/", lambda req: "up")
        """
    )

    async def main() -> None:
        async with PluginHarness(folder) as plugin:
            response = await asyncio.to_thread(plugin.request, "GET", "/")
            assert response.text == "up"
        with PluginHarness(folder) as plugin:  # and this works, too, if the loop can wait
            assert plugin.request("GET", "/").text == "up"

    before = world()
    asyncio.run(main())
    assert world() == before


def test_outside_of_with(make: Make) -> None:
    plugin = PluginHarness(make())
    for use in (plugin.start, plugin.metadata, plugin.list_tools, lambda: plugin.request("GET", "/")):
        with pytest.raises(RuntimeError, match="with statement"):
            use()
    with plugin, pytest.raises(RuntimeError, match="in use"):
        plugin.__enter__()


def test_no_threads_are_left(make: Make) -> None:
    folder = make("def on_start(self, ctx): pass")
    before = threading.active_count()
    for _ in range(5):
        with PluginHarness(folder) as plugin:
            plugin.start()
    del plugin
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert threading.active_count() <= before


def test_mcp_servers_of_the_package_and_programs(tmp_path: Path) -> None:
    server = """
        from mcp.server.mcpserver import MCPServer

        server = MCPServer("both")

        @server.tool()
        def add(a: int, b: int) -> int:
            return a + b

        if __name__ == "__main__":
            server.run()
    """
    source = """
        import sys
        from hayhost.sdk import HayStartContext, define_hay_plugin
        from server import server

        @define_hay_plugin
        class Both:
            name = "Both"

            async def on_start(self, ctx: HayStartContext) -> None:
                await ctx.mcp.start_local("object", lambda mcp: server)
                await ctx.mcp.start_local_stdio(id="program", command="python3", args=["server.py"])
    """
    extra = '[tool.hay-plugin.permissions]\nsubprocess = ["python3"]\n'
    folder = write_plugin(tmp_path / "both", source, files={"server.py": server}, extra=extra)
    with PluginHarness(folder) as plugin:
        assert [tool["serverId"] for tool in plugin.list_tools()] == ["object", "program"]
        assert plugin.call_tool("add", {"a": 1, "b": 2})["structuredContent"] == {"result": 3}
        assert plugin.metadata()["mcp"] == {"local": [{"id": "object"}, {"id": "program"}], "external": []}
