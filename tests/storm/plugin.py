"""The plugin that is served in a storm: all that it answers says whose it is, and what its worker has ever seen."""

from pathlib import Path

from tests.conftest import write_plugin
from tests.hosting import PREAMBLE
from tests.reloading import replace_file

__all__ = ["BROKEN", "save_version", "write"]

BROKEN = "VERSION = (\n"
"""A version that does not load."""

SOURCE = (
    PREAMBLE
    + """
import hashlib, socket, urllib.parse
from release import VERSION

SEEN = set()

def told(req):
    SEEN.add(req.headers.get("x-canary"))
    config = req.ctx.config
    return {
        "org": req.ctx.org.id, "canary": config.get("canary"), "value": config.get("value"), "version": VERSION,
        "seen": sorted(SEEN), "nonce": req.headers.get("x-nonce"),
    }

@route("GET", "/plain")
async def plain(req):
    if "log" in req.query:
        req.ctx.logger.info("here is " + req.ctx.config.get("canary"))
    return told(req)

@route("GET", "/thread")
def thread(req):
    time.sleep(0.005)
    return told(req)

@route("GET", "/pause/{ms}")
async def pause(req):
    await asyncio.sleep(int(req.params["ms"]) / 1000)
    return told(req)

@route("GET", "/busy/{ms}")
async def busy(req):
    end = time.monotonic() + int(req.params["ms"]) / 1000
    while time.monotonic() < end:
        pass
    return told(req)

@route("POST", "/upload")
async def upload(req):
    return {**told(req), "size": len(req.body), "digest": hashlib.sha256(req.body).hexdigest()}

@route("POST", "/echo")
async def echo(req):
    told(req)
    for start in range(0, len(req.body), 50_000):
        yield req.body[start : start + 50_000]
        await asyncio.sleep(0)

@route("GET", "/stream/{pieces}")
async def stream(req):
    line = (json.dumps(told(req)) + "\\n").encode()
    for _ in range(int(req.params["pieces"])):
        yield line * 40
        await asyncio.sleep(0.002)

@route("GET", "/dial/{port}")
async def dial(req):
    reader, writer = await asyncio.wait_for(asyncio.open_connection("localhost", int(req.params["port"])), 4)
    writer.write((req.headers["x-canary"] + "\\n").encode())
    line = await asyncio.wait_for(reader.readline(), 4)
    writer.close()
    return {**told(req), "echoed": line.decode().strip()}

class Tools:
    def __init__(self, ctx):
        self.ctx = ctx

    def list_tools(self):
        return [{"name": "whoami", "description": self.ctx.config.get("canary"), "inputSchema": {"type": "object"}}]

    async def call_tool(self, name, arguments):
        return {"canary": self.ctx.config.get("canary"), "nonce": arguments["nonce"]}

@define_hay_plugin
class Plugin:
    name = "storm"

    def on_initialize(self, ctx):
        ctx.register.config({
            "canary": {"type": "string"}, "value": {"type": "string"}, "secret": {"type": "string", "sensitive": True},
        })
        register(ctx)

    async def on_start(self, ctx):
        await ctx.mcp.start_local("tools", lambda mcp: Tools(mcp))

    async def on_config_update(self, ctx):
        ctx.logger.debug("updated " + ctx.config.get("canary"))
"""
)


def write(folder: Path, name: str, port: int) -> Path:
    """The plugin, in a folder of its own below ``folder``; it may connect to ``port`` of this machine."""
    network = f'[tool.hay-plugin.permissions]\nnetwork = ["localhost:{port}"]\n'
    made = write_plugin(folder / name, SOURCE, name=name, capabilities=("routes", "config", "mcp"), extra=network)
    save_version(made, "VERSION = 0\n")
    return made


def save_version(folder: Path, text: str) -> None:
    """Save the module that has the plugin's version, as an editor does."""
    replace_file(folder / "release.py", text)
