"""Hosts that keep what they are told, those who manage them, and a plugin that tells all that happens to it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .conftest import Answer, HostProcess, write_plugin
from .hosting import PREAMBLE, hosting

__all__ = ["RECORDER", "Manager", "managed", "write_recorder"]

API = "/api/v1"

RECORDER = (
    PREAMBLE
    + """
async def act(ctx, hook, **meta):
    ctx.logger.info("hook " + hook, {"hook": hook, "pid": os.getpid(), **meta})
    fault = ctx.config.get("fault") if hasattr(ctx, "config") else None
    if fault == hook + ":raise":
        raise RuntimeError("no luck")
    if fault == hook + ":exit":
        os._exit(7)
    if fault == hook + ":hang":
        await asyncio.Event().wait()

@route("GET", "/value")
async def value(req):
    return {"value": req.ctx.config.get("value"), "key": req.ctx.config.get("apiKey"), "pid": os.getpid()}

@route("POST", "/echo")
async def echo(req):
    return req.body

@route("GET", "/headers")
async def headers(req):
    return {name: value for name, value in req.headers.items()}

@route("GET", "/gated")
async def gated(req):
    req.ctx.logger.info("inside")
    while not os.path.exists(req.query["gate"][0]):
        await asyncio.sleep(0.01)
    return {"value": req.ctx.config.get("value"), "pid": os.getpid()}

@define_hay_plugin
class Recorder:
    name = "Recorder"

    def on_initialize(self, ctx):
        ctx.register.config({
            "value": {"type": "string"}, "fault": {"type": "string"}, "count": {"type": "number"},
            "flag": {"type": "boolean"}, "extra": {"type": "json"},
            "apiKey": {"type": "string", "sensitive": True}, "hidden": {"type": "json", "sensitive": True},
        })
        ctx.register.auth.api_key(id="key", label="API key", config_field="apiKey")
        register(ctx)

    async def on_start(self, ctx):
        await act(ctx, "on_start", value=ctx.config.get("value"))

    async def on_validate_auth(self, ctx):
        await act(ctx, "on_validate_auth", value=ctx.config.get("value"))
        return ctx.auth.get().credentials.get("apiKey") != "wrong"

    async def on_config_update(self, ctx):
        await act(ctx, "on_config_update", value=ctx.config.get("value"))

    async def on_enable(self, ctx):
        await act(ctx, "on_enable", value=ctx.config.get("value"))

    async def on_disable(self, ctx):
        await act(ctx, "on_disable")

    async def on_stop(self, ctx):
        await act(ctx, "on_stop")
"""
)


def write_recorder(folder: Path, name: str = "recorder") -> Path:
    """The plugin, in a folder of its own below ``folder``."""
    return write_plugin(folder / name, RECORDER, name=name)


class Manager:
    """Whoever manages a host, with a token or without."""

    def __init__(self, host: HostProcess, token: str | None = None) -> None:
        self.host = host
        self.token = token

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """A request to ``path``: below ``/api/v1``, but for a worker's own URLs (``/plugins/<name>/<org>/...``)."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token is not None:
            named.setdefault("Authorization", f"Bearer {self.token}")
        whole = path if path.startswith("/plugins/") and path.count("/") > 3 else API + path
        return self.host.request(method, whole, headers=named, json_body=body)

    def get(self, path: str, **headers: str) -> Any:
        """The JSON of a 200."""
        return self.ok("GET", path, **headers).json()

    def ok(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """As ``call``, but it must succeed."""
        answer = self.call(method, path, body, **headers)
        assert 200 <= answer.status < 300, (method, path, answer)
        return answer

    def put(self, org: str, plugin: str = "recorder", **given: Any) -> Any:
        """Install, or change settings; the installation."""
        return self.ok("PUT", f"/orgs/{org}/plugins/{plugin}", given).json()

    def new_token(self, name: str = "test", org: str | None = None, **more: Any) -> str:
        """The secret of a new token."""
        given = {"name": name, **({"org": org} if org else {}), **more}
        return str(self.ok("POST", "/tokens", given).json()["secret"])

    def hooks(self, org: str) -> list[str]:
        """The lifecycle hooks of the recorder that have begun for an org so far."""
        return [str(record["meta"]["hook"]) for record in self.records(org)]

    def records(self, org: str) -> list[dict[str, Any]]:
        """What the log has of them."""
        return [
            record
            for record in self.host.records()
            if record.get("org") == org and record["event"].startswith("hook ") and "meta" in record
        ]


@contextlib.contextmanager
def managed(folder: Path, *options: object, plugins: Path | None = None, **environment: Any) -> Iterator[Manager]:
    """A host in production mode, its store in ``folder``, with the recorder unless there is a folder of ``plugins``."""
    if plugins is None:
        plugins = folder / "plugins"
        if not plugins.exists():
            write_recorder(plugins)
    store = () if "--store" in options else ("--store", folder / "store.db")
    with hosting(plugins, "--mode", "production", *store, *options, **environment) as host:
        yield Manager(host)


def parsed(answer: Answer) -> Any:
    """The JSON of an answer, which must be valid."""
    return json.loads(answer.body.decode())
