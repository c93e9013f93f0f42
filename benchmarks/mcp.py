"""What MCP servers cost a worker: memory of its own, and milliseconds to list and to call a tool, by kind of server.

python -m benchmarks.mcp --json benchmarks/results/mcp.json
"""

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hayhost.bench.figures import machine, summary
from hayhost.bench.host import Host, running

MANIFEST = """\
[project]
name = "{name}"
version = "1"
[tool.hay-plugin]
entry = "./plugin.py"
displayName = "{name}"
category = "tool"
capabilities = ["mcp", "routes"]
permissions = {{ subprocess = ["python3"] }}
"""

PLUGIN = """\
from hayhost.sdk import define_hay_plugin
{imports}

@define_hay_plugin
class Plugin:
    name = "bench"

    def on_initialize(self, ctx):
        ctx.register.route("POST", "/add", self.add)

    async def on_start(self, ctx):
        {start}

    async def add(self, req):
        return {{"sum": 3}}
"""

PLAIN = """\

class Tools:
    async def list_tools(self):
        return [{"name": "add", "inputSchema": {"type": "object"}}]

    async def call_tool(self, name, arguments):
        return {"sum": arguments["a"] + arguments["b"]}
"""

SERVER = """\
from mcp.server.mcpserver import MCPServer

server = MCPServer("bench")

@server.tool()
async def add(a: int, b: int) -> dict[str, int]:
    return {"sum": a + b}
"""

LOW_LEVEL = """\
from mcp.server.lowlevel import Server
from mcp_types import CallToolResult, ListToolsResult, TextContent, Tool

async def list_tools(ctx, params):
    return ListToolsResult(tools=[Tool(name="add", input_schema={"type": "object"})])

async def call_tool(ctx, params):
    text = str(params.arguments["a"] + params.arguments["b"])
    return CallToolResult(content=[TextContent(type="text", text=text)])

server = Server("bench", on_list_tools=list_tools, on_call_tool=call_tool)
"""

LOCAL = 'await ctx.mcp.start_local("bench", lambda mcp: {})'
STDIO = 'await ctx.mcp.start_local_stdio(id="bench", command="python3", args=["server.py"])'

KINDS: dict[str, tuple[str, str]] = {
    "no server": ("", "pass"),
    "plain object": (PLAIN, LOCAL.format("Tools()")),
    "package imported, no server": ("import mcp", "pass"),
    "Server of the package": (LOW_LEVEL, LOCAL.format("server")),
    "MCPServer of the package": (SERVER, LOCAL.format("server")),
    "program": ("", STDIO),
}


def write(folder: Path, name: str, imports: str, start: str) -> None:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(MANIFEST.format(name=name))
    (folder / "plugin.py").write_text(PLUGIN.format(imports=imports, start=start))
    if "stdio" in start:  # beside another plugin it would make that one look as if it used the package
        (folder / "server.py").write_text(SERVER + "\nserver.run()\n")


def memory(host: Host, plugin: str, orgs: int) -> dict[str, float]:
    """MiB of a worker, on average over ``orgs`` of them that all have listed and called: PSS, and pages of its own."""
    sizes = []
    for org in range(orgs):
        host.get(f"/plugins/{plugin}/org-{org}/mcp/list-tools")
        host.get(f"/plugins/{plugin}/org-{org}/metadata")
    time.sleep(1)
    for org in range(orgs):
        pid = json.loads(host.get(f"/plugins/{plugin}/org-{org}/health")[1])["pid"]
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        size = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        sizes.append((size["Pss"], size["Private_Dirty"]))
    pss, dirty = (statistics.mean(column) / 1024 for column in zip(*sizes, strict=True))
    return {"pss": round(pss, 2), "private dirty": round(dirty, 2)}


def timed(connection: http.client.HTTPConnection, path: str, body: bytes | None) -> float:
    """Milliseconds for one request."""
    begun = time.perf_counter()
    connection.request("GET" if body is None else "POST", path, body)
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.status}")
    return (time.perf_counter() - begun) * 1000


def latency(host: Host, plugins: list[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """By plugin, of a route that does nothing, of listing, and of a call: taken in turns."""
    connection = http.client.HTTPConnection("127.0.0.1", host.port, timeout=60)
    call = json.dumps({"toolName": "add", "arguments": {"a": 1, "b": 2}}).encode()
    asked: dict[str, tuple[str, bytes | None]] = {
        "route": ("add", b"{}"),
        "list": ("mcp/list-tools", None),
        "call": ("mcp/call-tool", call),
    }
    taken: dict[str, dict[str, list[float]]] = {plugin: {name: [] for name in asked} for plugin in plugins}
    for _ in range(rounds):
        for plugin, times in taken.items():
            for name, (path, body) in asked.items():
                times[name].append(timed(connection, f"/plugins/{plugin}/org-0/{path}", body))
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orgs", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = {kind: kind.lower().replace(" ", "-").replace(",", "") for kind in KINDS}
    result: dict[str, Any] = {"machine": machine(), "orgs": options.orgs, "MiB per worker": {}, "ms": {}}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for kind, (imports, start) in KINDS.items():
            write(Path(folder) / names[kind], names[kind], imports, start)
        with running(Path(folder), "--max-workers", str(options.orgs * len(KINDS) + 10)) as host:
            for kind, name in names.items():
                result["MiB per worker"][kind] = memory(host, name, options.orgs)
            with_tools = [name for kind, name in names.items() if "no server" not in kind]
            for name in with_tools:
                host.get(f"/plugins/{name}/org-0/mcp/list-tools")
            for name, times in latency(host, with_tools, options.rounds).items():
                kind = next(kind for kind in KINDS if names[kind] == name)
                over = statistics.median(times["call"]) - statistics.median(times["route"])
                result["ms"][kind] = {what: summary(values) for what, values in times.items()}
                result["ms"][kind]["a call over a route, p50"] = round(over, 3)
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if options.json:
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
