"""MCP servers of plugins through the real host: real ones from PyPI and npm, confined; remote ones; their ends."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import HostProcess, wait_until, write_plugin
from .hosting import hosting, logged
from .networking import Names
from .test_mcp_runtime import program

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
NPM = ("@modelcontextprotocol/server-everything", "@modelcontextprotocol/server-filesystem")
SECRET = "Bearer s3cret-of-acme"


def permissions(**given: Any) -> str:
    return "[tool.hay-plugin.permissions]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in given.items())


def starting(*calls: str, more: str = "") -> str:
    """A plugin whose ``on_start`` makes ``calls``."""
    lines = "\n".join(f"        await ctx.mcp.{call}" for call in calls)
    return (
        "from hayhost.sdk import *\nimport os, subprocess\n\n@define_hay_plugin\nclass Plugin:\n    name = 'test'\n"
        f"    async def on_start(self, ctx):\n{more}{lines}\n"
    )


def call(host: HostProcess, plugin: str, tool: str, org: str = "acme", **arguments: Any) -> Any:
    body = {"toolName": tool, "arguments": arguments}
    return host.post(f"/plugins/{plugin}/{org}/mcp/call-tool", json_body=body)


def tools(host: HostProcess, plugin: str, org: str = "acme") -> dict[str, dict[str, Any]]:
    answer = host.get(f"/plugins/{plugin}/{org}/mcp/list-tools")
    assert answer.status == 200
    return {tool["name"]: tool for tool in answer.json()["tools"]}


def test_the_example_with_a_program(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "plugins" / "dates", tmp_path / "dates")
    with hosting(tmp_path, writable=False) as host:
        answer = call(host, "dates", "weekday", date="2026-11-22")
        assert (answer.status, answer.json()["content"][0]["text"]) == (200, "Sunday")
        health = host.health("dates", "acme")
        assert (health["status"], health["mcpServers"]["servers"]) == ("healthy", ["dates"])


def session_of(worker: int) -> list[int]:
    """The processes, but for the worker itself, that have its session."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[3] == str(worker) and fields[0] != "Z" and entry != str(worker):
            found.append(int(entry))
    return found


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the servers from npm in its node_modules, as an author would have it."""
    folder = tmp_path_factory.mktemp("npm")
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("there is no npm here: servers of Node are NOT tested")
    installed = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--silent", *NPM], cwd=folder, capture_output=True, timeout=150
    )
    if installed.returncode:
        pytest.skip(f"npm cannot install {NPM}: servers of Node are NOT tested: {installed.stderr[-300:]!r}")
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    folder = tmp_path_factory.mktemp("plugins")
    own = program("""
        import subprocess
        def tools(params):
            return [{"name": name} for name in ("t", "hang", "die", "spread", "look")]
        def call(id, name, arguments, meta):
            if name == "die": os._exit(5)
            if name == "spread":
                for _ in range(3):
                    subprocess.Popen(["sleep", "600"], process_group=0)
            if name == "look":
                seen = {}
                for path in ("/etc/passwd", "/proc/self/environ", os.path.join(os.getcwd(), "plugin.py")):
                    try: seen[path] = len(open(path).read())
                    except OSError as error: seen[path] = error.strerror
                for what in ("setsid", "socket"):
                    try: os.setsid() if what == "setsid" else __import__("socket").create_connection(("127.0.0.1", 1))
                    except OSError as error: seen[what] = error.strerror
                say(id=id, result={"seen": seen})
            elif name != "hang":
                say(id=id, result={"pid": os.getpid()})
    """)
    start = "start_local_stdio(id='own', command='python3', args=['own.py'])"
    write_plugin(
        folder / "own", starting(start), files={"own.py": own}, extra=permissions(subprocess=["python3", "sleep"])
    )
    write_plugin(
        folder / "unlisted",
        starting("start_local_stdio(id='a', command='sh')"),
        extra=permissions(subprocess=["python3"]),
    )
    never = "start_local_stdio(id='never', command='sleep', args=['600'], timeout=1)"
    plain = (
        "start_local('plain', lambda mcp: {'list_tools': lambda: [{'name': 'p'}], "
        "'call_tool': lambda name, arguments: 'ok'})"
    )
    write_plugin(folder / "never", starting(plain, never), extra=permissions(subprocess=["sleep"]))
    namesake = "import mcp\n" + starting(plain)
    write_plugin(folder / "namesake", namesake, files={"mcp.py": "HERE = True\n"})
    with hosting(folder, "--hook-timeout", "20", "--request-timeout", "4", writable=False) as host:
        yield host


def test_a_program_is_confined_as_its_worker(host: HostProcess) -> None:
    assert set(tools(host, "own")) == {"t", "hang", "die", "spread", "look"}
    seen = call(host, "own", "look").json()["seen"]
    isolated = host.health("own", "acme")["isolation"] != "none"
    assert seen.pop("setsid") == "Operation not permitted"
    assert isolated
    assert [isinstance(value, int) for value in seen.values()] == [False, False, True, False]
    metadata = host.get("/plugins/own/acme/metadata").json()["mcp"]
    assert metadata == {"local": [{"id": "own"}], "external": []}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_program_outlives_its_worker(host: HostProcess, how: signal.Signals) -> None:
    org = f"outlives-{how.name.lower()}"
    call(host, "own", "spread", org)
    worker = host.health("own", org)["pid"]
    assert len(session_of(worker)) == 4
    os.kill(worker, how)
    wait_until(lambda: not session_of(worker), "that nothing is left of the worker")


def test_no_program_outlives_an_orderly_stop(host: HostProcess) -> None:
    call(host, "own", "spread", "stopped")
    worker = host.health("own", "stopped")["pid"]
    assert host.post("/plugins/own/stopped/disable", json_body={}).status == 200
    wait_until(lambda: not session_of(worker), "that nothing is left of the worker")


def test_a_server_that_dies_or_hangs_costs_only_its_callers(host: HostProcess) -> None:
    first = call(host, "own", "t").json()["pid"]
    worker = host.health("own", "acme")["pid"]
    assert call(host, "own", "die").json() == {"error": "Tool execution failed: Connection closed"}
    assert call(host, "own", "t").json()["pid"] != first  # once it runs again
    logged(host, plugin="own", org="acme", level="error")
    assert call(host, "own", "hang").status == 504
    assert call(host, "own", "t").status == 200
    assert host.health("own", "acme")["pid"] == worker
    [server] = session_of(worker)
    os.kill(server, signal.SIGSTOP)
    assert call(host, "own", "t").status == 504
    assert call(host, "own", "t", "other-org").status == 200
    wait_until(lambda: call(host, "own", "t").status == 200, "that the stopped server is replaced")
    assert session_of(worker) != [server]


def test_a_command_that_is_not_listed_is_refused(host: HostProcess) -> None:
    assert tools(host, "unlisted") == {}
    health = host.health("unlisted", "acme")
    assert health["status"] == "degraded"
    assert 'permissions.subprocess = ["sh"]' in health["lastError"]


def test_a_server_that_never_initializes_is_shown_and_the_others_work(host: HostProcess) -> None:
    assert set(tools(host, "never")) == {"p"}
    health = host.health("never", "acme")
    assert "did not initialize within 1 s" in health["lastError"]
    assert health["mcpServers"]["servers"] == ["plain"]
    assert health["mcpServers"]["notRunning"]["never"]["state"] == "failed"
    assert call(host, "never", "p").json() == "ok"
    assert not session_of(health["pid"])


def test_a_plugin_may_have_a_module_called_mcp(host: HostProcess) -> None:
    assert set(tools(host, "namesake")) == {"p"}
    assert host.health("namesake", "acme")["status"] == "healthy"


# ---- real servers


def test_servers_from_pypi(tmp_path: Path) -> None:
    for name in ("mcp-server-time", "mcp-server-git"):
        if not (BIN / name).exists():
            pytest.skip(f"{name} is not installed: it is NOT tested")
    clock = "start_local_stdio(id='clock', command='mcp-server-time', args=['--local-timezone', 'UTC'])"
    git = "start_local_stdio(id='git', command='mcp-server-git', env={'GIT_PYTHON_REFRESH': 'quiet'})"
    make = (
        "        repo = os.environ['TMPDIR'] + '/repo'\n"
        "        subprocess.run(['git', 'init', '-q', repo], check=True)\n"
        "        ctx.logger.info(repo)\n"
    )
    write_plugin(tmp_path / "clock", starting(clock), extra=permissions(subprocess=["mcp-server-time"]))
    source = starting(git, more=make)
    write_plugin(tmp_path / "git", source, extra=permissions(subprocess=["mcp-server-git", "git"]))
    with hosting(tmp_path, writable=False) as host:
        assert tools(host, "clock")["get_current_time"]["serverId"] == "clock"
        answer = call(host, "clock", "get_current_time", timezone="Europe/Berlin").json()
        assert answer["isError"] is False
        assert json.loads(answer["content"][0]["text"])["timezone"] == "Europe/Berlin"
        assert "git_status" in tools(host, "git")
        [repo] = {record["event"] for record in logged(host, plugin="git") if record["event"].endswith("/repo")}
        answer = call(host, "git", "git_status", repo_path=repo).json()
        assert "No commits yet" in answer["content"][0]["text"], answer


def test_servers_from_npm(npm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "node"
    shutil.copytree(npm, folder, symlinks=True)
    scripts = [f"node_modules/{name}/dist/index.js" for name in NPM]
    source = starting(
        f"start_local_stdio(id='every', command='node', args=['{scripts[0]}'])",
        f"start_local_stdio(id='files', command='node', args=['{scripts[1]}', os.environ['TMPDIR']])",
    )
    write_plugin(folder, source, extra=permissions(subprocess=["node"]))
    with hosting(tmp_path, writable=False) as host:
        listed = tools(host, "node")
        assert {listed["echo"]["serverId"], listed["write_file"]["serverId"]} == {"every", "files"}
        assert call(host, "node", "echo", message="hi").json()["content"] == [{"type": "text", "text": "Echo: hi"}]
        sums = [call(host, "node", "get-sum", a=a, b=1).json()["content"][0]["text"] for a in range(3)]
        assert [text.split()[-1] for text in sums] == ["1.", "2.", "3."]
        answer = call(host, "node", "list_allowed_directories").json()["content"][0]["text"]
        scratch = answer.splitlines()[-1]
        assert call(host, "node", "write_file", path=f"{scratch}/a", content="text").json().get("isError") is not True
        read = call(host, "node", "read_text_file", path=f"{scratch}/a").json()
        assert read["content"][0]["text"] == "text"
        worker = host.health("node", "acme")["pid"]
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not session_of(worker), "that Node is gone with its worker")


# ---- remote servers

REMOTE = """
import sys, uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings

server = MCPServer("remote")

@server.tool()
def add(a: int, b: int) -> int:
    return a + b

@server.tool()
def big(size: int) -> str:
    return "x" * size

inner = server.streamable_http_app(
    json_response=sys.argv[2] == "json",
    transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
)

async def app(scope, receive, send):
    if scope["type"] == "http" and dict(scope["headers"]).get(b"authorization") != sys.argv[3].encode():
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})
    else:
        await inner(scope, receive, send)

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int, Names]]:
    """A server that answers with streams of events, one that answers with JSON, and the name ``mcp.test`` of both."""
    file = tmp_path_factory.mktemp("remote") / "remote.py"
    file.write_text(REMOTE)
    names = Names()
    names.set("mcp.test", "127.0.0.1")
    names.set("other.test", "127.0.0.1")
    processes, ports = [], []
    for kind in ("events", "json"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
        processes.append(subprocess.Popen([sys.executable, str(file), str(ports[-1]), kind, SECRET]))

    def listening(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(lambda: all(map(listening, ports)), "that the remote servers listen")
    yield ports[0], ports[1], names
    for process in processes:
        process.kill()
        process.wait()
    names.close()


def test_remote_servers(remote: tuple[int, int, Names], tmp_path: Path) -> None:
    events, plain, names = remote
    allowed = permissions(network=[f"mcp.test:{events}", f"mcp.test:{plain}"])

    def plugin(name: str, port: int, host: str = "mcp.test", header: str = SECRET) -> None:
        url = f"http://{host}:{port}/mcp?key=s3cret-too"
        secrets = {"known.py": f"URL = {url!r}\nHEADERS = {{'Authorization': {header!r}}}\n"}
        source = "from known import *\n" + starting("start_external(id='far', url=URL, auth_headers=HEADERS)")
        write_plugin(tmp_path / name, source, files=secrets, extra=allowed)

    plugin("events", events)
    plugin("json", plain)
    plugin("wrong", events, header="Bearer s3cret-bad")
    plugin("unlisted", events, "other.test")
    plugin("odd", events, header="s3cret\r\nB: c")
    options = ["--egress-allow", "127.0.0.1/32", "--egress-nameserver", f"127.0.0.1:{names.port}"]
    with hosting(tmp_path, *options, writable=False) as host:
        for name, port in (("events", events), ("json", plain)):
            assert tools(host, name)["add"]["serverId"] == "far"
            assert call(host, name, "add", a=1, b=2).json()["structuredContent"] == {"result": 3}
            metadata = host.get(f"/plugins/{name}/acme/metadata").json()["mcp"]
            assert metadata == {"local": [], "external": [{"id": "far", "url": f"http://mcp.test:{port}/mcp"}]}
            giant = call(host, name, "big", size=20_000_000)
            assert (giant.status, giant.json()["error"].partition(":")[0]) == (500, "Tool execution failed")
            assert call(host, name, "add", a=1, b=2).status == 200
        for name, reason in (
            ("wrong", "Server returned an error response"),
            ("unlisted", "permissions.network"),
            ("odd", "a value for Authorization that no header can have"),
        ):
            assert tools(host, name) == {}
            health = host.health(name, "acme")
            assert (health["status"], reason in health["lastError"]) == ("degraded", True), health
        assert "s3cret" not in host.log
